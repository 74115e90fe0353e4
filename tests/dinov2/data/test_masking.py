"""Block-wise masks: recorded from the public DINOv2, their statistics, their bounds."""

import random

import numpy as np
import pytest

from dinov2.data.masking import sample_masks

# One hexadecimal number a crop, bits in raster order: the public DINOv2's MaskingGenerator and collate function, driven
# by the same random.seed, at mask probability 0.5 and ratios 0.1-0.5.
RECORDED = {
    (2026, (7, 9)): ["0", "6033180de8f47a3e", "e070381c221", "f87c01309e0f018", "c060000000001c0", "0", "0", "0"],
    (7, (14, 14)): [
        "0",
        "1f807e07c01f007c01f007c01f007801e0078000001e00180",
        "63018c3030c00000000000001803e00f8030000000000",
        "3301cc07301cc1ff07fc3ff0ff03fc07c03f00000000",
        "0",
        "0",
    ],
}


@pytest.mark.parametrize("seed, grid", RECORDED)
def test_masks_are_the_published_ones(seed, grid):
    recorded = RECORDED[seed, grid]
    masks = sample_masks(len(recorded), grid, 0.5, (0.1, 0.5), random.Random(seed))
    assert masks.dtype == bool and masks.shape == (len(recorded), grid[0] * grid[1])
    assert [f"{int(''.join('01'[bit] for bit in mask), 2):x}" for mask in masks.astype(int)] == recorded


def test_half_of_the_crops_are_masked_with_ratios_spread_evenly():
    generator = random.Random(0)
    draws = [sample_masks(64, (14, 14), 0.5, (0.1, 0.5), generator) for _ in range(40)]
    ratios = np.stack([draw.mean(1) for draw in draws])  # [40, 64]
    assert ((ratios > 0).sum(1) == 32).all()
    masked = np.sort(ratios, 1)[:, 32:]
    # A mask reaches its target or stays a little below it; targets are one in each of 32 intervals of 0.1-0.5.
    targets = 0.1 + 0.4 * (np.arange(32) + 0.5) / 32
    assert masked.max() <= 0.5
    assert 0.27 < masked.mean() <= 0.30
    np.testing.assert_allclose(masked.mean(0), targets, atol=0.035)
    per_place = (ratios > 0).mean(0)
    assert per_place.min() > 0.2 and per_place.max() < 0.8, "the masked crops are shuffled"
    per_patch = np.concatenate(draws).mean(0).reshape(14, 14)
    assert 0.01 < per_patch.min() and per_patch.max() < 0.4, "every patch is masked at times, the corners least"


def test_masks_are_made_of_blocks():
    masks = sample_masks(200, (14, 14), 0.5, (0.1, 0.5), random.Random(1)).reshape(200, 14, 14)
    masked = masks[masks.any((1, 2))]
    agree = (masked[:, 1:] == masked[:, :-1]).mean() + (masked[:, :, 1:] == masked[:, :, :-1]).mean()
    assert agree / 2 > 0.75, "neighbours agree far more often than in random masks (about 0.58)"


@pytest.mark.parametrize("grid", [(4, 4), (2, 2), (1, 1), (3, 16), (32, 32)])
def test_grids_of_any_size(grid):
    masks = sample_masks(16, grid, 0.5, (0.1, 0.5), random.Random(2))
    assert masks.shape == (16, grid[0] * grid[1]) and masks.mean(1).max() <= 0.5


def test_extremes():
    assert not sample_masks(10, (14, 14), 0.0, (0.1, 0.5), random.Random(0)).any()
    assert sample_masks(10, (14, 14), 1.0, (0.1, 0.5), random.Random(0)).any(1).all()
    first, again = (sample_masks(10, (14, 14), 0.5, (0.1, 0.5), random.Random(3)) for _ in range(2))
    other = sample_masks(10, (14, 14), 0.5, (0.1, 0.5), random.Random(4))
    assert (first == again).all() and (first != other).any()
