"""A small data set in MNIST's file format: ten kinds of bars, so that a probe can learn it."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from toy_mnist.data import FILES


def idx_bytes(array: np.ndarray) -> bytes:
    """The idx file of a uint8 array."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def bars(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n images of 28 x 28 with a bright bar whose row tells the label."""
    labels = np.arange(n, dtype=np.uint8) % 10
    images = np.random.RandomState(seed).randint(0, 40, (n, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 + 2 * label : 6 + 2 * label, 4:24] += 200
    return images, labels


def write_mnist(folder: Path, train: int = 512, test: int = 100, zipped: bool = False) -> Path:
    """Writes the four idx files of such a set."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(FILES, [*bars(train, 0), *bars(test, 1)], strict=True):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))
    return folder


@pytest.fixture
def mnist_folder(tmp_path: Path) -> Path:
    return write_mnist(tmp_path / "mnist")
