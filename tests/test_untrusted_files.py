"""No file that any entry point reads can run code: pickles of every protocol, put where each of them is read."""

import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from dinov2 import checkpoint
from dinov2.config import load_config, load_run_config
from dinov2.data.index import build_index
from dinov2.eval import linear
from dinov2.eval.probes import Probes
from dinov2.eval.revisited import load_ground_truth
from dinov2.models.pretrained import read_weights
from dinov2.train import curriculum
from dinov2.train.__main__ import build_trainer, main
from dinov2.train.trainer import Trainer
from Neighbor2Neighbor import train as denoiser
from Neighbor2Neighbor.unet import load_unet
from tests.dinov2.train.tiny import make_tree, settings
from toy_mnist.model import load_encoder
from utils.images import read_image, read_manifest
from utils.report.data import read_run
from utils.report.pictures import pca
from utils.results import read_json_lines

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
DESCRIPTION = "torch.distributed.checkpoint.metadata"


class Evil:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def dotted(marker: Path, protocol: int) -> bytes:
    """A pickle that walks from a class of DCP's description to eval: from protocol 4 on, dots in it are followed."""
    name = f"c{DESCRIPTION}\nMetadata.__init__.__builtins__.get\n".encode()
    code = f"__import__('os').system('touch {marker}')"
    text = [b"X" + struct.pack("<I", len(word)) + word.encode() + b"\x85R" for word in ("eval", code)]
    return pickle.PROTO + bytes([protocol]) + name + b"".join(text) + b"."


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "tiny", images=2)


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    main(settings(tree, run, "train.epochs=2"))
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def trainer(finished, tree) -> Trainer:
    return build_trainer(curriculum.plan(load_config(settings(tree, finished, "train.epochs=2")))[0])


def resume(trainer: Trainer, run: Path) -> None:
    trainer.run = run
    trainer.resume()


def attempt(read, *arguments) -> None:
    """Calls a reader, which may refuse what it reads in whatever way."""
    try:
        read(*arguments)
    except BaseException as error:  # DCP's CheckpointException is no Exception
        assert not isinstance(error, KeyboardInterrupt)


def seal(folder: Path) -> None:
    """COMPLETE rewritten to fit its folder, as whoever forged the folder's files would."""
    mark = json.loads((folder / checkpoint.MARK).read_text())
    others = {name: mark[name] for name in ("iteration", "epoch", "evaluate")}
    others["files"] = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != checkpoint.MARK}
    (folder / checkpoint.MARK).write_text(json.dumps(others))


def forge_shard(folder: Path, name: str, content: bytes) -> None:
    """Appends content to the shard, and lets the description say that it is the value called name."""
    with open(folder / "__0_0.distcp", "ab") as file:
        offset = file.tell()
        file.write(content)
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    like = next(iter(metadata.storage_data.values()))
    info = type(like)("__0_0.distcp", offset, len(content))
    metadata.storage_data = {k: v for k, v in metadata.storage_data.items() if k.fqn != name}
    metadata.storage_data[MetadataIndex(name)] = info
    metadata.planner_data[name] = tuple(name.split("."))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(folder)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_description_of_a_checkpoint(run, trainer, tmp_path, protocol):
    last = checkpoint.list_checkpoints(run)[-1]
    for content in (pickle.dumps(Evil(tmp_path / "ran"), protocol), dotted(tmp_path / "ran", protocol)):
        (last.path / ".metadata").write_bytes(content)
        seal(last.path)
        attempt(resume, trainer, run)
        assert not (tmp_path / "ran").exists()
        with pytest.raises(ValueError, match=r"\.metadata holds code or foreign objects \(.*\): refused"):
            checkpoint.load(checkpoint.list_checkpoints(run)[-1], {"model": {}})


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shards_of_a_checkpoint(run, trainer, tmp_path, protocol):
    parameter = "dino_head.mlp.0.weight"
    for name in (f"optimizer.param_groups.{parameter}.lr", f"model.student.{parameter}"):
        torch.save(Evil(tmp_path / "ran"), tmp_path / "evil.pth", pickle_protocol=max(protocol, 2))
        for content in ((tmp_path / "evil.pth").read_bytes(), pickle.dumps(Evil(tmp_path / "ran"), protocol)):
            forge_shard(checkpoint.list_checkpoints(run)[-1].path, name, content)
            attempt(resume, trainer, run)
    assert not (tmp_path / "ran").exists()


def probe_state(path: Path) -> None:
    linear.resume(Probes(1, 4, 2, [0.1], 0, torch.device("cpu")), path)


def denoiser_run(path: Path) -> None:
    tree = path.parent / "images"
    if not tree.exists():
        make_tree(tree, images=2)
    more = ["--crop", "16", "--depth", "2", "--steps", "1", "--batch-size", "2", "--workers", "0"]
    denoiser.main(["--data", str(tree), "--noise", "gauss50", "--output", str(path.parent), *more])


# Where a file is put, and what reads it there.
READERS = {
    "weights.pth": read_weights,
    "model.safetensors": read_weights,
    "unet.pth": load_unet,
    "checkpoint.pth": denoiser_run,
    "probe.pth": probe_state,
    "toy.pth": load_encoder,
    "gnd_roxford5k.pkl": load_ground_truth,
    "image.npy": lambda path: read_image(path, 3, "native"),
    "image.png": read_image,
    "image.tif": read_image,
    "results.jsonl": read_json_lines,
    "run/config.yaml": lambda path: (attempt(load_run_config, path.parent), read_run(path.parent)),
    "overlay.yaml": lambda path: load_config([str(path)], validated=False),
    "options.yaml": lambda path: denoiser.parse_arguments(["--config", str(path)]),
    "tree/manifest.json": lambda path: read_manifest(path.parent),
    "tree/.index-train.json": lambda path: build_index(path.parent, "train"),
    "run/pca.npz": lambda path: pca(SimpleNamespace(runs=[read_run(path.parent)])),
    "run/checkpoints/iter_0000000003/COMPLETE": lambda path: checkpoint.latest(path.parents[2]),
}


def contents(folder: Path, protocol: int) -> list[bytes]:
    """What an attacker would put there: pickles, bare and in the forms that hold some, and YAML of a function."""
    evil = Evil(folder / "ran")
    torch.save({"teacher": evil, "iteration": evil}, folder / "a.pth", pickle_protocol=max(protocol, 2))
    torch.save([evil], folder / "b.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    np.save(folder / "c.npy", np.array([evil], dtype=object), allow_pickle=True)
    np.savez(folder / "d.npz", pixels=np.array([evil], dtype=object), names=np.array([evil], dtype=object))
    saved = [(folder / name).read_bytes() for name in ("a.pth", "b.pth", "c.npy", "d.npz")]
    yaml = f"a: !!python/object/apply:os.system ['touch {folder / 'ran'}']\nnoise: '${{oc.env:HOME}}'\n"
    return [*saved, pickle.dumps(evil, protocol), dotted(folder / "ran", protocol), yaml.encode()]


@pytest.fixture(scope="module")
def payloads(tmp_path_factory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("payloads")
    return folder / "ran", [content for protocol in PROTOCOLS for content in contents(folder, protocol)]


@pytest.mark.parametrize("name", READERS)
def test_no_file_runs_code(finished, payloads, tmp_path, name):
    path = tmp_path / "work" / name
    path.parent.mkdir(parents=True)
    if name.startswith("run/"):
        shutil.copy(finished / "config.yaml", tmp_path / "work" / "run")
    ran, files = payloads
    for content in files:
        path.write_bytes(content)
        attempt(READERS[name], path)
    assert not ran.exists()


def test_the_payloads_run_where_nothing_guards(tmp_path):
    """Each of them does what it says when it is unpickled without a guard."""
    for protocol in PROTOCOLS:
        pickle.loads(pickle.dumps(Evil(tmp_path / f"plain{protocol}"), protocol))
        assert (tmp_path / f"plain{protocol}").exists()
    for protocol in (4, 5):
        pickle.loads(dotted(tmp_path / f"dotted{protocol}", protocol))
        assert (tmp_path / f"dotted{protocol}").exists()
