"""A smaller data folder for trials: links to some images of another."""

import csv
import io
from collections import defaultdict
from pathlib import Path, PurePosixPath

from dinov2.data.splits import SPLITS, find_csv, path_in_row
from utils.files import atomic_path, write_text
from utils.locks import sweep
from utils.readers import file_of
from utils.sampler import spread_evenly


def spread(relatives: list[str], number: int) -> list[str]:
    """About `number` of the images, spread evenly over each folder, at least two per folder.

    Of very many folders so many are taken, spread evenly too: the same ones of train and of val.
    """
    folders = defaultdict(list)
    for relative in sorted({file_of(relative) for relative in relatives}):
        folders[PurePosixPath(relative).parent].append(relative)
    classes = sorted({_outside_split(folder) for folder in folders})
    kept = {classes[place] for place in spread_evenly(len(classes), max(2, number // 2))}
    taken = [names for folder, names in folders.items() if _outside_split(folder) in kept]
    total, chosen = sum(map(len, taken)), []
    for names in taken:
        count = min(len(names), max(2, -(-number * len(names) // total)))
        chosen += [names[place * len(names) // count] for place in range(count)]
    return chosen


def _outside_split(folder: PurePosixPath) -> PurePosixPath:
    return PurePosixPath(*folder.parts[1:]) if folder.parts and folder.parts[0] in SPLITS else folder


def link(source: Path | str, relatives: list[str], output: Path | str, labels: str | None = None) -> None:
    """Links to the images source/relatives below output, which is renamed when it is whole; one that is there is left.

    labels: a CSV, of which the rows of these images become output/labels.csv.
    ValueError where output is there and does not link to these images.
    """
    source, output = Path(source).resolve(), Path(output)
    if output.exists():
        if wrong := next((name for name in relatives if not _links_to(output / name, source / name)), None):
            raise ValueError(f"{output} links to other images: {wrong} is not that of {source}; remove {output}")
        print(f"{output} is there already; left as it is")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        sweep(output.parent)
        with atomic_path(output) as unfinished:
            for relative in relatives:
                (unfinished / relative).parent.mkdir(parents=True, exist_ok=True)
                (unfinished / relative).symlink_to(source / relative)
        print(f"{len(relatives)} images in {output}")
    if labels:
        target, rows = output / "labels.csv", _choose_rows(find_csv(source, labels), set(relatives))
        if not target.is_file() or target.read_bytes() != rows.encode():  # they may have been corrected
            write_text(target, rows)


def _links_to(link: Path, target: Path) -> bool:
    return link.is_symlink() and link.readlink() == target


def _choose_rows(source: Path, names: set[str]) -> str:
    with open(source, encoding="utf-8-sig", newline="") as file:
        reader, chosen = csv.DictReader(file, skipinitialspace=True), io.StringIO(newline="")
        writer = csv.DictWriter(chosen, reader.fieldnames or [])
        writer.writeheader()
        writer.writerows(row for row in reader if file_of(path_in_row(row)) in names)
    return chosen.getvalue()
