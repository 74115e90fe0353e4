"""Trees of twins in work: written in parallel, taken up again after a kill, marked when they are finished.

A tree in work holds .manifest.json (what is being made), a finished one manifest.json. The images in between are whole,
each written atomically, so that a killed run goes on with those that are missing.
"""

import json
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np

from utils import images, locks
from utils.files import write_text
from utils.readers import place_of
from utils.text import count_of

BACKLOG = 32  # images that may wait to be written
UNNAMED = {"values": "full"}  # fields that manifests leave out where they have this value


class TreeWriter:
    """The tree at root, with a twin for each of the images `relatives` of the tree `source`.

    fields: what is made (JSON values), the same when the work is taken up again. missing: the images that have no twin
    yet. ValueError where one of the trees holds the other, or root holds something else: another tree, files that are
    no tree of ours, or twins of images that the source has lost. Nothing is written before begin().
    """

    def __init__(self, source: Path, root: Path, relatives: list[str], fields: dict, format: str):
        check_apart(source, root)
        self.source, self.root = Path(source), Path(root)
        self.relatives, self.fields, self.format = relatives, fields, format
        self.files = images.source_files(source, relatives)
        self._check_claim()
        twins = {self._twin_name(relative): relative for relative in relatives}
        existing = images.existing_images(root)
        if extra := sorted(existing - twins.keys()):
            raise ValueError(f"{root} holds {len(extra)} images that the source lacks, such as {extra[0]}; remove them")
        self.missing = {relative for name, relative in twins.items() if name not in existing}
        self._writing: deque[Future] = deque()

    def _twin_name(self, relative: str) -> str:
        return str(images.twin("", relative, f".{self.format}"))

    def _check_claim(self) -> None:
        begun = images.read_manifest(self.root) or images.read_manifest(self.root, images.BEGUN)
        if begun is None and self.root.exists():
            if not (self.root.is_dir() and all(_is_temporary(path.name) for path in self.root.iterdir())):
                raise ValueError(
                    f"{self.root} exists and was not made by this tool; remove it or choose another output"
                )
        if begun is None:
            return
        begun = UNNAMED | begun
        for key, value in (UNNAMED | self.fields).items():
            if begun.get(key) != value:
                raise ValueError(
                    f"{self.root} was made with {key} {begun.get(key)!r}, not {value!r}; remove it or choose another "
                    "output"
                )

    @contextmanager
    def at_work(self, part: str = "") -> Iterator[bool]:
        """Holds the tree, or this part of it, while it is written; yields what begin() returns."""
        with nullcontext() if self._is_finished() else locks.locked(self.root, part):
            yield self.begin()

    def _is_finished(self) -> bool:
        marks = images.MANIFEST, images.BEGUN  # a kill between the two may have left both
        return not self.missing and [(self.root / mark).exists() for mark in marks] == [True, False]

    def begin(self) -> bool:
        """Claims the folder before the first image is written. Returns False, and says so, where it is finished."""
        self._check_claim()  # once more: another tool may have been quicker
        self._check_twins()
        if self._is_finished():
            self._renew_mark()
            print(f"{self.root} is finished already: {count_of(len(self.relatives), 'image')}", flush=True)
            return False
        self.root.mkdir(parents=True, exist_ok=True)
        _write_json(self.root / images.BEGUN, self.fields)
        (self.root / images.MANIFEST).unlink(missing_ok=True)
        return True

    def _check_twins(self) -> None:
        """ValueError where a finished tree was made from other files: images may have been added, or twins lost."""
        if made := images.read_manifest(self.root):
            kept = [relative for relative in self.relatives if relative not in self.missing]
            if not self.missing or made | images.source_files(self.source, kept) != made:
                images.check_unchanged(self.root, self.files)

    def _renew_mark(self) -> None:
        """Gives a finished tree's mark the time of now where a folder of its source is newer, for which a training
        would refuse the tree: another file may have come. Not where an image is newer.
        """
        mark = self.root / images.MANIFEST
        made = mark.stat().st_mtime
        if images.changed_folders(self.source, self.relatives, made):
            with suppress(OSError):  # a tree of somebody else's
                if all(place_of(self.source / relative).stat().st_mtime <= made for relative in self.relatives):
                    mark.touch()

    def write(self, pool: Executor, relative: str, image: np.ndarray) -> None:
        """Encode and write a twin in a worker. Waits where many are under way; raises what one of them has raised."""
        path = images.twin(self.root, relative, f".{self.format}")
        self._writing.append(pool.submit(images.write_image, path, image, self.format))
        self.wait(BACKLOG)

    def wait(self, backlog: int = 0) -> None:
        """Waits until at most `backlog` twins given to write() are unwritten; raises what a worker has raised, such as
        a full disk."""
        while len(self._writing) > backlog:
            self._writing.popleft().result()

    def finish(self) -> int:
        """Returns the number of twins that are still missing; where it is 0, marks the tree as finished.

        What killed runs left is swept first: the mark comes last of all.
        """
        twins = {self._twin_name(relative) for relative in self.relatives}
        if missing := len(twins - images.existing_images(self.root)):
            return missing
        for leftover in self.root.rglob(".*.tmp-*"):
            leftover.unlink(missing_ok=True)
        _write_json(self.root / images.MANIFEST, self.fields | self.files | {"count": len(self.relatives)})
        (self.root / images.BEGUN).unlink(missing_ok=True)
        return 0


def _is_temporary(name: str) -> bool:
    """Whether a file is a temporary one or a lock of our tools, which say nothing about what else the folder holds."""
    return ".tmp-" in name or name.startswith(locks.NAME)


def check_apart(source: Path | str, target: Path | str) -> None:
    """ValueError where one of two trees is the other or lies inside it: a tool would read what it writes."""
    a, b = Path(source).resolve(), Path(target).resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ValueError(f"{source} and {target} must be separate folders, neither inside the other")


def report_errors(errors: list[str], done: str, unfinished: str) -> int:
    """Prints which images could not be read, a line for each, and returns the exit code."""
    print("\n".join(sorted(errors)), file=sys.stderr)
    print(f"error: {count_of(len(errors), 'image')} could not be {done}; {unfinished} not finished", file=sys.stderr)
    return 2


def _write_json(path: Path, fields: dict) -> None:
    write_text(path, json.dumps(fields, indent=1, sort_keys=True) + "\n")
