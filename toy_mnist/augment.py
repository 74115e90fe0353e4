"""The toy's two augmentations on a whole batch at once: random resized crop, then a random affine map.

They are what torchvision's RandomResizedCrop(28, scale=(0.8, 1)) and RandomAffine(15, translate=(0.1, 0.1),
scale=(0.95, 1.05), shear=10) do to one image at a time: bilinear for the crop, nearest neighbour and black borders for
the affine map. Enlarging a crop is a product with one matrix of weights for each image and axis; the affine map is one
look-up of pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ATTEMPTS = 10  # of torchvision to find a crop that fits; after them the whole image


@dataclass(frozen=True)
class Augmentation:
    """Parameters of B images, in torchvision's terms: pixels, degrees; the affine map turns around the centre."""

    crop: torch.Tensor  # [B, 4] top, left, height, width (whole numbers)
    angle: torch.Tensor  # [B]
    translate: torch.Tensor  # [B, 2] right, down (whole numbers)
    scale: torch.Tensor  # [B]
    shear: torch.Tensor  # [B] along x


def sample_augmentation(n: int, side: int, generator: torch.Generator) -> Augmentation:
    """Draws parameters for n square images of `side` pixels, each from torchvision's distribution."""

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)

    area = side * side * uniform(0.8, 1.0, n, ATTEMPTS)
    ratio = uniform(math.log(3 / 4), math.log(4 / 3), n, ATTEMPTS).exp()
    sizes = torch.stack([(area / ratio).sqrt().round(), (area * ratio).sqrt().round()], -1)  # [n, ATTEMPTS, 2] h, w
    fits = (sizes <= side).all(-1)
    first = fits.byte().argmax(1)  # the first attempt that fits
    size = torch.where(fits.any(1, keepdim=True), sizes[torch.arange(n), first], float(side))  # [n, 2]
    corner = (uniform(0, 1, n, 2) * (side - size + 1)).floor()
    return Augmentation(
        crop=torch.cat([corner, size], 1),
        angle=uniform(-15, 15, n),
        translate=uniform(-0.1 * side, 0.1 * side, n, 2).round(),
        scale=uniform(0.95, 1.05, n),
        shear=uniform(-10, 10, n),
    )


def augment(images: torch.Tensor, parameters: Augmentation) -> torch.Tensor:
    """Applies each image's own parameters. images: float [B, S, S]. Returns float [B, S, S]."""
    side = images.shape[-1]
    top, left, height, width = parameters.crop.float().unbind(1)
    resized = crop_weights(top, height, side) @ images @ crop_weights(left, width, side).mT
    grid = affine_grid(parameters, side)
    return F.grid_sample(resized.unsqueeze(1), grid, mode="nearest", align_corners=False).squeeze(1)


def crop_weights(start: torch.Tensor, length: torch.Tensor, side: int) -> torch.Tensor:
    """Bilinear weights that enlarge a crop to `side` pixels along one axis; its border pixels repeat.

    start, length: float [B]. Returns float [B, S new pixels, S old pixels]; each row sums to 1.
    """
    pixels = torch.arange(side, dtype=torch.float32)
    position = (pixels + 0.5) * (length / side)[:, None] - 0.5  # [B, S], from the crop's corner
    position = torch.minimum(position.clamp_(min=0), length[:, None] - 1) + start[:, None]
    distance = (position[:, :, None] - pixels).abs_()
    return distance.neg_().add_(1).clamp_(min=0)


def affine_grid(parameters: Augmentation, side: int) -> torch.Tensor:
    """Where each output pixel comes from, float [B, S, S, 2] (x, y) in the [-1, 1] of grid_sample.

    Inverse of the forward map of a point p (from the centre): s R(angle) [[1, -tan shear], [0, 1]] p + translate.
    """
    angle, tan = torch.deg2rad(parameters.angle), torch.tan(torch.deg2rad(parameters.shear))
    cos, sin = torch.cos(angle), torch.sin(angle)
    inverse = torch.stack([cos - tan * sin, sin + tan * cos, -sin, cos], 1) / parameters.scale[:, None]  # [B, 4]
    points = torch.arange(side) - (side - 1) / 2
    x = points - parameters.translate[:, :1]  # [B, S], of each output column
    y = points - parameters.translate[:, 1:]  # [B, S], of each output row
    terms = (inverse[:, :, None] * torch.stack([x, y, x, y], 1) * (2 / side)).float()  # [B, 4, S]
    # Planes of x and of y, not pairs: written three times as fast, and read as fast by grid_sample.
    grid = torch.empty(len(terms), 2, side, side)
    torch.add(terms[:, 0, None, :], terms[:, 1, :, None], out=grid[:, 0])
    torch.add(terms[:, 2, None, :], terms[:, 3, :, None], out=grid[:, 1])
    return grid.permute(0, 2, 3, 1)
