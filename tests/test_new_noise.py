"""The recipe of docs/noise.md for another noise, as it stands there; and names with two levels, all the way through."""

import re

import numpy as np
import pytest

from dinov2.config import load_config
from dinov2.data.dataset import ImageDataset, dataset_from_config
from dinov2.data.loader import make_loader
from Neighbor2Neighbor import data as denoiser_data
from tests.conftest import ROOT
from tests.dinov2.data.trees import make_tree
from utils import generate_noise, noise
from utils.images import read_image
from utils.noise import NoiseSpec, keyed_noise


@pytest.fixture
def recipe(monkeypatch):
    """The class of the page, as if it stood in utils/noise.py."""
    monkeypatch.setattr(noise, "NOISES", dict(noise.NOISES))
    code = re.search(r"## Another noise.*?```python\n(.*?)```", (ROOT / "docs/noise.md").read_text(), re.DOTALL)[1]
    monkeypatch.setattr(noise, "Uniform", None, raising=False)  # so that it goes again
    exec(code, vars(noise))
    return code


def test_the_recipe_is_short_and_true(recipe):
    assert len(recipe.splitlines()) <= 16
    spec, values = NoiseSpec.parse("uniform20"), np.repeat(np.uint8([100, 250]), 30_000).reshape(2, -1)
    noisy = keyed_noise(values, spec, 0, "k").astype(int)
    assert noisy.min() == 80 and noisy[0].max() == 119 and noisy[1].max() == 255
    assert abs(noisy[0].mean() - 99.5) < 5 * 20 / np.sqrt(3 * 30_000) and abs((noisy[1] == 255).mean() - 15 / 40) < 0.02


@pytest.mark.parametrize("name", ["uniform20", "poissongauss20-2", "rayleigh1"])
def test_a_new_noise_is_found_by_its_name_everywhere(recipe, tmp_path, name):
    """Trees on disk, loading (with workers), the denoiser's reading and the configuration; the same bytes in all."""
    root = make_tree(tmp_path / "set")
    assert generate_noise.main(["--source", str(root), "--noise", name, "--workers", "2"]) == 0
    spec = NoiseSpec.parse(name)
    loaded = ImageDataset(root, "train", ("noisy", "clean"), spec)
    for (noisy, clean), relative in zip((loaded[k][0] for k in range(len(loaded))), loaded.relatives, strict=True):
        assert np.array_equal(noisy, read_image(tmp_path / f"noisy_set-{name}" / relative))
        assert np.array_equal(noisy, denoiser_data.read_noisy(root, relative, spec, 0)) and (noisy != clean).any()
    batch = next(make_loader(loaded, 4, workers=1))
    first = loaded[int(batch.indices[0])][0][0]
    assert np.array_equal(batch.canvases[0][0].permute(1, 2, 0)[: first.shape[0], : first.shape[1]], first)
    arguments = ["imagenet100", "nct", f"data.root={root}", "output_dir=runs/x", f"noise={name}"]
    cfg = load_config([*arguments, f"anchor.weights.{name}=1.5", f"eval.robustness.noises=[none,{name}]"])
    assert cfg.anchor.weights[name] == 1.5 and cfg.eval.robustness.noises[1] == name
    assert str(dataset_from_config(cfg, "train", ("noisy",)).noise) == name
