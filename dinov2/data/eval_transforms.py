"""Transforms for the evaluation of a frozen backbone, on batches of padded canvases, as in DINOv2's linear probe."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinov2.data.augment import Normalize
from dinov2.data.dataset import reduce_sides
from dinov2.data.resample import ATTEMPTS, cut, random_boxes
from utils.images import pillow_values, read_image
from utils.values import configured_rule


class CentreCrop:
    """Resize the shorter side to `resize` pixels (antialiased bicubic), cut the central crop x crop, normalise."""

    def __init__(self, resize: int, crop: int, mean, std):
        if crop > resize:
            raise ValueError(f"eval.crop={crop} is larger than eval.resize={resize}: give a crop of at most that size.")
        self.resize, self.crop, self.normalize = resize, crop, Normalize(mean, std)

    def __call__(self, canvas: Tensor, sizes: Tensor) -> Tensor:
        """canvas [B, C, H, W] uint8 or float32, sizes int [B, 2] -> float32 [B, C, crop, crop]."""
        sizes = sizes.cpu()
        shorter = sizes.amin(1, keepdim=True)
        grid = self.resize * sizes // shorter  # the longer side is rounded down, as torchvision
        offset = torch.round((grid - self.crop) / 2).long()
        boxes = torch.cat((torch.zeros_like(sizes), sizes), 1)
        return self.normalize(cut(canvas, boxes[None], self.crop, grid=grid[None], offset=offset[None]))


CROP_DRAWS = 2 * ATTEMPTS + 3  # numbers that decide a random crop: flip, areas and aspects of the attempts, top, left
FIRST_BOX = [0, 1, 1 + ATTEMPTS, -2, -1]  # those that count if the first attempt fits, as it mostly does


class RandomCrop:
    """One random resized crop (`scale`, aspect 3/4-4/3) and a flip of probability 0.5 per image, normalised."""

    def __init__(self, crop: int, mean, std, scale: tuple[float, float] = (0.08, 1.0)):
        self.crop, self.normalize, self.scale = crop, Normalize(mean, std), scale

    def __call__(self, canvas: Tensor, sizes: Tensor, drawn: Tensor) -> Tensor:
        """canvas [B, C, H, W] uint8 or float32, sizes int [B, 2], drawn [B, CROP_DRAWS] -> float32 [B, C, crop, crop].

        drawn: uniform numbers of [0, 1), float64, on the CPU; from `draw_crops` or `spread_crops`.
        """
        boxes = random_boxes(drawn[None, :, 1:], sizes.cpu(), self.scale)
        return self.normalize(cut(canvas, boxes, self.crop, flip=drawn[None, :, 0] < 0.5))


def draw_crops(number: int, generator: torch.Generator) -> Tensor:
    """Independent draws for RandomCrop: [number, CROP_DRAWS]."""
    return torch.rand(number, CROP_DRAWS, generator=generator, dtype=torch.float64)


def spread_crops(number: int, crops: int, generator: torch.Generator) -> Tensor:
    """Draws for RandomCrop: [crops, number, CROP_DRAWS]. An image's crops are spread evenly over all possible ones.

    Each single crop has the distribution of `draw_crops`; together the crops of an image follow a Sobol sequence in the
    numbers of the first box, shifted at random for every image (Cranley and Patterson, 1976).
    """
    drawn = torch.rand(crops, number, CROP_DRAWS, generator=generator, dtype=torch.float64)
    points = torch.quasirandom.SobolEngine(len(FIRST_BOX)).draw(crops, dtype=torch.float64)
    drawn[..., FIRST_BOX] = (drawn[0, :, FIRST_BOX] + points[:, None]) % 1
    return drawn


class Preprocess:
    """Prepares images outside a data set for a backbone, as the evaluation of a config does.

    preprocess(images) → float32 [B, C, crop, crop]; images: one or a list of files, Pillow images or arrays [H, W, C]
    (or [H, W]) of values as data.values scales them (weights without a run: uint8, uint16 or floats in [0, 1]).
    ValueError for other channels than the config's.
    """

    def __init__(self, cfg):
        self.channels, self.values = cfg.data.in_chans, configured_rule(cfg.data["values"])
        self.max_side, self.max_pixels = cfg.data.max_side, cfg.data.max_pixels
        self.crop = CentreCrop(cfg.eval.resize, cfg.eval.crop, cfg.data.mean, cfg.data.std)

    def __call__(self, images) -> Tensor:
        images = images if isinstance(images, list | tuple) else [images]
        return torch.cat([self._crop_one(reduce_sides(self._read(image), self.max_side)) for image in images])

    def _read(self, image) -> np.ndarray:
        """[H, W, C], uint8 or float32 in [0, 1]"""
        if isinstance(image, str | Path):
            return read_image(image, self.channels, "native", self.values, self.max_pixels)
        if isinstance(image, Image.Image):
            array = pillow_values(image, self.channels)
            array = np.repeat(array, 3, axis=2) if (array.shape[2], self.channels) == (1, 3) else array
        else:
            array = np.asarray(image)
        array = array[:, :, None] if array.ndim == 2 else array
        if array.ndim != 3 or array.shape[2] != self.channels:
            raise ValueError(f"an image of shape {array.shape}: this backbone takes [H, W, {self.channels}]")
        return self.values(array)

    def _crop_one(self, image: np.ndarray) -> Tensor:
        return self.crop(torch.from_numpy(image).permute(2, 0, 1)[None], torch.tensor([image.shape[:2]]))
