"""Build the image lists of data folders ahead of a run; runs build them on first use themselves.

    python process_metadata.py [DIR...]

DIR holds train/ and val/ (or one of them), or images without such folders. Without arguments: the mini-imagenet* and
noisy_mini-imagenet* folders here.
"""

import argparse
from pathlib import Path

from dinov2.data.index import build_index, check_classes
from utils.cli import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="data folders with train/ and val/")
    parser.add_argument("--cache", type=Path, help="folder of the lists (data.index_cache); default: the data folder")
    arguments = parser.parse_args()
    found = [path for pattern in ("mini-imagenet*", "noisy_mini-imagenet*") for path in sorted(Path().glob(pattern))]
    folders = arguments.folders or [path for path in found if path.is_dir()]  # archives may lie beside them
    if not folders:
        raise ValueError("no mini-imagenet* or noisy_mini-imagenet* folder here: name data folders, DIR/{train,val}.")
    for folder in folders:
        splits = [split for split in ("train", "val") if (folder / split).is_dir()]
        check_classes(folder)
        for split in splits or ["train"]:
            index = build_index(folder, split, arguments.cache)
            print(f"{folder}/{split}: {len(index.relatives)} images, {len(index.classes)} classes")
    return 0


if __name__ == "__main__":
    run(main)
