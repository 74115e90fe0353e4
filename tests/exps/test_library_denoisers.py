"""The examples of denoisers by other libraries, where these are installed: from noisy images to a denoised copy."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from Neighbor2Neighbor import denoise
from tests.conftest import ROOT
from utils.images import list_images, read_image, write_image

CLASSES = {"deepinv": "Deepinv", "careamics": "StructN2V"}
OPTIONS = [
    ("deepinv", "--steps 60"),
    ("deepinv", "--steps 60 --sigma 0.12"),
    ("careamics", "--steps 200 --mask square --span 3"),
]


def write_noisy(root, images=4):
    """Images of one grey, 32 x 32, under noise of deviation 30."""
    rng = np.random.default_rng(0)
    for i in range(images):
        write_image(root / f"{i}.png", (100 + rng.normal(0, 30, (32, 32, 1))).clip(1, 255).astype(np.uint8))
    return root


def train(library, data, model, *options):
    words = ["--data", data, "--output", model, *options]
    script = ROOT / f"exps/{library}_denoiser.py"
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True)


def denoised(library, data, model, output):
    """Pixels of the copies that the example's denoiser makes: [images, H, W]."""
    options = ["--denoiser", f"exps.{library}_denoiser:{CLASSES[library]}", "--model", str(model)]
    denoise.main(["--data", str(data), "--noise", "none", *options, "--output", str(output)])
    return np.stack([read_image(output / name, 1)[:, :, 0] for name in list_images(output)])


@pytest.mark.parametrize("library, options", OPTIONS)
def test_it_learns_from_noisy_images_and_writes_a_copy(library, options, tmp_path):
    pytest.importorskip(library, reason=f"the user installs {library}: pip install {library}")
    data, model = write_noisy(tmp_path / "chips"), tmp_path / "model.pth"
    done = train(library, data, model, "--batch-size", "4", *options.split())
    assert done.returncode == 0, done.stderr
    copies = denoised(library, data, model, tmp_path / "copy")
    assert copies.shape == (4, 32, 32) and 0 < np.abs(copies.astype(float) - 100).mean() < 15  # before: 24


def test_the_neighbours_of_a_hidden_pixel_are_hidden_too():
    pytest.importorskip("careamics", reason="the user installs careamics: pip install careamics")
    from exps.careamics_denoiser import make_hiding

    batch = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for mask, span in (("none", 1), ("square", 3), ("horizontal", 5)):
        hidden, whole, where = make_hiding(mask, span, 0)(batch)
        assert torch.equal(whole, batch) and 20 < where.sum() < 80
        kernel = torch.ones(1, 1, 1 if mask == "horizontal" else span, span)
        near = F.conv2d(where.float(), kernel, padding="same") > 0  # the pixels, and those that share their noise
        assert torch.equal(hidden != batch, near), mask


@pytest.mark.parametrize("library", CLASSES)
def test_without_it_the_way_to_it_is_named(library, tmp_path):
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    done = train(library, write_noisy(tmp_path / "chips"), tmp_path / "model.pth", "--steps", "1")
    assert done.returncode == 2 and f"pip install {library}" in done.stderr
