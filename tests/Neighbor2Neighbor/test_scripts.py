"""The two scripts of Neighbor2Neighbor/, run from the places that the published steps run them from."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from Neighbor2Neighbor import denoise, train
from tests.conftest import ROOT
from utils import generate_noise, images
from utils.images import write_image
from utils.noise import ALL_NOISES

SCRIPTS = ROOT / "Neighbor2Neighbor"
SHELL = shutil.which("dash") or "sh"


def sh(script: str, *words, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [SHELL, SCRIPTS / script, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def commands(done: subprocess.CompletedProcess) -> list[tuple[str, list[str]]]:
    """(module, arguments) of the commands that a script printed."""
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line.removeprefix("+ ")) for line in done.stdout.splitlines() if line.startswith("+ ")]
    starts = [max(i for i, word in enumerate(words) if word == "-m") for words in lines]
    return [(words[start + 1], words[start + 2 :]) for words, start in zip(lines, starts, strict=True)]


@pytest.fixture
def source(tmp_path) -> Path:
    for i in range(4):
        image = np.random.default_rng(i).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        write_image(tmp_path / f"mini-imagenet/{'val' if i == 3 else 'train'}/n0/x{i}.png", image)
    return tmp_path / "mini-imagenet"


def test_all_nine_by_default_and_every_command_is_understood(source, tmp_path):
    found = commands(sh("linear_probe_n2n.sh", "--dry-run", "--models", tmp_path / "m", cwd=tmp_path))
    assert [name for name, _ in found] == ["Neighbor2Neighbor.train", "Neighbor2Neighbor.denoise"] * 9
    noises = set()
    for (_, first), (_, second) in zip(found[::2], found[1::2], strict=True):
        trained, denoised = train.parse_arguments(_here(first)), denoise.parse_arguments(second)
        assert trained.noise == denoised.noise and trained.sides == (256, 512) and trained.epochs == 100
        assert Path(trained.data) == denoised.data == source
        assert denoised.model == Path(trained.output, "unet.pth") == tmp_path / f"m/{trained.noise}/denoiser/unet.pth"
        assert denoised.output == tmp_path / f"noisy_mini-imagenet-{trained.noise}-denoised"
        noises.add(trained.noise)
    assert noises == set(ALL_NOISES) and not (tmp_path / "m").exists()


def _here(words: list[str]) -> list[str]:
    """The config's path, which is relative to the project's root, from wherever the tests run."""
    return [str(ROOT / word) if word.endswith("published.yaml") else word for word in words]


def test_it_finds_what_the_published_steps_move_about(source, tmp_path):
    """Noisy copies here or in the folder above are read in place of the clean images, also from a path with a blank."""
    generate_noise.main(["--source", str(source), "--noise", "shot3", "--workers", "0"])
    inner = tmp_path / "Neighbor 2"
    inner.mkdir()
    for cwd, tree in ((inner, tmp_path), (tmp_path, tmp_path)):
        arguments = denoise.parse_arguments(commands(sh("linear_probe_n2n.sh", "--dry-run", "shot3", cwd=cwd))[1][1])
        assert (arguments.data, arguments.noise) == (tree / "noisy_mini-imagenet-shot3", "none")
    done = sh("linear_probe_n2n.sh", "--dry-run", "shot3", "--data", "nowhere/mini-imagenet", cwd=tmp_path)
    assert done.returncode == 2 and "--data DIR" in done.stderr
    done = sh("linear_probe_n2n.sh", "--dyr-run", cwd=tmp_path)
    assert done.returncode == 2 and "unknown option --dyr-run" in done.stderr
    found = commands(sh("linear_probe_n2n.sh", "--dry-run", "shot3", "--gpus", 4, "--", "--steps", 7, cwd=tmp_path))
    assert train.parse_arguments(_here(found[0][1])).steps == 7


def test_it_trains_and_denoises(source, tmp_path):
    words = ["gauss255", "--models", tmp_path / "m", "--", "--sides", 32, 64, "--crop", 32, "--depth", 2, "--steps", 2,
             "--workers", 0]  # fmt: skip
    done = sh("linear_probe_n2n.sh", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tree = tmp_path / "noisy_mini-imagenet-gauss255-denoised"
    assert images.read_manifest(tree)["count"] == 4 and images.list_images(tree) == images.list_images(source)


def test_oxford_and_paris(tmp_path):
    for name in ("roxford5k", "rparis6k"):
        (tmp_path / "datasets" / name / "jpg").mkdir(parents=True)
    found = commands(sh("instance_recog_n2n.sh", "--dry-run", "gauss50", "shot1", "--data", tmp_path, cwd=ROOT))
    assert [name for name, _ in found] == ["Neighbor2Neighbor.denoise"] * 4
    data = [denoise.parse_arguments(words).data for _, words in found]
    assert data == [tmp_path / "datasets" / name / "jpg" for name in ("roxford5k", "rparis6k")] * 2
    done = sh("instance_recog_n2n.sh", "--dry-run", cwd=tmp_path / "datasets" / "roxford5k")
    assert done.returncode == 2 and "jpg is missing" in done.stderr
