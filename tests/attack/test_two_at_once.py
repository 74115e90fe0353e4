"""Two of a kind at once on one folder: the second is told who holds it, and nothing of the first is touched."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov2.train.__main__ import main as train
from Neighbor2Neighbor import denoise
from Neighbor2Neighbor import train as denoiser
from Neighbor2Neighbor.unet import UNet
from tests import killing
from tests.conftest import ROOT
from tests.dinov2.train.tiny import make_tree, settings
from utils import generate_noise
from utils.locks import locked


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("data") / "tiny")


def generate_noise_into(tree: Path, output: Path) -> None:
    generate_noise.main(
        ["--source", str(tree), "--noise", "shot3", "--output-root", str(output.parent), "--workers", "0"]
    )


def train_denoiser_into(tree: Path, output: Path) -> None:
    options = "--noise gauss50 --crop 16 --depth 2 --batch-size 4 --epochs 1 --steps 1 --workers 0 --precision fp32"
    denoiser.main(["--data", str(tree), "--output", str(output), *options.split()])


def denoise_into(tree: Path, output: Path) -> None:
    torch.save(UNet(features=8, depth=2).state_dict(), output.parent / "unet.pth")
    denoise.main(["--model", str(output.parent / "unet.pth"), "--data", str(tree), "--noise", "shot3", "--workers", "0",
                  "--output", str(output)])  # fmt: skip


def train_into(tree: Path, output: Path) -> None:
    train(settings(tree, output, "seed=1", "train.epochs=1", "train.eval_every=1"))


TOOLS = {
    generate_noise_into: "noisy_tiny-shot3",
    train_denoiser_into: "denoiser",
    denoise_into: "denoised",
    train_into: "run",
}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_the_second_of_two_is_told_who_holds_the_folder(tool, tree, tmp_path):
    output = tmp_path / TOOLS[tool]
    with locked(output):
        before = killing.contents(output)
        with pytest.raises(ValueError, match=rf"{output.name} is in use by process {os.getpid()} on"):
            tool(tree, output)
        assert killing.contents(output) == before
    tool(tree, output)
    assert len(killing.contents(output)) > 1 and not (output / ".lock").exists()
    with locked(output):
        pass  # a finished one is left


def test_a_refused_run_leaves_no_folder(tree, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        train(settings(tmp_path / "nowhere", tmp_path / "new/run"))
    with pytest.raises(ValueError), locked(tmp_path / "new/run"):
        raise ValueError
    with locked(tmp_path / "new/kept"):
        (tmp_path / "new/kept/file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "kept", "file"]


def test_the_later_stages_of_a_curriculum_are_held_too(tree, tmp_path):
    overrides = ["curriculum.restart_epoch=1", "curriculum.noisy_epochs=1", f"curriculum.denoised_dir={tmp_path / 'd'}"]
    denoise_into(tree, tmp_path / "denoised")
    with locked(tmp_path / "run"), pytest.raises(ValueError, match="run is in use"):
        train(["nc", *settings(tree, tmp_path / "run", "noise=shot3", f"data.denoised_root={tmp_path / 'denoised'}"),
               *overrides])  # fmt: skip
    assert killing.contents(tmp_path / "d") == {}


def test_every_rank_is_told(tmp_path, tree):
    torch.save(UNet(features=8, depth=2).state_dict(), tmp_path / "unet.pth")
    arguments = settings(tree, tmp_path / "run")
    with locked(tmp_path / "run"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                   "-m", "dinov2.train", *arguments]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    told = re.findall("error: [^\n]*? is in use by process", done.stderr)  # both may stand in one line
    assert done.returncode and len(told) == 2, done.stderr


def test_a_second_quickstart_is_told(tmp_path):
    with locked(tmp_path, "-quickstart"):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "exps/quickstart.sh", "--output", str(tmp_path), "--data", "no-such-data"],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PATH": path},
        )  # fmt: skip
    assert done.returncode == 2 and f"in use by process {os.getpid()}" in done.stderr and "2_train" not in done.stdout
