"""Random bytes of known distributions by Walker's alias method (ACM TOMS 1977): a 32-bit draw and a look-up each."""

import numpy as np


def table(probabilities: np.ndarray) -> np.ndarray:
    """Alias table of probabilities [256 values, 256 outcomes], float64.

    Little-endian uint32 [256 * 256], entry [value * 256 + column] = threshold << 8 | alias.
    A row has 256 columns of mass 2^24. The first `threshold` units of column k belong to outcome k, the rest to outcome
    `alias`. All arithmetic is in integers, so that the table is the same on every machine.
    """
    mass = np.rint(probabilities * 2.0**32).astype(np.int64)
    rows = np.arange(256)
    mass[rows, mass.argmax(1)] += (1 << 32) - mass.sum(1)  # rounding left the sum a few units off 2^32
    threshold = np.zeros((256, 256), np.int64)
    alias = np.tile(np.arange(256), (256, 1))
    # In each row the poorest open column is filled up by the richest, then closed, until all hold 2^24.
    remaining = mass.copy()
    closed = np.int64(1 << 40)
    for _ in range(255):
        poor = remaining.argmin(1)
        rich = np.where(remaining < closed, remaining, -1).argmax(1)
        kept = remaining[rows, poor]
        threshold[rows, poor] = kept
        alias[rows, poor] = np.where(kept < 1 << 24, rich, poor)
        remaining[rows, rich] -= (1 << 24) - kept
        remaining[rows, poor] = closed
    full = alias == np.arange(256)  # 2^24 does not fit in 24 bits, and is not needed
    return ((np.where(full, 0, threshold) << 8) | alias).astype("<u4").reshape(-1)


def sample(values: np.ndarray, out: np.ndarray, table: np.ndarray, bits: np.random.SFC64) -> None:
    """Draw out[i] ~ row values[i] of the alias table, in place. values, out: uint8 [n]."""
    draws = bits.random_raw((values.size + 1) // 2).astype("<u8", copy=False).view("<u4")[: values.size]
    index = values.astype(np.intp)
    index <<= 8
    column = draws.view(np.uint8)[::4]  # low byte of each draw
    index |= column
    entry = table.take(index, mode="clip")  # "clip" saves the bounds check; the index is always valid
    np.bitwise_xor(entry.view(np.uint8)[::4], column, out=out)  # alias ^ column, kept where the alias is taken:
    out *= (draws | np.uint32(0xFF)) >= entry  # high 24 bits not below the threshold
    out ^= column  # arithmetic, as a masked copy would mispredict on every other sample
