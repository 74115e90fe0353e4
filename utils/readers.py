"""Stacks of pages, and formats that the libraries of their field read: a table from ending to reader.

A page is an image of its own, named as its file with the page's number from 0 before the ending, scan#0003.tif; the
largest value over all pages is scan#max.tif. list_images(root, stack) makes such names, read_image() reads them. Pages
are: planes of depth, time or sequence of a TIFF, the first axis of a .npy of [N, H, W] (N, H, W > 4) or [N, H, W, C],
frames of DICOM, leading axes of FITS, slices along the last axes of NIfTI, all axes but height, width and channels of
Zarr, CZI, ND2 and LIF. Values are the physical ones: with the rescaling of DICOM, BSCALE of FITS and the slope of
NIfTI. Rows are as stored: FITS counts them from the bottom.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import reduce
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.array_files import Check, open_tiff
from utils.text import count_of, one_line

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffPageSeries

STACKS = ("refuse", "pages", "max")
_PAGE = re.compile(r"#(\d{4,}|max)(?=(\.\w+){1,2}$)")
_FEW = 4  # a last axis of a three-dimensional .npy up to this is one of channels


class Stack(NamedTuple):
    """An open file: how many pages, the size of each, and the page of a number as stored, [H, W] or [H, W, C]."""

    count: int
    size: tuple[int, int, int]  # height, width, channels, as the header says
    page: Callable[[int], np.ndarray]


def _stack_by_axes(axes: str, shape: tuple[int, ...], read: Callable[[tuple], np.ndarray]) -> Stack:
    """The pages of an array whose axes are named: Y, X, channels C or S; any others are pages, the last the fastest.

    read(index) gives a part of it, as array[index] does.
    """
    if "Y" not in axes or "X" not in axes:
        raise ValueError(f"its axes {axes} {shape} have no height and width")
    lead = [place for place, axis in enumerate(axes) if axis not in "YXCS"]
    rest = "".join(axis for axis in axes if axis in "YXCS")
    sides = dict(zip(axes, shape, strict=True))

    def page(number: int) -> np.ndarray:
        index: list = [slice(None)] * len(axes)
        places = np.unravel_index(number, [shape[place] for place in lead]) if lead else ()
        for place, value in zip(lead, places, strict=True):
            index[place] = int(value)
        plane = np.asarray(read(tuple(index)))  # axes as in `rest`
        order = [rest.index("Y"), rest.index("X"), *(place for place, axis in enumerate(rest) if axis in "CS")]
        return plane.transpose(order).reshape(sides["Y"], sides["X"], -1)

    channels = math.prod(sides[axis] for axis in rest if axis in "CS")
    return Stack(math.prod(shape[place] for place in lead), (sides["Y"], sides["X"], channels), page)


@contextmanager
def _open_tiff(path: Path) -> Iterator[Stack]:
    with open_tiff(path) as file:
        series = file.series[0]
        yield _stack_by_axes(series.axes, series.shape, _part_reader(file, series))


def _part_reader(file: "TiffFile", series: "TiffPageSeries") -> Callable[[tuple], np.ndarray]:
    """read(index) of a series, that reads no more of the file than it must: pages of large stacks are read singly."""
    stored = series.keyframe.shape
    leading = series.shape[: len(series.shape) - len(stored)]
    if series.dataoffset is not None and series.dtype is not None:  # in one piece, as ImageJ writes them
        dtype = np.dtype(file.byteorder + series.dtype.char)
        mapped = file.filehandle.memmap_array(dtype, series.shape, offset=series.dataoffset)
        return lambda index: np.array(mapped[index])
    if math.prod(leading) != len(series.pages):
        return lambda index: series.asarray()[index]

    numbers = np.arange(len(series.pages)).reshape(leading)

    def read(index: tuple) -> np.ndarray:
        chosen = numbers[index[: len(leading)]]
        planes = [series.pages[int(number)] for number in chosen.flat]
        if None in planes:
            raise ValueError("its header names a plane that the file does not hold")
        array = np.stack([plane.asarray() for plane in planes]).reshape(chosen.shape + stored)
        return array[(Ellipsis, *index[len(leading) :])]

    return read


@contextmanager
def _open_npy(path: Path) -> Iterator[Stack]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim == 4 or (array.ndim == 3 and array.shape[2] > _FEW):
        yield Stack(len(array), (*array.shape[1:], 1)[:3], lambda number: array[number])
    else:
        yield Stack(1, (*array.shape, 1, 1, 1)[:3], lambda number: array)


@contextmanager
def _open_dicom(path: Path) -> Iterator[Stack]:
    import pydicom
    from pydicom.pixels import apply_rescale

    file = pydicom.dcmread(path, defer_size="1 MB")
    count = int(file.get("NumberOfFrames") or 1)

    def page(number: int) -> np.ndarray:
        array = pydicom.pixels.pixel_array(path, index=number) if count > 1 else file.pixel_array
        return apply_rescale(array, file)

    yield Stack(count, (file.Rows, file.Columns, int(file.get("SamplesPerPixel") or 1)), page)


@contextmanager
def _open_fits(path: Path) -> Iterator[Stack]:
    from astropy.io import fits

    with fits.open(path, memmap=False) as file:
        planes = [unit for unit in file if unit.is_image and unit.header["NAXIS"] >= 2]
        if not planes:
            raise ValueError("it holds no image of two axes or more")
        shape = planes[0].shape
        yield _stack_by_axes("Z" * (len(shape) - 2) + "YX", shape, lambda index: planes[0].section[index])


@contextmanager
def _open_nifti(path: Path) -> Iterator[Stack]:
    import nibabel

    file: Any = nibabel.load(path)
    shape = file.shape[2:]

    def page(number: int) -> np.ndarray:
        place = np.unravel_index(number, shape[::-1])[::-1]  # slices of the first volume come first
        return np.asarray(file.dataobj[(slice(None), slice(None), *map(int, place))]).T

    yield Stack(math.prod(shape), (file.shape[1], file.shape[0], 1), page)


@contextmanager
def _open_zarr(path: Path) -> Iterator[Stack]:
    import zarr

    opened = zarr.open(path, mode="r")
    axes = ""
    if isinstance(opened, zarr.Group):
        attributes = dict(opened.attrs)
        scales = attributes.get("ome", attributes).get("multiscales")
        if not scales:
            raise ValueError("it is a group without multiscales: name one of its arrays")
        axes = "".join(axis["name"] for axis in scales[0]["axes"]).upper()
        opened = opened[scales[0]["datasets"][0]["path"]]
    # A codec that unpickles would run code of whoever wrote the file.
    if opened.dtype.kind not in "buif" or "pickle" in json.dumps(opened.metadata.to_dict(), default=str).lower():
        raise ValueError(f"it holds {opened.dtype}, or is packed by pickle: only plain numbers are read")
    if not axes:
        axes = {2: "YX", 3: "YXC" if opened.shape[-1] <= _FEW else "ZYX", 4: "ZYXC"}.get(opened.ndim, "")
    yield _stack_by_axes(axes, opened.shape, lambda index: np.asarray(opened[index]))


@contextmanager
def _open_nd2(path: Path) -> Iterator[Stack]:
    import nd2

    with nd2.ND2File(path) as file:
        array = file.to_dask()
        yield _stack_by_axes("".join(file.sizes), array.shape, lambda index: array[index].compute())


@contextmanager
def _open_czi(path: Path) -> Iterator[Stack]:
    import czifile

    with czifile.CziFile(path) as file:
        array = file.asarray()
        axes = file.axes.replace("S", "P").replace("0", "S")  # its S are scenes, its 0 samples of a pixel
        yield _stack_by_axes(axes, array.shape, lambda index: array[index])


@contextmanager
def _open_lif(path: Path) -> Iterator[Stack]:
    from readlif.reader import LifFile

    pages = [
        (one, z, t) for one in LifFile(path).get_iter_image() for t in range(one.dims.t) for z in range(one.dims.z)
    ]

    def page(number: int) -> np.ndarray:
        one, z, t = pages[number]
        return np.stack([np.asarray(one.get_frame(z=z, t=t, c=c)) for c in range(one.channels)], axis=-1)

    first = pages[0][0]
    yield Stack(len(pages), (first.dims.y, first.dims.x, first.channels), page)


class Reader(NamedTuple):
    open: Callable[[Path], AbstractContextManager[Stack]]
    library: str = ""
    extra: str = ""  # of setup.py; empty where the library is a requirement


READERS = {
    ".tif": Reader(_open_tiff), ".tiff": Reader(_open_tiff), ".npy": Reader(_open_npy),
    ".dcm": Reader(_open_dicom, "pydicom", "dicom"),
    ".fits": Reader(_open_fits, "astropy", "fits"), ".fit": Reader(_open_fits, "astropy", "fits"),
    ".fts": Reader(_open_fits, "astropy", "fits"),
    ".zarr": Reader(_open_zarr, "zarr", "zarr"),
    ".nd2": Reader(_open_nd2, "nd2", "microscopy"), ".czi": Reader(_open_czi, "czifile", "microscopy"),
    ".lif": Reader(_open_lif, "readlif", "microscopy"),
    ".nii": Reader(_open_nifti, "nibabel", "nifti"), ".nii.gz": Reader(_open_nifti, "nibabel", "nifti"),
}  # fmt: skip
FIELD_EXTENSIONS = tuple(ending for ending, reader in READERS.items() if reader.library)


def pages_of(root: Path, relative: str, stack: str) -> list[str]:
    """Names of the images in the file root/relative: its own where it holds one page, or cannot be read yet."""
    if stack == "refuse" or not relative.lower().endswith(tuple(READERS)):
        return [relative]
    try:
        with _open_stack(root / relative) as opened:
            count = opened.count
    except (ValueError, OSError):
        return [relative]  # named with the reason when it is read
    if count == 1:
        return [relative]
    path = PurePosixPath(relative)
    ending = path.name[-len(".nii.gz") :] if path.name.lower().endswith(".nii.gz") else path.suffix
    names = ["max"] if stack == "max" else [f"{number:04}" for number in range(count)]
    return [str(path.with_name(f"{path.name.removesuffix(ending)}#{name}{ending}")) for name in names]


def file_of(relative: str) -> str:
    """The file that a page is in: scan.tif of scan#0003.tif; any other name as it is."""
    return _PAGE.sub("", relative)


def place_of(path: Path | str) -> Path:
    """Where an image lies: the file of a page, any other path as it is."""
    path = Path(path)
    return path if path.exists() else path.with_name(file_of(path.name))


def read(path: Path | str, check: Check) -> np.ndarray | None:
    """[H, W, C] as stored, of a page or of a file in a field's own format; None for any other existing file.

    ValueError where the library is missing (it names the extra), where the file is damaged, and for a file of several
    pages of which none is named.
    """
    path = Path(path)
    match = None if path.exists() else _PAGE.search(path.name)
    if match is None and not path.name.lower().endswith(FIELD_EXTENSIONS):
        return None
    with _open_stack(place_of(path)) as opened:
        if match is None and opened.count > 1:
            raise ValueError(
                f"it holds {opened.count} pages; set data.stack of a run and --stack of a tool to pages or max"
            )
        check(*opened.size)
        if match and match[1] == "max":
            array = reduce(np.fmax, map(opened.page, range(opened.count)))
        else:
            number = int(match[1]) if match else 0
            if number >= opened.count:
                raise ValueError(f"its file has {count_of(opened.count, 'page')}")
            array = opened.page(number)
    array = np.asarray(array)
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(f"its page has the shape {array.shape}, not [H, W] or [H, W, C]")
    array = np.atleast_3d(array)
    return array.astype(array.dtype.newbyteorder("="))


@contextmanager
def _open_stack(path: Path) -> Iterator[Stack]:
    """The file's pages. Whatever a library raises is a ValueError."""
    ending = max((ending for ending in READERS if path.name.lower().endswith(ending)), key=len, default="")
    if not ending:
        raise ValueError("no such file")
    reader = READERS[ending]
    try:
        with reader.open(path) as opened:
            yield opened
    except ImportError as error:
        raise ValueError(
            f"{ending} files need {reader.library}: pip install 'noise-robust-dino[{reader.extra}]'"
        ) from error
    except (ValueError, OSError):
        raise
    except Exception as error:  # libraries fail in many ways on a damaged file
        raise ValueError(one_line(error)) from error
