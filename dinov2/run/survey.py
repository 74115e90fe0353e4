"""What a folder of images holds, looked at before anything is decided: how many, how large, of which values and labels.

All files are listed, and a sample of SAMPLE of them, spread evenly over the sorted list, is opened. Then as many of all
are read as READ_S allows: a broken one is named now, not in the midst of a training.
"""

import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dinov2.data.index import Index, build_index, has_images
from dinov2.data.splits import SPLITS, Layout, has_splits
from utils import values
from utils.images import MAX_PIXELS, ImageError, of_channels, own_shape, read_image
from utils.sampler import spread_evenly

SAMPLE = 64
READ_S = 5.0  # seconds
LEAST = 16  # images: two batches of eight, each image compared with the others
SMALLEST = 16  # px of the shorter side: two patches of eight


@dataclass(frozen=True)
class Survey:
    """What was found. Sizes in pixels of the files."""

    root: str
    layout: Layout
    train: Index
    val: Index | None
    looked_at: int
    shapes: Counter  # (height, width) -> images of the sample
    channels: int
    deep: bool  # more than 8 bits
    rule: values.Values
    max_pixels: int  # of a file; one that claims more is refused
    notes: tuple[str, ...]  # sentences for the plan

    @property
    def count(self) -> int:
        return len(self.train.relatives) + (len(self.val.relatives) if self.val else 0)

    @property
    def relatives(self) -> list[str]:
        return [*self.train.relatives, *(self.val.relatives if self.val else [])]

    def read(self, relative: str) -> np.ndarray:
        """An image as the runs will read it: [H, W, C], uint8 or float32 in [0, 1]."""
        return read_image(Path(self.root, relative), self.channels, "native", self.rule, self.max_pixels)

    @property
    def labelled(self) -> bool:
        return bool((self.train.labels >= 0).any())

    @property
    def side(self) -> int:
        """Median of the shorter sides."""
        return int(np.median([min(shape) for shape, number in self.shapes.items() for _ in range(number)]))

    @property
    def pixels(self) -> float:
        """Mean number of an image."""
        return sum(h * w * number for (h, w), number in self.shapes.items()) / self.looked_at


def look_at(
    root: str, layout: Layout, channels: str | None, text: str, max_pixels: int = MAX_PIXELS, cache: str | None = None
) -> Survey:
    """Looks at a folder of images. ValueError, which names the way out, where nothing can be trained on it.

    channels: "majority" or a number: images of other channels are left out; None: all must have the same.
    text: the rule of data.values. cache: data.index_cache.
    """
    notes = [*_describe_unread_folders(root)]
    train, val, layout = _list_splits(root, layout, notes, cache)
    relatives = [*train.relatives, *(val.relatives if val else [])]
    if len(relatives) < LEAST:
        images = "one image" if len(relatives) == 1 else f"{len(relatives)} images"
        raise ValueError(f"{root} holds {images}: training compares images with each other, give at least {LEAST}")
    sample = [relatives[i] for i in spread_evenly(len(relatives), SAMPLE)]
    shapes, layout = _read_shapes(root, sample, layout, channels, len(relatives), notes)
    if layout.only is not None:
        relatives, left_out = of_channels(root, relatives, layout.only)
        train, val, _ = _list_splits(root, layout, [], cache)
        shapes = {name: shape for name, shape in shapes.items() if _is_readable_as(shape[2], layout.only)}
        notes.append(left_out)
    number = layout.only or max(shape[2] for shape in shapes.values())
    rule, reason = values.resolve(text, root, train.relatives, number, max_pixels)
    deep = rule.kind != "full" or values.is_deep(root, train.relatives, number, max_pixels)
    counts = Counter(shape[:2] for shape in shapes.values())
    sentences = tuple(filter(None, [*notes, reason]))
    found = Survey(root, layout, train, val, len(shapes), counts, number, deep, rule, max_pixels, sentences)
    if found.side < SMALLEST:
        small = f"images of {found.side} px per side are too small for crops"
        raise ValueError(f"{root}: {small}: enlarge them to {SMALLEST} px or more")
    _read_all(found)
    return found


def _describe_unread_folders(root: str) -> list[str]:
    """A sentence on what lies beside train/ and val/, and is not read."""
    if not has_splits(root):
        return []
    with os.scandir(root) as entries:
        others = sorted(entry.name for entry in entries if entry.is_dir() and entry.name not in SPLITS)
    others = [name for name in others if not name.startswith(".")]
    return [f"not read, as it lies beside train/ and val/: {', '.join(others[:5])}"] if others else []


def _list_splits(root: str, layout: Layout, notes: list[str], cache: str | None) -> tuple[Index, Index | None, Layout]:
    """Train and val. Of labelled images without val a tenth is drawn, as nothing could be evaluated else."""
    train = build_index(root, "train", cache, layout)
    if has_images(root, "val", cache, layout):
        return train, build_index(root, "val", cache, layout), layout
    if layout.val is None and (train.labels >= 0).any():
        drawn = replace(layout, val=0.1)
        with suppress(ValueError):  # a CSV that has all as train, or too few groups
            train, val = (build_index(root, split, cache, drawn) for split in SPLITS)
            notes.append("val: a tenth of the images is drawn, as there are labels and no val images (--val FRACTION)")
            return train, val, drawn
    return train, None, layout


def _read_shapes(
    root: str, sample: list[str], layout: Layout, channels: str | None, total: int, notes: list[str]
) -> tuple[dict[str, tuple[int, int, int]], Layout]:
    """(height, width, channels) of the sample by name, and the layout, which keeps one number of channels where asked.

    ValueError for files that cannot be read, and for mixed channels where nothing says which ones to keep.
    """
    shapes, errors = {}, []
    for name in sample:
        try:
            shapes[name] = own_shape(Path(root, name))
        except ImageError as error:
            errors.append(str(error))
    if errors:
        some, can = (f"{len(errors)}", "cannot") if shapes else ("none", "can")
        looked_at = f"{some} of the {len(sample)} files looked at {can} be read"
        raise ValueError(f"{root}: {looked_at}, the first: {errors[0]}")
    counts = Counter(shape[2] for shape in shapes.values())
    if channels is not None:
        wanted = counts.most_common(1)[0][0] if channels == "majority" else int(channels)
        mixed = not all(_is_readable_as(number, wanted) for number in counts)
        return shapes, replace(layout, only=wanted) if mixed or channels != "majority" else layout
    if len(counts) > 1 and set(counts) != {1, 3}:
        first = {number: next(name for name, shape in shapes.items() if shape[2] == number) for number in counts}
        found = ", ".join(f"{count} of {number} (such as {first[number]})" for number, count in counts.most_common())
        found += f", by {len(sample)} of {total} images"
        way = "--channels majority keeps the most frequent ones, --channels N those of N"
        raise ValueError(f"{root} mixes images of several channel counts: {found}; {way}")
    if set(counts) == {1, 3}:
        notes.append(f"channels: {counts[1]} grey and {counts[3]} colour images of {len(sample)}: all are read as RGB")
    return shapes, layout


def _read_all(survey: Survey) -> None:
    """ValueError for files that cannot be read, by all that READ_S allows, in a fixed order that mixes the folder."""
    errors, relatives, end, count = [], survey.relatives, time.monotonic() + READ_S, 0
    for place in np.random.default_rng(0).permutation(len(relatives)):
        count += 1
        try:
            survey.read(relatives[place])
        except ImageError as error:
            errors.append(str(error))
        if time.monotonic() > end:
            break
    if errors:
        found = f"{len(errors)} of the {count} files read are of no use"
        raise ValueError(f"{survey.root}: {found}, the first: {min(errors)}")


def _is_readable_as(found: int, wanted: int) -> bool:
    """Whether an image of so many channels can be read with the number that is wanted."""
    return found == wanted or {found, wanted} == {1, 3}


def mean_and_std(survey: Survey) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, over 16 training images scaled to [0, 1]."""
    relatives, pixels = survey.train.relatives, []
    for i in spread_evenly(len(relatives), 16):
        image = survey.read(relatives[i])
        image = image / np.float32(255) if image.dtype == np.uint8 else image
        pixels.append(image.reshape(-1, survey.channels)[:: -(-image.shape[0] * image.shape[1] // 65536)])
    pooled = np.concatenate(pixels).astype(np.float64)
    std = np.maximum(pooled.std(axis=0), 1e-3)  # of images of one value
    return [round(float(x), 3) for x in pooled.mean(axis=0)], [round(float(x), 3) for x in std]
