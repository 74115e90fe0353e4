"""scikit-learn's handwritten digits as a folder of images, the quickstart's data.

    python exps/make_digits.py --output runs/quickstart/digits

1,797 real images of 10 classes, 8 x 8 pixels with 17 grey levels, enlarged to 32 x 32 (bicubic) and written as PNG in
{train,val}/<digit>/. Every fifth image of a class is a validation image: 1,442 train, 355 val.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import cli
from utils.files import atomic_path
from utils.locks import sweep


def main() -> None:
    """Writes the tree beside its place and renames it when it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    arguments = parser.parse_args()
    output = arguments.output
    if output.exists():
        print(f"{output} is there already; left as it is")
        return
    sweep(output.parent)
    digits = load_digits()
    seen = np.zeros(10, dtype=int)
    with atomic_path(output) as unfinished:
        for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            folder = unfinished / ("val" if seen[label] % 5 == 4 else "train") / str(label)
            seen[label] += 1
            folder.mkdir(parents=True, exist_ok=True)
            grey = Image.fromarray(np.round(pixels / 16 * 255).astype(np.uint8))
            grey.resize((arguments.size, arguments.size), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")
    print(f"{len(digits.target)} digits in {output}")


if __name__ == "__main__":
    cli.run(main)
