"""Every tool killed at random moments, then run once more: the end is that of a run that nobody disturbed.

KILLS=20 python -m pytest -s tests/attack/test_kills.py      prints how many kills met a living process
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from dinov2 import checkpoint, export
from dinov2.eval import common, knn, linear
from dinov2.train.__main__ import main as train
from Neighbor2Neighbor import denoise
from Neighbor2Neighbor import train as denoiser
from Neighbor2Neighbor.unet import UNet
from tests import killing
from tests.dinov2.eval.conftest import make_run, write_digits
from tests.dinov2.train.tiny import make_tree, settings
from utils import generate_noise
from utils.report import __main__ as report
from utils.results import read_results

KILLS = int(os.environ.get("KILLS", "1"))


def same_bytes(*names: str) -> Callable[[Path], object]:
    """The files of these names, or all files."""
    return lambda folder: {k: v for k, v in killing.contents(folder).items() if not names or Path(k).name in names}


def rows(run: Path) -> list:
    return [(row["epoch"], row["metric"], row["value"]) for row in read_results(run)]


def teacher(run: Path) -> dict:
    tensors = checkpoint.load_tensors(checkpoint.list_checkpoints(run)[-1].teacher)["teacher"]
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """tree/ (images), unet.pth, digits/ and run/ (a finished run on them)."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tree(folder / "tree", images=12)
    torch.save(UNet(features=8, depth=2).state_dict(), folder / "unet.pth")
    make_run(folder / "run", write_digits(folder / "digits"))
    return folder


def noise_command(inputs: Path, output: Path) -> tuple:
    target = output / "noisy_tree-shot3"
    arguments = ["--source", inputs / "tree", "--noise", "shot3", "--output-root", output, "--workers", "2"]
    return generate_noise.main, arguments, target, same_bytes()


def denoiser_command(inputs: Path, output: Path) -> tuple:
    options = "--noise gauss50 --crop 16 --depth 2 --batch-size 4 --epochs 3 --steps 30 --workers 1 --precision fp32"
    arguments = ["--data", inputs / "tree", "--output", output / "n2n", *options.split()]
    return denoiser.main, arguments, output / "n2n", same_bytes("unet.pth", "metrics.jsonl")


def denoise_command(inputs: Path, output: Path) -> tuple:
    arguments = ["--model", inputs / "unet.pth", "--data", inputs / "tree", "--noise", "shot3", "--workers", "2"]
    return denoise.main, [*arguments, "--output", output / "denoised"], output / "denoised", same_bytes()


def train_command(inputs: Path, output: Path) -> tuple:
    return train, settings(inputs / "tree", output / "run"), output / "run", teacher


def evaluate_command(name: str, module, inputs: Path, output: Path) -> tuple:
    run = output / "run"
    if not run.exists():
        shutil.copytree(inputs / "run", run)
    evaluate = partial(common.run, name, module.evaluate, "", lambda cfg: [cfg])
    return evaluate, [f"run={run}", "checkpoints=all", "eval.knn.k=[3]"], run, rows


def export_command(inputs: Path, output: Path) -> tuple:
    arguments = [f"run={inputs / 'run'}", "format=huggingface", f"output={output / 'model'}"]
    return lambda argv: None if (output / "model").exists() else export.main(argv), arguments, output, same_bytes()


def report_command(inputs: Path, output: Path) -> tuple:
    return report.main, [inputs / "run", "--output", output / "report.html"], output, same_bytes()


COMMANDS = {
    "generate_noise": noise_command, "Neighbor2Neighbor.train": denoiser_command,
    "Neighbor2Neighbor.denoise": denoise_command, "dinov2.train": train_command,
    "dinov2.eval.knn": partial(evaluate_command, "knn", knn),
    "dinov2.eval.linear": partial(evaluate_command, "linear", linear),
    "dinov2.export": export_command, "utils.report": report_command,
}  # fmt: skip


@pytest.mark.parametrize("tool", COMMANDS)
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(tool, inputs, tmp_path):
    moments = random.Random(tool)
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()

    def start(folder: Path) -> tuple[int, Path, Callable]:
        main, arguments, result, read = COMMANDS[tool](inputs, folder)
        return killing.start(main, [str(word) for word in arguments], tmp_path / "log"), result, read

    begun = time.monotonic()
    child, result, read = start(tmp_path / "whole")
    assert killing.end(child) == 0, (tmp_path / "log").read_text()
    seconds, expected = time.monotonic() - begun, read(result)
    kills = ends = 0
    while kills < KILLS:
        child, result, read = start(tmp_path / "killed")
        time.sleep(moments.uniform(0, 0.9 * seconds))
        code = killing.end(child, signal.SIGKILL)
        kills += code == -signal.SIGKILL
        if code == 0:  # it was faster, or had little left to do: the next one begins anew, and is killed sooner
            assert read(result) == expected
            shutil.rmtree(tmp_path / "killed")
            (tmp_path / "killed").mkdir()
            ends, seconds = ends + 1, 0.8 * seconds
        assert code in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
    child, result, read = start(tmp_path / "killed")
    assert killing.end(child) == 0, (tmp_path / "log").read_text()
    assert read(result) == expected
    assert not [path for path in (tmp_path / "killed").rglob(".*") if ".tmp-" in path.name or path.name == ".lock"]
    print(f"{tool}: {kills} kills met a living process, {ends} came too late; all ends were equal", file=sys.stderr)
