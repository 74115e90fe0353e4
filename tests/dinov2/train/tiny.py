"""A data set and settings small enough to train whole stages in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SETTINGS = [
    "noise=gauss50",
    "data.workers=0",
    "crops.global_size=16",
    "crops.local_size=8",
    "crops.local_number=2",
    "model.arch=vit_tiny",
    "model.depth=1",
    "model.patch_size=4",
    "model.drop_path=0.2",
    "dino.prototypes=32",
    "dino.hidden=16",
    "dino.bottleneck=8",
    "optim.warmup_epochs=1",
    "teacher.warmup_temp_epochs=1",
    "train.batch_size=4",
    "train.epochs=4",
    "train.epoch_length=3",
    "train.precision=fp32",
    "train.eval_every=2",
    "train.log_every=1",
    "eval.resize=16",
    "eval.crop=16",
    "eval.knn.k=[2]",
]


def make_tree(root: Path, images: int = 6, suffix: str = "") -> Path:
    """root/{train,val}/{a,b}/<n>.png with smooth random images of 20 x 24 pixels."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
                small.resize((24, 20), Image.BICUBIC).save(root / split / name / f"{number}{suffix}.png")
    return root


def settings(data: Path, output: Path, *more: str) -> list[str]:
    return [*SETTINGS, f"data.root={data}", f"output_dir={output}", *more]
