"""A full disk under every writer: one line that names the file, and nothing half-written is left."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2 import checkpoint, export
from dinov2.config import load_config, save_run_config
from dinov2.eval import common, linear, pca
from dinov2.eval.probes import Probes
from dinov2.train.__main__ import main as train
from tests import killing
from tests.dinov2.train.tiny import make_tree, settings
from utils import images, locks
from utils.report import __main__ as report
from utils.results import append_result, read_json_lines

ROW = {"method": "dinov2", "noise": "none", "dataset": "x", "seed": 0, "epoch": 1, "iteration": 1, "metric": "m",
       "value": 1.0, "view": "noisy", "protocol": "full"}  # fmt: skip


def write_results(folder: Path) -> None:
    for _ in range(1000):
        append_result(folder / "results.jsonl", ROW)


def write_probe_state(folder: Path) -> None:
    probes = Probes(4, 1024, 100, [0.1], 0, torch.device("cpu"))
    linear.save(probes, 1, folder / ".eval-state.pth")


def write_cached_features(folder: Path) -> None:
    linear._allocate((4, 100_000, 10), 0, folder / ".eval-features.f16")


def write_pca(folder: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2, 2, 224, 224, 3), dtype=np.uint8)
    pca.write(common.Job(folder, "x"), ["a", "b"], ("clean", "noisy"), picture, picture)


def write_an_image(folder: Path) -> None:
    images.write_image(folder / "x.png", np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))


def write_a_config(folder: Path) -> None:
    save_run_config(load_config(["data.root=x", "output_dir=y", f"data.name={'x' * 200_000}"]), folder)


WRITERS = {
    write_results: "results.jsonl",
    write_probe_state: ".eval-state.pth",
    write_cached_features: ".eval-features.f16",
    write_pca: "pca.npz",
    write_an_image: "x.png",
    write_a_config: "config.yaml",
}


@contextmanager
def small(disk: Path, size: str) -> Iterator[Path]:
    disk.mkdir(parents=True)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk])


@pytest.fixture
def small_disk(tmp_path):
    with small(tmp_path / "disk", "100k") as disk:
        yield disk


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_the_file_is_named_and_nothing_is_left(writer, small_disk):
    with pytest.raises(OSError, match=f"No space left on device.*{WRITERS[writer]}") as raised:
        writer(small_disk)
    assert raised.value.errno == errno.ENOSPC
    assert [path.name for path in small_disk.iterdir()] == (["results.jsonl"] if writer is write_results else [])


def test_an_export_and_a_report_name_what_they_could_not_write(small_disk, tmp_path, monkeypatch):
    state, files = {"a": torch.zeros(100_000)}, {"config.json": {}}
    monkeypatch.setitem(export.FORMATS, "timm", lambda _, __, folder: export.write_folder(folder, state, files))
    with pytest.raises(OSError, match="disk/out cannot be written"):
        export.export(None, None, "timm", small_disk / "out")
    assert list(small_disk.iterdir()) == []
    cfg = load_config(["data.root=x", f"output_dir={tmp_path / 'run'}"])
    save_run_config(cfg, tmp_path / "run")
    with pytest.raises(OSError, match="No space left on device.*report.html"):
        report.main([str(tmp_path / "run"), "--output", str(small_disk / "report.html"), "--title", "x" * 200_000])
    assert list(small_disk.iterdir()) == []


def fill(disk: Path, room: int) -> None:
    (disk / "ballast").unlink(missing_ok=True)
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - room))


def train_into(run: Path, tree: Path) -> tuple[int, str]:
    """Exit code of two epochs, each with a checkpoint, and what was said."""
    arguments, log = settings(tree, run, "train.epochs=2", "train.eval_every=1"), tree.parent / "log"
    code = killing.end(killing.start(train, arguments, log))
    said = log.read_text()
    log.unlink()
    return code, said


def test_a_training_names_what_it_could_not_write_and_goes_on_when_there_is_room(tmp_path):
    tree = make_tree(tmp_path / "tiny")
    assert train_into(tmp_path / "whole", tree)[0] == 0
    with small(tmp_path / "disk", "40m") as disk:
        # Room for the first files, of a page each; for the first of two checkpoints.
        for room, names in ((20_480, r"metrics\.jsonl|tensorboard"), (14_000_000, "checkpoints/iter_0000000006")):
            fill(disk, room)
            code, said = train_into(disk / "run", tree)
            (last,) = [line for line in said.splitlines() if line.startswith("error: ")]
            assert code == 2 and re.search(f"run/({names})", last) and "Traceback" not in said, said
        assert [c.iteration for c in checkpoint.list_checkpoints(disk / "run")] == [3]
        (disk / "ballast").unlink()
        code, said = train_into(disk / "run", tree)
        assert code == 0 and "resumes from" in said, said
        ends = [checkpoint.latest(run).teacher for run in (tmp_path / "whole", disk / "run")]
        one, other = (checkpoint.load_tensors(end)["teacher"] for end in ends)
        assert all(torch.equal(one[key], other[key]) for key in one)
        rows = [row["iteration"] for row in read_json_lines(disk / "run/metrics.jsonl")]
        assert rows == [1, 2, 3, 4, 5, 6]


def test_a_training_names_the_folder_of_tensorboard(tmp_path):
    tree = make_tree(tmp_path / "tiny")
    with small(tmp_path / "run/tensorboard", "16k") as disk:
        fill(disk, 4096)
        code, said = train_into(tmp_path / "run", tree)
    (last,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code == 2 and "No space left on device: " in last and "run/tensorboard" in last, said
    assert "Traceback" not in said


def test_what_kills_left_goes_at_the_next_start_and_what_is_in_use_stays(tmp_path):
    gone, host = 2**22 + 1, locks.process_tag().rpartition("-")[0]
    for name in (f".config.yaml.tmp-{gone}", f"..eval-x.pth.tmp-{host}-{gone}", f".report.html.tmp-{host}-{gone}"):
        (tmp_path / name).touch()
    (tmp_path / f".digits.tmp-{host}-{gone}").mkdir()
    (tmp_path / f".digits.tmp-{host}-{gone}" / "x").touch()
    kept = {f".x.tmp-{locks.process_tag()}", f".x.tmp-abcdef-{gone}", "x.tmp-1", ".x.tmp-me", ".config.yaml"}
    for name in kept:
        (tmp_path / name).touch()
    with locks.locked(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == kept
