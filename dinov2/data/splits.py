"""Train and val of a folder that has none, and labels from a CSV: data.val, data.group, data.labels, data.split_seed.

val      fraction of the images for val, drawn once, class by class, from the seed and the paths; images of a train
         folder are divided likewise. Without it all images are train, except those of a val folder.
group    images that must stay together: "folder" (of a patient, say), a column of the CSV, or a regular expression,
         whose first group or whole match in the path is the group's name
labels   CSV of path,label[,split], with paths below the data folder; without one, the folders are the classes, if there
         are at least two, they hold all images, and they are not the groups
An image without a label in the CSV has the label -1: it is used for pretraining, not for evaluation.
"""

import csv
import hashlib
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from utils.readers import file_of

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Layout:
    """The four keys, data.stack and data.mixed; by default the folder is taken as it is."""

    val: float | None = None
    group: str | None = None
    labels: str | None = None
    seed: int = 0
    stack: str = "refuse"
    only: int | None = None  # keep only images of this many channels (data.mixed=keep); None: all

    @property
    def drawn(self) -> bool:
        """Whether a key asks for another split, group or label than the folders give."""
        return (self.val, self.group, self.labels) != (None, None, None)


def has_splits(root: Path | str) -> bool:
    return any(Path(root, split).is_dir() for split in SPLITS)


def assign(root: Path, relatives: list[str], layout: Layout) -> tuple[list[str], np.ndarray, list[str]]:
    """Split and class number (int64, -1: unknown) of each image, and the sorted names of the classes.

    ValueError: a CSV with rows that are duplicate, wrong or of no image; a group in both splits, an image without one;
    a fraction that leaves train or val empty, or one beside a val folder.
    """
    if layout.val is not None and (root / "val").is_dir():
        raise ValueError(f"data.val={layout.val}, but {root} has a val folder: leave one of them out")
    rows = _read_csv(root, relatives, layout.labels) if layout.labels else {}
    names = _class_names(root, relatives, layout, rows)
    number = {name: place for place, name in enumerate(sorted(set(names) - {""}))}
    labels = np.array([number.get(name, -1) for name in names], np.int64)
    groups = _group_names(root, relatives, layout.group, rows) if layout.group else None
    if groups is None and layout.stack == "pages":
        groups = [file_of(relative) for relative in relatives]  # pages of one file are nearly the same image
    splits = _given_splits(root, relatives, layout, rows)
    if splits is not None and groups is not None:
        _check_groups(root, groups, splits)
    if splits is None:
        splits = _draw_splits(relatives if groups is None else groups, labels if groups is None else labels * 0, layout)
        if not set(SPLITS) <= set(splits):
            count = len(set(groups or relatives))
            parts = f"{count} {'groups' if groups else 'images'}"
            raise ValueError(f"data.val={layout.val} of {parts} leaves a split of {root} empty: give another fraction")
    return splits, labels, list(number)


# --- the CSV --------------------------------------------------------------------------------------------------------
def _read_csv(root: Path, relatives: list[str], name: str) -> dict[str, dict[str, str]]:
    """The row of each path that the CSV names."""
    path = find_csv(root, name)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            lines = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data.labels={name} cannot be read ({error}): give a CSV of path,label[,split]") from None
    if not lines or "path" not in lines[0][1] or not {"label", "split"} & set(lines[0][1]):
        raise ValueError(f"{path} must begin with the line path,label or path,label,split, and hold a row per image")
    rows, known = {}, {file_of(relative) for relative in relatives} | set(relatives)
    for line, row in lines:
        if None in row or None in row.values():
            raise ValueError(f"{path}, line {line}: it has not as many columns as the first line")
        relative = path_in_row(row)
        if relative in rows:
            raise ValueError(f"{path}, line {line}: {relative} stands there twice; leave one row")
        if row.get("split", "").strip() not in ("", *SPLITS):
            raise ValueError(f"{path}, line {line}: split {row['split']!r} is neither train nor val")
        rows[relative] = {key: value.strip() for key, value in row.items()}
    if missing := [relative for relative in rows if relative not in known]:
        raise ValueError(f"{path} names {len(missing)} images that {root} lacks, such as {', '.join(missing[:3])}")
    return rows


def find_csv(root: Path, name: str) -> Path:
    """The CSV that data.labels names: by its path or, where there is none, below the folder of the images."""
    return Path(name) if Path(name).is_file() else root / name


def path_in_row(row: dict[str, str]) -> str:
    """The path of a row of the CSV, as images are named: by slashes, without a dot before them."""
    return PurePosixPath(row["path"].strip().replace("\\", "/")).as_posix()


def _find_row(rows: dict[str, dict[str, str]], relative: str) -> dict[str, str]:
    """The row of an image, or of the file that it is a page of."""
    return rows.get(relative) or rows.get(file_of(relative), {})


# --- one name an image ----------------------------------------------------------------------------------------------
def _class_names(root: Path, relatives: list[str], layout: Layout, rows: dict) -> list[str]:
    """The class of each image; "" where it has none."""
    if layout.labels:
        return [_find_row(rows, relative).get("label", "") for relative in relatives]
    depth = 1 if has_splits(root) else 0  # of the class's folder
    parts = [PurePosixPath(relative).parts[depth:] for relative in relatives]
    names = [part[0] if len(part) > 1 else "" for part in parts]
    return [""] * len(names) if "" in names or len(set(names)) < 2 or layout.group == "folder" else names


def _group_names(root: Path, relatives: list[str], group: str, rows: dict) -> list[str]:
    if group == "folder":
        start = 1 if has_splits(root) else 0  # a patient's folder below train and below val is the same patient
        return ["/".join(PurePosixPath(relative).parts[start:-1]) for relative in relatives]
    if rows and group in next(iter(rows.values())):
        names = [_find_row(rows, relative).get(group, "") for relative in relatives]
    else:
        try:
            found = [re.search(group, relative) for relative in relatives]
        except re.error as error:
            raise ValueError(f"data.group={group} is no column of the CSV, no regular expression: {error}") from None
        names = [(match[1] if match.re.groups else match[0]) or "" if match else "" for match in found]
    if "" in names:
        first = root / relatives[names.index("")]
        raise ValueError(f"data.group={group} gives no name for {names.count('')} images, such as {first}")
    return names


# --- which split ----------------------------------------------------------------------------------------------------
def _given_splits(root: Path, relatives: list[str], layout: Layout, rows: dict) -> list[str] | None:
    """The split of each image by the CSV or by its folder; None if it is to be drawn."""
    if any(row.get("split") for row in rows.values()):
        if layout.val is not None:
            raise ValueError(f"data.val={layout.val}, but {layout.labels} has a column split: leave one of them out")
        return [_find_row(rows, relative).get("split") or "train" for relative in relatives]
    if layout.val is not None:
        return None
    folders = has_splits(root)
    return [relative.partition("/")[0] if folders else "train" for relative in relatives]


def _check_groups(root: Path, groups: list[str], splits: list[str]) -> None:
    parts = [{group for group, own in zip(groups, splits, strict=True) if own == split} for split in SPLITS]
    if both := sorted(parts[0] & parts[1]):
        raise ValueError(
            f"{root}: {len(both)} groups have images in train and in val, such as {', '.join(both[:3])}: "
            "divide them anew, by data.val or by hand"
        )


def _draw_splits(groups: list[str], strata: np.ndarray, layout: Layout) -> list[str]:
    """In each stratum, groups go to val in the order of a keyed hash until they make up the fraction.

    An image that is added later moves at most the groups at the boundary.
    """
    chosen: set[tuple[int, str]] = set()
    keys = list(zip(strata.tolist(), groups, strict=True))
    sizes, members = Counter(keys), defaultdict(list)
    for key in sizes:
        members[key[0]].append(key)
    for own in members.values():
        own.sort(key=lambda key: _hash_group(layout.seed, key[1]))
        wanted = layout.val * sum(sizes[key] for key in own)
        held = 0
        for key in own[:-1]:  # one is left for train
            if held + sizes[key] / 2 > wanted:
                break
            chosen.add(key)
            held += sizes[key]
    return ["val" if key in chosen else "train" for key in keys]


def _hash_group(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}\n{name}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
