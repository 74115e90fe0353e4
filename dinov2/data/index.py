"""The list of a data folder's images, classes and labels, built on first use and cached.

The classes of DIR/<split>/<class>/<image> are the sorted folder names. DIR/<split>/<image>, without class folders, is
for pretraining only: its labels are -1. For a folder without train and val, and labels from a CSV, see splits.py.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np

from dinov2.data.splits import SPLITS, Layout, assign, has_splits
from utils.files import write_text
from utils.images import IMAGE_EXTENSIONS, check_collisions, check_file, is_folder, list_images, of_channels
from utils.locks import sweep
from utils.progress import progress
from utils.readers import place_of
from utils.text import list_some

_VERSION = 4  # of the cache file's form and of the extensions that count as images


class MissingSplit(ValueError):
    """A data folder without any image for train or for val."""


@dataclass(frozen=True)
class Index:
    """Images of one split. relatives[i] is the posix path below the data folder ("train/n01440764/img_1.jpg"),
    labels[i] its class number (int64; -1 without classes), classes the sorted class names (empty without classes)."""

    relatives: list[str]
    labels: np.ndarray
    classes: list[str]


def build_index(
    root: Path | str, split: str | None, cache: Path | str | None = None, layout: Layout | None = None
) -> Index:
    """The index of a split: from the cached lists, or by walking the folders when any of them has changed.

    split None: all images below root at any depth, without labels, listed each time.
    A folder has changed if its modification time has; adding, removing or renaming a file sets it. So has a file whose
    pages are listed. cache: folder of the cached lists; None: the data folder itself or, if that is read-only, the
    user's cache (~/.cache). layout: how train and val are made if they are not folders. ValueError names a missing or
    empty split, a class folder without images, images beside class folders, or two images that differ only in their
    extension. Images are not decoded here.
    """
    layout = layout or Layout()
    index = _build(Path(root), split, cache, layout)
    if layout.only is None:
        return index
    kept = _of_channels(str(root), tuple(index.relatives), layout.only)
    own = [place for place, relative in enumerate(index.relatives) if relative in kept]
    return Index([index.relatives[place] for place in own], index.labels[own], index.classes)


@lru_cache(maxsize=2)  # train and val: most files are opened, and a program asks several times
def _of_channels(root: str, relatives: tuple[str, ...], channels: int) -> frozenset[str]:
    return frozenset(of_channels(root, list(relatives), channels)[0])


def _build(root: Path, split: str | None, cache: Path | str | None, layout: Layout) -> Index:
    if split is None:
        relatives = list_images(root, layout.stack)
        return Index(relatives, np.full(len(relatives), -1), [])
    if not root.is_dir():
        raise ValueError(f"{root} is no folder: give a folder of images, with train/ and val/ in it or without")
    if as_it_lies(root, layout):
        return _list_split(root, split, cache, layout.stack)
    parts = [part for part in SPLITS if (root / part).is_dir()] if has_splits(root) else [""]
    indices = [_list_split(root, part, cache, layout.stack, flat=True) for part in parts]
    relatives = [relative for index in indices for relative in index.relatives]
    splits, labels, classes = assign(root, relatives, layout)
    own = [place for place, name in enumerate(splits) if name == split]
    if not own:
        way = f"give data.val=0.1 for a tenth of its images, or DIR/{split}/"
        raise MissingSplit(f"{root} has no {split} images: {way}")
    return Index([relatives[place] for place in own], labels[own], classes)


def has_images(root: Path | str, split: str, cache: Path | str | None = None, layout: Layout | None = None) -> bool:
    """Whether the split has images. ValueError if the folder cannot be listed."""
    if as_it_lies(root, layout or Layout()):
        return Path(root, split).is_dir()
    try:
        return len(build_index(root, split, cache, layout).relatives) > 0
    except MissingSplit:
        return False


def why_no_accuracy(root: Path | str, cache: Path | str | None = None, layout: Layout | None = None) -> str:
    """Why the data gives no accuracies: a split without images, or with none that has a label; "" where it does."""
    for split in SPLITS:
        if not has_images(root, split, cache, layout):
            return f"{root} has no {split} images (data.val=0.1 takes a tenth of a folder that has no split)"
        if not (build_index(root, split, cache, layout).labels >= 0).any():
            return f"{root}/{split} has no labels: accuracies need class folders, or data.labels=FILE.csv"
    return ""


def as_it_lies(root: Path | str, layout: Layout) -> bool:
    """Whether train and val are folders and their folders the classes, because no key says otherwise."""
    return has_splits(root) and not layout.drawn


def _list_split(root: Path, split: str, cache: Path | str | None, stack: str, flat: bool = False) -> Index:
    """The index of the folder root/split ("": of root itself). flat: all images below it, without classes."""
    files = _cache_files(root, split, cache, stack, flat)
    for file in files:
        index = _load_cached(file, root, split, flat)
        if index is not None:
            return index
    times, groups = _walk(root, split, stack, flat)
    index = _make_index(split, groups)
    content = json.dumps({"version": _VERSION, "split": split, "times": times, "groups": groups})
    for file in files:
        try:
            sweep(file.parent)
            write_text(file, content)
            break
        except OSError:
            continue  # read-only: try the next place; without any, the index is built at each start
    return index


def class_names(root: Path | str, split: str) -> list[str]:
    """Sorted names of the class folders of root/split; empty where it has none. ValueError: no such split."""
    folder = Path(root, split)
    if not folder.is_dir():
        raise MissingSplit(f"{root} has no folder {split!r}: expected {root}/{{train,val}}/<class>/<image>.")
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_folder(entry) and not entry.name.startswith("."))


def check_classes(root: Path | str) -> None:
    """ValueError that names the classes which only one of train and val has, where root holds both with classes."""
    if not (Path(root, "train").is_dir() and Path(root, "val").is_dir()):
        return
    train, val = set(class_names(root, "train")), set(class_names(root, "val"))
    parts = [
        f"only in {split}: {list_some(only)}" for split, only in (("train", train - val), ("val", val - train)) if only
    ]
    if train and parts:
        raise ValueError(f"{root}: train and val must have the same class folders; {'; '.join(parts)}.")


def _cache_files(root: Path, split: str, cache, stack: str, flat: bool) -> list[Path]:
    """Paths of the cached list, in order of preference. The list of the data folder itself ("") must not lie in it,
    because writing it would change the folder."""
    whole = not split
    split = f"{split or 'all'}{'-flat' if flat else ''}{'' if stack == 'refuse' else '-' + stack}"
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    named = f"{root.resolve().name}-{name}-{split}.json"
    if cache is not None:
        return [Path(cache, named)]
    own = [] if whole else [root / f".index-{split}.json"]
    return [*own, Path.home() / ".cache" / "noisy_dinov2" / named]


def _walk(root: Path, split: str, stack: str, flat: bool) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Modification times (ns) of all folders read, and of files if their pages are listed; and the images (paths below
    the class folder) of each class, which is "" where there are no class folders, or none are wanted (flat)."""
    classes = [] if flat else class_names(root, split)
    times, groups = {str(PurePosixPath(split)): os.stat(root / split).st_mtime_ns}, {}
    loose = sorted(set(os.listdir(root / split)) - set(classes)) if classes else []
    loose = [name for name in loose if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith(".")]
    if loose:
        raise ValueError(f"{root / split / loose[0]} lies beside class folders: move it into one of them.")
    for name in progress(classes, desc=f"index of {split}", unit="folder") if classes else [""]:
        inner: dict[str, int] = {}
        groups[name] = list_images(root / split / name, stack, inner)
        inner |= {} if stack == "refuse" else _file_times(root / split / name, groups[name])
        times |= {str(PurePosixPath(split, name, path)): time for path, time in inner.items()}
    return times, groups


def _file_times(folder: Path, relatives: list[str]) -> dict[str, int]:
    """Modification times (ns) of the files that these images or pages are in; -1 of one that cannot be looked at."""
    times = {}
    for path in {place_of(folder / relative) for relative in relatives}:
        file = str(path.relative_to(folder))
        times[file] = -1
        with suppress(OSError):  # a broken link is named when it is read
            times[file] = path.stat().st_mtime_ns
    return times


def _make_index(split: str, groups: dict[str, list[str]]) -> Index:
    classes = sorted(groups) if "" not in groups else []
    relatives, labels = [], []
    for label, name in enumerate(classes) if classes else [(-1, "")]:
        folder = "".join(f"{part}/" for part in (split, name) if part)
        relatives += [folder + path for path in groups[name]]
        labels += [label] * len(groups[name])
    check_collisions(relatives)
    return Index(relatives, np.array(labels, dtype=np.int64), classes)


def _load_cached(file: Path, root: Path, split: str, flat: bool) -> Index | None:
    """The cached index; None if it is missing or broken, or the tree has changed since.

    A cache may come with a data folder from elsewhere: it must match the folders that exist, and its paths must stay
    below them.
    """
    try:
        check_file(file)
        content = json.loads(file.read_text())
        if content["version"] != _VERSION or str(PurePosixPath(split)) not in content["times"]:
            return None
        if any(os.stat(root / folder).st_mtime_ns != time for folder, time in content["times"].items()):
            return None
        groups = content["groups"]
        if sorted(groups) != (([] if flat else class_names(root, split)) or [""]):
            return None
        if any(path.startswith("/") or ".." in path.split("/") for paths in groups.values() for path in paths):
            return None
        return _make_index(split, groups)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
