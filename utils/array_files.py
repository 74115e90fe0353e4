"""Files that hold more than Pillow reads: .npy, and TIFFs of any number of channels, of 8 bits, 16 bits or float.

They are read as arrays [H, W, C] of the stored numbers. Errors in a file are ValueErrors without its name, which
utils.images adds.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from utils.text import one_line

if TYPE_CHECKING:
    from tifffile import TiffFile

Scale = Callable[[np.ndarray], np.ndarray]  # stored values -> uint8, or float32 in [0, 1]
Check = Callable[[int, int, int], None]  # gets height, width, channels before decoding; ValueError to refuse
_ADVICE = "set data.values of a run and --values of a tool to percentile or range=[lo,hi]"
_STACK = "set data.stack of a run and --stack of a tool to pages or max"
_CHANNEL_AXES = "CSEQI"  # tifffile's letters: channel, sample, wavelength, other, plain sequence of pages


def open_npy(path: Path | str) -> np.ndarray:
    """The array of a .npy file, mapped: only its header is read. ValueError if it is pickled, cut or not a .npy."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # checks the size, and cannot unpickle
    except OSError:
        raise
    except Exception as error:  # NumPy fails in many ways on a damaged header
        raise ValueError(f"it is no whole .npy file of numbers ({one_line(error)})") from error
    if os.path.getsize(path) != array.offset + array.nbytes:
        raise ValueError("it is longer than its header says")
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"its shape is {array.shape}, not [H, W] or [H, W, C]")
    return array


@contextmanager
def open_tiff(path: Path | str) -> "Iterator[TiffFile]":
    """A file open for tifffile. ValueError for what it would only log, such as missing pages of a truncated file."""
    import tifffile  # here, as it loads slowly

    strict, logger = _RaiseErrors(logging.ERROR), logging.getLogger("tifffile")
    logger.addHandler(strict)
    try:
        with tifffile.TiffFile(path) as file:
            yield file
    finally:
        logger.removeHandler(strict)


class _RaiseErrors(logging.Handler):
    """Raises what is logged, but for a single broken tag, which is harmless."""

    def emit(self, record: logging.LogRecord) -> None:
        if "TiffTag" not in (message := record.getMessage()):
            raise ValueError(message)


def read_tiff(path: Path | str, channels: int, check: Check, bands: int = 0) -> np.ndarray | None:
    """The first image of a TIFF, its channels by planes or by pixels as its axes say, turned by its orientation.

    channels: as asked for; for 1 or 3 the alpha of RGBA is dropped. bands: channels that Pillow finds, 0 if it cannot
    read the file. Returns None if Pillow reads all of the file, as it supports more compressions.
    """
    try:
        with open_tiff(path) as file:
            series = file.series[0]
            sides = zip(series.axes, series.shape, strict=True)
            letters, shape = zip(*[(axis, side) for axis, side in sides if axis in "YX" or side > 1], strict=True)
            axes = "".join(letters)
            if bands and (axes == "YX" or (axes == "YXS" and series.dtype == np.uint8 and shape[2] == bands)):
                return None
            colours = series.keyframe.photometric.name  # type: ignore[attr-defined]
            if not _are_planes(axes) or colours not in ("MINISBLACK", "RGB"):
                reason = f"its axes {axes} {shape} of {colours} are no planes of channels, as CYX or YXS"
                raise ValueError(f"{reason}; {_STACK}")
            sizes = dict(zip(axes, shape, strict=True))
            check(sizes.pop("Y"), sizes.pop("X"), *sizes.values() or [1])
            array = series.asarray().reshape(shape)
            orientation = series.keyframe.tags.valueof(274, 1)
    except Exception as error:  # tifffile fails in many ways on a damaged file
        raise ValueError(one_line(error)) from error
    array = array[:, :, None] if axes == "YX" else np.moveaxis(array, axes.index(axes.strip("YX")), -1)
    array = _upright(array, orientation)
    with_alpha = colours == "RGB" and array.shape[2] == 4
    return array[:, :, :3] if with_alpha and channels in (1, 3) else array


def _upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """[H, W, C] upright: the TIFF tag says where the first row and column are, as Pillow reads it."""
    array = array.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else array
    array = array[::-1] if orientation in (3, 4, 7, 8) else array
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


def _are_planes(axes: str) -> bool:
    """Whether axes are those of one image: height, width and at most one of channels, but not depth or time."""
    other = axes.replace("YX", "", 1)
    return "YX" in axes and (not other or (len(other) == 1 and other in _CHANNEL_AXES))


def in_range(array: np.ndarray) -> np.ndarray:
    """Copies an array of a file as an image: uint8 unchanged, else float32 in [0, 1].

    ValueError for floats outside [0, 1] or NaN, and for values that are not uint8, uint16 or float.
    """
    if array.dtype == np.uint8:
        return np.array(array, order="C")
    if array.dtype.kind != "f" and (array.dtype.kind, array.dtype.itemsize) != ("u", 2):
        raise ValueError(f"its values are {array.dtype}; {_ADVICE}")
    image = np.array(array, np.float32, order="C")
    if array.dtype.kind != "f":
        image /= 65535
    if not (image.min() >= 0 and image.max() <= 1):  # also refuses NaN
        raise ValueError(f"its values lie outside [0, 1] (float) or 0..65535 (integer); {_ADVICE}")
    return image
