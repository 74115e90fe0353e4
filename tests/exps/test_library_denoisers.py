"""The example of a denoiser by deepinv, where that is installed: from noisy images to a denoised copy."""

import subprocess
import sys

import numpy as np
import pytest

from Neighbor2Neighbor import denoise
from tests.conftest import ROOT
from utils.images import list_images, read_image, write_image


def speckled(root, images=4):
    rng = np.random.default_rng(0)
    for i in range(images):
        speckle = 60 * rng.gamma(4, 0.25, (32, 32, 1))
        write_image(root / f"{i}.png", speckle.clip(1, 255).astype(np.uint8))
    return root


def test_it_learns_from_noisy_images_and_writes_a_copy(tmp_path):
    pytest.importorskip("deepinv", reason="the user installs deepinv: pip install deepinv")
    data, model = speckled(tmp_path / "chips"), tmp_path / "unsure.pth"
    words = ["--data", data, "--output", model, "--values", "log", "--steps", "30", "--batch-size", "2"]
    subprocess.run([sys.executable, ROOT / "exps/deepinv_denoiser.py", *words], check=True)
    options = ["--denoiser", "exps.deepinv_denoiser:Unsure", "--model", str(model), "--values", "log"]
    denoise.main(["--data", str(data), "--noise", "none", *options, "--output", str(tmp_path / "copy")])
    copies = list_images(tmp_path / "copy")
    assert len(copies) == 4
    before, after = read_image(data / "0.png", 1), read_image(tmp_path / "copy" / copies[0], 1)
    assert after.shape == before.shape and after.std() > 0


def test_without_it_the_way_to_it_is_named(tmp_path):
    try:
        import deepinv  # noqa: F401
    except ImportError:
        words = ["--data", speckled(tmp_path / "chips"), "--output", tmp_path / "unsure.pth", "--steps", "1"]
        done = subprocess.run(
            [sys.executable, ROOT / "exps/deepinv_denoiser.py", *words], capture_output=True, text=True
        )
        assert done.returncode == 2 and "pip install deepinv" in done.stderr
