"""Block-wise masks of iBOT, as the public DINOv2 draws them (BEiT's scheme).

A mask is one Python integer, bit row * width + column: a block is a shifted constant, the overlap a population count.
The same random.Random stream gives the masks of the published code, about five times faster.
"""

import math
import random
from functools import cache

import numpy as np

MIN_PATCHES = 4  # smallest area aimed at by one block
MIN_ASPECT = 0.3  # height / width of a block, log-uniform from this to its inverse
ATTEMPTS = 10  # blocks tried before a mask stays below its target


def sample_masks(
    n_crops: int,
    grid: tuple[int, int],
    mask_probability: float,
    mask_ratio: tuple[float, float],
    generator: random.Random,
) -> np.ndarray:
    """Masks of n_crops global crops of grid (height, width) patches: bool [n_crops, height * width], True is masked.

    A fraction mask_probability of the crops, at random, is masked. Their ratios of masked patches are spread evenly
    over mask_ratio: one uniform draw in each of as many equal intervals as there are masked crops. A crop may stay
    below its ratio.
    """
    height, width = grid
    n_masked = int(n_crops * mask_probability)
    edges = np.linspace(mask_ratio[0], mask_ratio[1], n_masked + 1).tolist()
    masks = [0] * n_crops
    for k in range(n_masked):
        target = int(height * width * generator.uniform(edges[k], edges[k + 1]))
        masks[k] = _draw_mask(target, height, width, generator)
    generator.shuffle(masks)
    n_bytes = (height * width + 7) // 8
    packed = np.frombuffer(b"".join(mask.to_bytes(n_bytes, "little") for mask in masks), dtype=np.uint8)
    bits = np.unpackbits(packed.reshape(n_crops, n_bytes), axis=1, bitorder="little")
    return bits[:, : height * width].astype(bool)


def _draw_mask(target: int, height: int, width: int, generator: random.Random) -> int:
    """Blocks added until `target` patches are masked, or no further block fits."""
    mask, count = 0, 0
    while count < target:
        added = _add_block(mask, min(target - count, height * width // 2), height, width, generator)
        if added == mask:
            break
        mask, count = added, added.bit_count()
    return mask


def _add_block(mask: int, limit: int, height: int, width: int, generator: random.Random) -> int:
    """The mask plus one random block of at most `limit` new patches; the same mask if no attempt succeeds."""
    log_aspect = math.log(MIN_ASPECT)
    for _ in range(ATTEMPTS):
        area = generator.uniform(MIN_PATCHES, limit)
        aspect = math.exp(generator.uniform(log_aspect, -log_aspect))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top, left = generator.randint(0, height - h), generator.randint(0, width - w)
        block = _block_at_origin(h, w, width) << (top * width + left)
        if 0 < (block & ~mask).bit_count() <= limit:
            return mask | block
    return mask


@cache
def _block_at_origin(h: int, w: int, width: int) -> int:
    """h x w patches at the top left of a grid of that width."""
    return sum(((1 << w) - 1) << (row * width) for row in range(h))
