"""A smaller data folder for trials: links to some images of another."""

import csv
from collections import defaultdict
from pathlib import Path, PurePosixPath

from utils.files import atomic_path
from utils.locks import sweep
from utils.readers import file_of


def spread(relatives: list[str], number: int) -> list[str]:
    """About `number` of the images, spread evenly over each folder, at least two per folder."""
    folders = defaultdict(list)
    for relative in sorted({file_of(relative) for relative in relatives}):
        folders[PurePosixPath(relative).parent].append(relative)
    total, chosen = sum(map(len, folders.values())), []
    for names in folders.values():
        count = min(len(names), max(2, -(-number * len(names) // total)))
        chosen += [names[place * len(names) // count] for place in range(count)]
    return chosen


def link(source: Path | str, relatives: list[str], output: Path | str, labels: str | None = None) -> None:
    """Links to the images source/relatives below output, which is renamed when it is whole; one that is there is left.

    labels: a CSV, of which the rows of these images become output/labels.csv.
    """
    source, output = Path(source).resolve(), Path(output)
    if output.exists():
        print(f"{output} is there already; left as it is")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    sweep(output.parent)
    with atomic_path(output) as unfinished:
        for relative in relatives:
            (unfinished / relative).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / relative).symlink_to(source / relative)
        if labels:
            path = Path(labels) if Path(labels).is_file() else source / labels
            _copy_rows(path, set(relatives), unfinished / "labels.csv")
    print(f"{len(relatives)} images in {output}")


def _copy_rows(source: Path, names: set[str], target: Path) -> None:
    with open(source, encoding="utf-8-sig", newline="") as file, open(target, "w", encoding="utf-8", newline="") as out:
        reader = csv.DictReader(file, skipinitialspace=True)
        writer = csv.DictWriter(out, reader.fieldnames or [])
        writer.writeheader()
        writer.writerows(row for row in reader if file_of(row["path"].strip().replace("\\", "/")) in names)
