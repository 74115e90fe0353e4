"""Small folders of real files for the tests of the data path."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, height: int, width: int) -> np.ndarray:
    """A uint8 image [H, W, 3] with smooth parts and sharp edges."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BILINEAR)).copy()
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return image


def make_tree(root: Path, classes=("ant", "bee"), splits=("train", "val"), count=3, size=(24, 32), suffix=".png"):
    """root/<split>/<class>/<k>, images of slightly different sizes."""
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                image = picture(100 * number + k, size[0] + 2 * k, size[1] - number)
                Image.fromarray(image).save(folder / f"{k}{suffix}")
    return root


def write_twins(source: Path, target: Path, change) -> None:
    """The tree `target`: every image of source as PNG, changed by change(image, relative path)."""
    for path in sorted(source.rglob("*.*")):
        if path.is_file() and not path.name.startswith("."):
            relative = path.relative_to(source)
            out = (target / relative).with_suffix(".png")
            out.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(change(np.asarray(Image.open(path).convert("RGB")), relative.as_posix())).save(out)
