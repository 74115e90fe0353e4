"""MNIST as tensors that stay in memory: from a folder of idx files, a download, or scikit-learn's digits."""

from __future__ import annotations

import gzip
import socket
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIDE = 28
CACHE = Path(__file__).resolve().parents[1] / ".data"  # where a download goes, and where MNIST is looked for
NETWORK_TIMEOUT = 20.0  # seconds without an answer before a mirror counts as unreachable
FILES = (
    "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte",
)  # fmt: skip


@dataclass(frozen=True)
class Digits:
    """A whole data set. Images: uint8 [N, 28, 28], labels: int64 [N] in 0..9."""

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def read_idx(path: Path, dims: int) -> np.ndarray:
    """A uint8 array of `dims` dimensions from an idx file, gzipped when the name ends in .gz.

    Raises ValueError naming the file when it is no idx file of bytes, has other dimensions, or is cut or too long.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            header = file.read(4 + 4 * dims)
            if header[:4] != bytes((0, 0, 8, dims)) or len(header) < 4 + 4 * dims:
                raise ValueError(f"{path} is not an idx file of {dims}-dimensional bytes, as MNIST's are")
            shape = [int(n) for n in np.frombuffer(header[4:], ">u4")]
            content = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}); download it again") from error
    expected = int(np.prod(shape, dtype=object))
    if len(content) != expected:
        found = f"{len(content)} bytes follow its header where {expected} were announced"
        raise ValueError(f"{path} is truncated or not MNIST: {found}; download it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_mnist(folder: Path | str) -> Digits:
    """MNIST from the four idx files (plain or .gz) in `folder`, or where torchvision puts them under it.

    Raises ValueError when a file is missing or damaged, or when images and labels don't belong together.
    """
    folder = Path(folder)
    arrays = [read_idx(find_file(folder, file), 3 if "images" in file else 1) for file in FILES]
    for (images, labels), part in zip((arrays[:2], arrays[2:]), ("train", "t10k"), strict=True):
        if images.shape[1:] != (SIDE, SIDE) or not len(images):
            size = " x ".join(map(str, images.shape))
            raise ValueError(f"{folder}: {part} images are {size}; MNIST's are N x {SIDE} x {SIDE}")
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {len(images)} {part} images, {len(labels)} {part} labels; use one set's")
        if labels.max() > 9:
            raise ValueError(f"{folder}: {part} labels go up to {labels.max()}; MNIST's are 0 to 9")
    tensors = [torch.from_numpy(array.copy()) for array in arrays]
    return Digits("mnist", tensors[0], tensors[1].long(), tensors[2], tensors[3].long())


def find_file(folder: Path, name: str) -> Path:
    """The path of idx file `name` (plain or .gz) in `folder`, folder/raw or folder/MNIST/raw; ValueError without it."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with MNIST's idx files, or leave --data out")
    for place in (folder, folder / "raw", folder / "MNIST" / "raw"):
        for file in (name, name + ".gz"):
            if (place / file).is_file():
                return place / file
    raise ValueError(f"{folder} holds no MNIST: {name}[.gz] is missing; leave --data out to download it")


def enlarged_digits() -> Digits:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged bilinearly to 28 x 28; every fifth one is a test image.

    The training images are repeated so that an epoch has as many steps as MNIST's: otherwise the recipe hardly trains.
    """
    from sklearn.datasets import load_digits

    small, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(small).float().view(-1, 1, 8, 8) * (255 / 16)  # values 0..16
    images = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear").squeeze(1).round().byte()
    labels = torch.from_numpy(labels).long()
    test = torch.arange(len(images)) % 5 == 0
    times = 60_000 // int((~test).sum())
    train_images, train_labels = images[~test].repeat(times, 1, 1), labels[~test].repeat(times)
    return Digits("digits", train_images, train_labels, images[test], labels[test])


def load_digits_or_mnist(data: str | None = None, cache: Path = CACHE) -> Digits:
    """The data set that --data names: a folder of idx files, "digits" for scikit-learn's, or None.

    None: MNIST in cache/mnist, or downloaded to `cache` by torchvision, or, without a network and said loudly on
    stderr, scikit-learn's digits. Raises ValueError for a folder without whole MNIST files.
    """
    if data == "digits":
        return enlarged_digits()
    if data is not None:
        return read_mnist(data)
    if (cache / "mnist").is_dir():
        return read_mnist(cache / "mnist")
    try:
        download(cache)
    except (OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[-1]  # torchvision's first lines name mirrors
        print(
            f"WARNING: THE FIGURES BELOW ARE NOT MNIST'S: it could not be downloaded ({reason}), so scikit-learn's "
            "1,797 digits, enlarged to 28 x 28, stand in for it; give a folder of MNIST's idx files with --data.",
            file=sys.stderr,
        )
        return enlarged_digits()
    return read_mnist(cache)


def download(cache: Path) -> None:
    """Downloads MNIST to cache/MNIST/raw unless it is there. OSError or RuntimeError when no mirror answers."""
    from torchvision.datasets import MNIST

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        MNIST(str(cache), download=True)
    finally:
        socket.setdefaulttimeout(before)
