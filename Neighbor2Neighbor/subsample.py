"""Sub-sampling into neighbouring pixels, and the loss built on it (Neighbor2Neighbor, sections 4.1 and 4.2)."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# The 8 ordered pairs of side-by-side pixels of a 2x2 cell numbered 0 1 / 2 3, in the published order.
PAIRS = ((0, 1), (0, 2), (1, 3), (2, 3), (1, 0), (2, 0), (3, 1), (3, 2))


def draw_pairs(image: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One pair for each 2x2 cell of image [B, C, H, W], H and W even. Int64 [B, H / 2, W / 2] in 0..7."""
    batch, _, height, width = image.shape
    assert height % 2 == 0 and width % 2 == 0, image.shape
    return torch.randint(len(PAIRS), (batch, height // 2, width // 2), generator=generator, device=image.device)


def subsample(image: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """g1(image), g2(image): the first and the second pixel of each cell's pair, all channels alike.

    image [B, C, H, W], pairs [B, H / 2, W / 2] -> two of [B, C, H / 2, W / 2].
    """
    batch, channels, height, width = image.shape
    cells = F.pixel_unshuffle(image, 2).view(batch, channels, 4, height // 2, width // 2)
    chosen = _pairs_on(image.device)[pairs]  # [B, H / 2, W / 2, 2]
    first, second = (
        cells.gather(2, chosen[..., k][:, None, None].expand(-1, channels, 1, -1, -1)).squeeze(2) for k in (0, 1)
    )
    return first, second


@cache
def _pairs_on(device: torch.device) -> Tensor:
    """PAIRS, copied to a device once: each copy is waited for."""
    return torch.tensor(PAIRS, device=device)


def neighbor_loss(network: Callable[[Tensor], Tensor], noisy: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The reconstruction term and the regulariser, not yet weighted: loss = first + Lambda * second.

    noisy [B, C, H, W] in [0, 1]; H / 2 and W / 2 must suit the network. Both terms are means over all pixels.
    """
    with torch.no_grad():
        whole1, whole2 = subsample(network(noisy).float(), pairs)
    noisy1, noisy2 = subsample(noisy, pairs)
    difference = network(noisy1).float() - noisy2
    return difference.square().mean(), (difference - (whole1 - whole2)).square().mean()
