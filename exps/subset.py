"""A smaller data folder for trials: links to the first N images of each class.

    python exps/subset.py --source imagenette96 --per-class 40 --output runs/imagenette96-40
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import cli
from utils.files import atomic_path
from utils.images import list_images
from utils.locks import sweep


def main() -> None:
    """Links the images of a tree whose class folders have fewer files; the tree is renamed when it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--per-class", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    source, output = arguments.source.resolve(), arguments.output
    if output.exists():
        print(f"{output} is there already; left as it is")
        return
    sweep(output.parent)
    taken: Counter[PurePosixPath] = Counter()
    with atomic_path(output) as unfinished:
        for relative in list_images(source):
            folder = PurePosixPath(relative).parent
            if taken[folder] < arguments.per_class:
                taken[folder] += 1
                (unfinished / folder).mkdir(parents=True, exist_ok=True)
                (unfinished / relative).symlink_to(source / relative)
    print(f"{taken.total()} images of {len(taken)} class folders in {output}")


if __name__ == "__main__":
    cli.run(main)
