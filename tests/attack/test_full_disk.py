"""A full disk under every writer: one line that names the file, and nothing half-written is left."""

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2 import export
from dinov2.config import load_config, save_run_config
from dinov2.eval import common, linear, pca
from dinov2.eval.probes import Probes
from utils import images, locks
from utils.report import __main__ as report
from utils.results import append_result

ROW = {"method": "dinov2", "noise": "none", "dataset": "x", "seed": 0, "epoch": 1, "iteration": 1, "metric": "m",
       "value": 1.0, "view": "noisy", "protocol": "full"}  # fmt: skip


def write_results(folder: Path) -> None:
    for _ in range(1000):
        append_result(folder / "results.jsonl", ROW)


def write_probe_state(folder: Path) -> None:
    probes = Probes(4, 1024, 100, [0.1], 0, torch.device("cpu"))
    linear.save(probes, 1, folder / ".eval-state.pth")


def write_cached_features(folder: Path) -> None:
    linear._cache((4, 100_000, 10), 0, folder / ".eval-features.f16")


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


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk]).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", disk])


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


def test_what_kills_left_goes_at_the_next_start_and_what_is_in_use_stays(tmp_path):
    gone, host = 2**22 + 1, locks.mine().rpartition("-")[0]
    for name in (f".config.yaml.tmp-{gone}", f"..eval-x.pth.tmp-{host}-{gone}", f".report.html.tmp-{host}-{gone}"):
        (tmp_path / name).touch()
    (tmp_path / f".digits.tmp-{host}-{gone}").mkdir()
    (tmp_path / f".digits.tmp-{host}-{gone}" / "x").touch()
    kept = {f".x.tmp-{locks.mine()}", f".x.tmp-abcdef-{gone}", "x.tmp-1", ".x.tmp-me", ".config.yaml"}
    for name in kept:
        (tmp_path / name).touch()
    with locks.locked(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == kept
