"""Noisy images for training: which ones, which crops, in which order.

read_noisy() is the one place where training and denoising read a pixel, and it returns noisy images alone: those of a
noisy tree as they are (noise "none"), or those of a clean tree with their one fixed noise. Everything else is a pure
function of (seed, iteration), so that a killed run goes on with the very crops it would have seen.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.images import MAX_PIXELS, ImageError, image_size, list_images, of_channels, read_image
from utils.noise import NoiseSpec, keyed_noise, noise_key
from utils.progress import progress
from utils.sampler import IterationSampler
from utils.text import count_of
from utils.values import FULL, Values
from utils.workers import start_loader_worker


def read_noisy(
    root: Path, relative: str, spec: NoiseSpec, noise_seed: int, channels: int = 3, values: Values = FULL,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:  # fmt: skip
    """The noisy image [H, W, channels]: uint8, or float32 in [0, 1] where the file has more than 8 bits or is scaled.

    relative: path below the tree's root, train/ or val/ included. values: the rule that scales the file.
    """
    image = read_image(root / relative, channels, "native", values, max_pixels)
    return keyed_noise(image, spec, noise_seed, noise_key(relative))


def read_or_message(read: Callable, *args):
    """What read(*args) returns, or the message of its ImageError: from a worker process the error itself would come
    with the worker's traceback."""
    try:
        return read(*args)
    except ImageError as error:
        return str(error)


def unit_values(images: Tensor) -> Tensor:
    """Images of uint8 as float32 in [0, 1]; float ones as they are."""
    return images if images.is_floating_point() else images.float() / 255


def training_images(
    root: Path, subset: int | None, sides: tuple[int, int] | None, seed: int, stack: str = "refuse",
    channels: int | None = None,
) -> list[str]:  # fmt: skip
    """Relative paths of the images to train on: those in train/ where the tree has such a folder, else all.

    channels: only images that can be read with this number of channels, the others are counted in a printed line;
    None: all. sides: only images whose sides both lie in this range of pixels. subset: how many of them, drawn by the
    seed; None: all.
    """
    relatives = list_images(root, stack)
    relatives = [name for name in relatives if name.startswith("train/")] or relatives
    if channels is not None:
        relatives, left_out = of_channels(root, relatives, channels)
        print(left_out, end="\n" if left_out else "", flush=True)
    if subset is None and sides is None:
        return relatives
    chosen = []
    order = np.random.default_rng(seed).permutation(len(relatives))
    for index in progress(order, desc="choosing images", unit="img"):
        if sides is None or _sides_within(root / relatives[index], sides):
            chosen.append(relatives[index])
        if len(chosen) == subset:
            break
    if not chosen:
        raise ValueError(f"{root}: no image has both sides within {sides[0]}..{sides[1]} px; widen --sides")
    if subset is None and len(chosen) < len(relatives):
        within = f"have both sides within {sides[0]}..{sides[1]} px, the others are left out (--sides)"
        print(f"{root}: {len(chosen)} of {len(relatives)} images {within}", flush=True)
    if subset is not None and len(chosen) < subset:
        raise ValueError(f"{root} offers {count_of(len(chosen), 'image')} for training, fewer than --subset {subset}")
    return sorted(chosen)


def _sides_within(path: Path, sides: tuple[int, int]) -> bool:
    size = image_size(path)
    return min(size) >= sides[0] and max(size) <= sides[1]


def choose_crop(root: Path, relatives: list[str], wanted: int, depth: int, stride: int = 1) -> int:
    """Side of the training crops: `wanted`, less where the images are smaller (by a sample of 64 of them).

    stride: crops are of every stride-th pixel of an image. Sub-sampling halves a crop before the U-Net's `depth`
    poolings, so the side is a multiple of 2^(depth + 1); images smaller than that are padded by reflection. ValueError
    where `wanted` itself is too small for the depth.
    """
    multiple = 2 ** (depth + 1)
    if wanted < multiple:
        fitting = max(1, wanted.bit_length() - 2)
        raise ValueError(
            f"--crop {wanted} is too small for --depth {depth}, which needs crops of at least {multiple} px; "
            f"use --crop {multiple} or --depth {fitting}"
        )
    sample = [relatives[index] for index in np.linspace(0, len(relatives) - 1, 64).astype(int)]
    median = int(np.median([min(image_size(root / relative)) for relative in sample])) // stride
    return max(multiple, min(wanted, median) // multiple * multiple)


class Crops(Dataset):
    """Random crops of noisy images, of every stride-th pixel. Item (index, seed) -> [C, side, side], values as
    read_noisy(), or the message of an ImageError.
    """

    def __init__(
        self, root: Path, relatives: list[str], spec: NoiseSpec, noise_seed: int, side: int, channels: int,
        values: Values = FULL, stride: int = 1, max_pixels: int = MAX_PIXELS,
    ):  # fmt: skip
        self.relatives, self.side, self.stride = relatives, side, stride
        self.read = partial(
            read_noisy, root, spec=spec, noise_seed=noise_seed, channels=channels, values=values, max_pixels=max_pixels
        )

    def __len__(self) -> int:
        return len(self.relatives)

    def __getitem__(self, item: tuple[int, int]) -> Tensor | str:
        index, seed = item
        image = read_or_message(self.read, self.relatives[index])
        if isinstance(image, str):
            return image
        side = self.side * self.stride  # in pixels of the file
        image = pad_reflect(image, max(image.shape[0], side), max(image.shape[1], side))
        rng = np.random.default_rng(seed)
        y, x = (int(rng.integers(size - side + 1)) for size in image.shape[:2])
        crop = image[y : y + side : self.stride, x : x + side : self.stride]
        return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))


def pad_reflect(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """image [H, W, C] padded at the bottom and the right to height x width, by reflection (repeated where small)."""
    padding = (0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)
    return np.pad(image, padding, mode="reflect") if padding[0][1] or padding[1][1] else image


def make_loader(crops: Crops, order: IterationSampler, workers: int, pin: bool) -> DataLoader:
    """One pass of [B, C, side, side], uint8 or, with an image above 8 bits, float32 in [0, 1]; a batch with an
    unreadable image is its message instead. A crop is a function of the seed and the image's place in the stream.
    """
    batches = (
        [(index, order.seed * 2**40 + place) for index, place in zip(indices, order.positions(iteration), strict=True)]
        for iteration, indices in order
    )
    ahead = 4 if workers else None
    return DataLoader(
        crops,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        prefetch_factor=ahead,
        worker_init_fn=start_loader_worker,
    )


def _collate(items: list[Tensor | str]) -> Tensor | str:
    broken = [item for item in items if isinstance(item, str)]
    if broken:
        return broken[0]
    alike = len({item.dtype for item in items}) == 1
    return torch.stack(items if alike else [unit_values(item) for item in items])
