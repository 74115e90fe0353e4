"""A smaller data folder for trials: links to the first N images of each class.

python exps/subset.py --source imagenette96 --per-class 40 --output runs/imagenette96-40
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dinov2.run.subset import link
from utils import cli
from utils.images import list_images


def main() -> None:
    """Links the images of a tree whose class folders have fewer files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--per-class", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    taken: Counter[PurePosixPath] = Counter()
    chosen = []
    for relative in list_images(arguments.source):
        folder = PurePosixPath(relative).parent
        if taken[folder] < arguments.per_class:
            taken[folder] += 1
            chosen.append(relative)
    link(arguments.source, chosen, arguments.output)


if __name__ == "__main__":
    cli.run(main)
