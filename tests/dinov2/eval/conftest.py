"""A real run's folder on scikit-learn's digits: config, and checkpoints of a small ViT with fixed random weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2 import checkpoint
from dinov2.config import load_config, save_run_config
from dinov2.models.vision_transformer import build_backbone
from utils.images import write_image

SETTINGS = [
    "noise=gauss50", "crops.global_size=32", "crops.local_size=16", "data.workers=0",
    "model.arch=vit_tiny", "model.depth=2", "model.patch_size=8", "model.layerscale=0.5",
    "eval.resize=36", "eval.crop=32", "eval.batch_size=32",
    "eval.linear.epochs=2", "eval.linear.epoch_length=10", "eval.knn.k=[3,10]",
]  # fmt: skip


def write_digits(root: Path, train: int = 15, val: int = 8, classes: int = 4) -> Path:
    """root/{train,val}/digit_<d>/<i>.png, 32 x 32 grey written as RGB."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit in range(classes):
        own = digits.images[digits.target == digit][: train + val]
        for i, image in enumerate(own):
            enlarged = Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
            split = "train" if i < train else "val"
            write_image(root / split / f"digit_{digit}" / f"{i}.png", np.asarray(enlarged.convert("RGB")))
    return root


def save_weights(run: Path, model: torch.nn.Module, epoch: int) -> checkpoint.Checkpoint:
    """A complete checkpoint, as training keeps it for evaluation, of 10 iterations an epoch."""
    teacher = {f"backbone.{name}": value for name, value in model.state_dict().items()}
    return checkpoint.save(run, {"iteration": torch.tensor(epoch * 10)}, epoch * 10, epoch, teacher, keep_last=1)


def make_run(folder: Path, data: Path, *settings: str, epochs: tuple[int, ...] = (1, 2)) -> Path:
    cfg = load_config([*SETTINGS, f"data.root={data}", f"output_dir={folder}", *settings])
    save_run_config(cfg, folder)
    for epoch in epochs:
        torch.manual_seed(epoch)
        save_weights(folder, build_backbone(cfg), epoch)
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, digits) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", digits)


@pytest.fixture
def run(tmp_path, finished_run) -> Path:
    """A run of its own with kept checkpoints of epochs 1 and 2."""
    return shutil.copytree(finished_run, tmp_path / "run")
