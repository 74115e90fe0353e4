"""Every tool killed at random moments, then run once more: the end is that of a run that nobody disturbed.

KILLS=20 python -m pytest -s tests/attack/test_kills.py      prints how many kills met a living process
"""

import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import dinov2.outlook
from dinov2 import checkpoint, export
from dinov2.embed import main as embed
from dinov2.eval import (
    common,
    floors,
    instance_recog,
    knn,
    label_free,
    linear,
    log_regression,
    map,
    pca,
    robustness,
)
from dinov2.pretrain import Plan
from dinov2.pretrain import main as pretrain
from dinov2.run import pipeline
from dinov2.train.__main__ import main as train
from Neighbor2Neighbor import check, denoise
from Neighbor2Neighbor import train as denoiser
from Neighbor2Neighbor.unet import UNet
from tests import killing
from tests.dinov2.eval.conftest import make_run, write_digits
from tests.dinov2.eval.test_instance_recog import write_landmarks
from tests.dinov2.test_pretrain import make_images
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
    """tree/ (images), unet.pth, digits/ and run/ (a finished run on them), scans/ (a flat folder), landmarks/."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tree(folder / "tree", images=12)
    torch.save(UNet(features=8, depth=2).state_dict(), folder / "unet.pth")
    make_run(folder / "run", write_digits(folder / "digits"))
    make_images(folder / "scans")
    write_landmarks(folder / "landmarks")
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


def check_command(inputs: Path, output: Path) -> tuple:
    arguments = [inputs / "tree", "--noise", "gauss50", "--model", inputs / "unet.pth", "--output", output / "check"]
    return check.main, arguments, output / "check", same_bytes()


def evaluate_command(
    name: str, module, inputs: Path, output: Path, settings: str = "", variants=lambda cfg: [cfg], files: tuple = ()
) -> tuple:
    """settings: words of key=value. files: names of the pictures that are compared beside the rows."""
    run = output / "run"
    if not run.exists():
        shutil.copytree(inputs / "run", run)
    evaluate = partial(common.run, name, module.evaluate, "", variants)
    read = (lambda folder: (rows(folder), same_bytes(*files)(folder))) if files else rows
    return evaluate, [f"run={run}", "checkpoints=all", *settings.format(inputs=inputs).split()], run, read


def floors_command(inputs: Path, output: Path) -> tuple:
    arguments = [f"run={inputs / 'run'}", f"output={output}", "evaluators=knn", "eval.knn.k=[3]"]
    return floors.run, arguments, output, lambda folder: {path.name: rows(path) for path in folder.glob("floors/*/*")}


def embed_command(inputs: Path, output: Path) -> tuple:
    table = output / "f.npy"
    arguments = [inputs / "run", inputs / "digits", "--output", table, "--map", output / "map.png"]
    arguments += ["--batch-size", "4", "--workers", "0"]
    names = ("f.npy", "f.names.csv", "map.png", "map.json")
    return lambda argv: None if table.exists() else embed(argv), arguments, output, same_bytes(*names)


def pretrain_command(inputs: Path, output: Path) -> tuple:
    words = "--steps 4 --eval label_free model.depth=1 dino.hidden=16 dino.prototypes=16 ibot.prototypes=16"
    words += " crops.local_number=2 train.precision=fp32"
    run = output / "o/none/nct"
    read = lambda folder: (teacher(run), rows(run), same_bytes("unet.pth", "000.png")(folder))  # noqa: E731
    return pretrain_in_forks, [inputs / "scans", "--output", output / "o", *words.split()], output / "o", read


def pretrain_in_forks(argv: list[str]) -> int:
    """The program without the start of a Python for each of its commands and without the measuring of a plan, which
    cost more than all else here. It leads a group of processes, which is killed as a whole.
    """
    os.setpgid(0, 0)
    pipeline.execute, dinov2.outlook.MEASURED_S = execute_in_a_fork, 0.0
    Plan._ask_denoiser = lambda plan: {"verdict": [], "subsample": 1, "step_s": 0.0, "megapixel_s": 0.0}
    return pretrain(argv)


def execute_in_a_fork(command: list[str]) -> int:
    child, code = os.fork(), 70
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    except SystemExit as exit:
        code = exit.code or 0
    finally:
        os._exit(code)


def export_command(inputs: Path, output: Path) -> tuple:
    arguments = [f"run={inputs / 'run'}", "format=huggingface", f"output={output / 'model'}"]
    return lambda argv: None if (output / "model").exists() else export.main(argv), arguments, output, same_bytes()


def report_command(inputs: Path, output: Path) -> tuple:
    return report.main, [inputs / "run", "--output", output / "report.html"], output, same_bytes()


def evaluator(module, settings: str = "", **more) -> Callable[[Path, Path], tuple]:
    return partial(evaluate_command, module.__name__.rpartition(".")[2], module, settings=settings, **more)


COMMANDS = {
    "generate_noise": noise_command, "Neighbor2Neighbor.train": denoiser_command,
    "Neighbor2Neighbor.denoise": denoise_command, "Neighbor2Neighbor.check": check_command,
    "dinov2.train": train_command, "dinov2.pretrain": pretrain_command, "dinov2.embed": embed_command,
    "dinov2.eval.knn": evaluator(knn, "eval.knn.k=[3]"), "dinov2.eval.linear": evaluator(linear),
    "dinov2.eval.log_regression": evaluator(log_regression, "eval.log_regression.c_number=3"),
    "dinov2.eval.robustness": evaluator(
        robustness, "eval.robustness.noises=[none,gauss50]", variants=robustness.one_per_noise
    ),
    "dinov2.eval.label_free": evaluator(label_free),
    "dinov2.eval.pca": evaluator(pca, files=("pca.png", "pca.npz")),
    "dinov2.eval.map": evaluator(map, files=("map.png", "map.json", "map_thumbs.png")),
    "dinov2.eval.instance_recog": evaluator(
        instance_recog, "eval.retrieval.root={inputs}/landmarks eval.retrieval.sets=[small]",
        variants=instance_recog.one_per_set, files=("small.json",),
    ),
    "dinov2.eval.floors": floors_command, "dinov2.export": export_command, "utils.report": report_command,
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
