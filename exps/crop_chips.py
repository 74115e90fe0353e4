"""Centre crops of the images of a tree, never resized: radar chips whose size would give their class away.

    python exps/crop_chips.py --source MSTAR-10 --size 64 --output mstar64

SOURCE/{train,test or val}/<class>/<image> → OUTPUT/{train,val}/<class>/<image>.png, grey. Smaller images are refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import cli
from utils.files import atomic_path
from utils.images import list_images
from utils.locks import sweep


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def main() -> None:
    """Writes the tree beside its place and renames it when it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True, help="pixels per side")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    source, output, size = arguments.source, arguments.output, arguments.size
    if output.exists():
        print(f"{output} is there already; left as it is")
        return
    relatives = list_images(source)
    sweep(output.parent)
    with atomic_path(output) as unfinished:
        for relative in relatives:
            split, *rest = Path(relative).parts
            target = unfinished.joinpath("val" if split == "test" else split, *rest).with_suffix(".png")
            with Image.open(source / relative) as image:
                if min(image.size) < size:
                    pixels = f"{image.width} x {image.height} pixels"
                    raise ValueError(f"{source / relative} has {pixels}, below --size {size}")
                target.parent.mkdir(parents=True, exist_ok=True)
                centre_crop(image.convert("L"), size).save(target)
    print(f"{len(relatives)} chips of {size} x {size} pixels in {output}")


if __name__ == "__main__":
    cli.run(main)
