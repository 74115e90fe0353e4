"""Transforms of frozen-backbone evaluation on batches of padded canvases, as the public DINOv2's linear probe."""

import torch
from torch import Tensor

from dinov2.data.augment import Normalize
from dinov2.data.resample import ATTEMPTS, cut, random_boxes


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


class RandomCrop:
    """One random resized crop (scale 0.08-1, aspect 3/4-4/3) and a flip of probability 0.5 per image, normalised."""

    def __init__(self, crop: int, mean, std):
        self.crop, self.normalize = crop, Normalize(mean, std)

    def __call__(
        self, canvas: Tensor, sizes: Tensor, generator: torch.Generator, start: int = 0, total: int | None = None
    ) -> Tensor:
        """canvas [B, C, H, W] uint8 or float32, sizes int [B, 2] -> float32 [B, C, crop, crop].

        generator on the CPU; start and total as in Augment.sample: numbers are drawn for all `total` images.
        """
        total = len(sizes) if total is None else total
        drawn = torch.rand(1, total, 2 * ATTEMPTS + 3, generator=generator, dtype=torch.float64)
        drawn = drawn[:, start : start + len(sizes)]
        boxes = random_boxes(drawn[..., 1:], sizes.cpu(), (0.08, 1.0))
        return self.normalize(cut(canvas, boxes, self.crop, flip=drawn[..., 0] < 0.5))
