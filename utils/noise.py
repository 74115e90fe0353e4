"""The noises of the method: one implementation for trees on disk, loaders, retrieval, validation and the toy.

On a uint8 image x with u = x/255, per pixel and channel, clipped to [0, 1], times 255, truncated:
    gauss<s>    u + N(0, s/255)          gauss50 gauss100 gauss255
    shot<l>     Poisson(l u) / l         shot10 shot3 shot1
    speckle<c>  u + u N(0, c)            speckle0.4 speckle0.7 speckle1.0
    none        u                        images that are noisy by nature
(standard deviations in the brackets). Every image has ONE fixed realisation: keyed_noise() depends on the seed, the
noise and the image's relative path alone, never on file order, worker, rank or machine. Redrawing it every epoch would
show many noisy copies of one image, which is what the setting forbids (that is Noise2Noise).
"""

import hashlib
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath

import numpy as np

ALL_NOISES = (
    "gauss50", "gauss100", "gauss255", "shot10", "shot3", "shot1", "speckle0.4", "speckle0.7", "speckle1.0",
)  # fmt: skip
MAX_PHOTONS = 1e6  # above it shot noise is far below one grey level
EXAMPLES = "gauss255, gauss37.5, shot3, speckle0.4, none"


@dataclass(frozen=True)
class NoiseSpec:
    """One noise: its kind ("gauss", "shot", "speckle" or "none") and its level (0 for "none")."""

    kind: str
    level: float

    @classmethod
    def parse(cls, text: str) -> "NoiseSpec":
        """ "gauss255" -> NoiseSpec("gauss", 255.0); any positive level. ValueError with examples for anything else."""
        if text == "none":
            return cls("none", 0.0)
        match = re.fullmatch(r"(gauss|shot|speckle)_?([0-9]+\.?[0-9]*|\.[0-9]+)", text)
        if match is None:
            raise ValueError(f"noise {text!r} is not known; write a kind and a level, such as {EXAMPLES}")
        kind, level = match[1], float(match[2])
        if not 0 < level < math.inf or (kind == "shot" and level > MAX_PHOTONS):
            limits = f"above 0 and at most {MAX_PHOTONS:g}" if kind == "shot" else "above 0 and finite"
            raise ValueError(f"noise {text!r}: the level of {kind} must be {limits} (examples: {EXAMPLES})")
        return cls(kind, level)

    def __str__(self) -> str:
        """The canonical name, which parse() reads back: folder names and keys are made from it."""
        if self.kind == "none":
            return "none"
        return self.kind + np.format_float_positional(self.level, trim="0" if self.kind == "speckle" else "-")


def add_noise(image: np.ndarray, spec: NoiseSpec, rng: np.random.Generator) -> np.ndarray:
    """The published algorithm on a uint8 image [H, W, C] or [H, W]; draws from rng. Returns uint8 of that shape."""
    if spec.kind == "none":
        return image.copy()
    return (_noisy_values(image / 255.0, spec, rng) * 255).astype(np.uint8)


def _noisy_values(u: np.ndarray, spec: NoiseSpec, rng: np.random.Generator) -> np.ndarray:
    """Noisy float64 values in [0, 1] of values u in [0, 1]."""
    if spec.kind == "gauss":
        noisy = u + rng.normal(size=u.shape, scale=spec.level / 255)
    elif spec.kind == "shot":
        noisy = rng.poisson(u * spec.level) / spec.level
    else:
        noisy = u + u * rng.normal(size=u.shape, scale=spec.level)
    return np.clip(noisy, 0, 1)


def perturb(u, spec: NoiseSpec, generator=None):
    """Noise drawn anew at each call, for the toy and for validation.

    u: float tensor of any shape in [0, 1]; generator: torch.Generator of its device. Returns a new tensor in [0, 1].
    """
    import torch  # here, so that processes that only write trees need not load it

    if spec.kind == "none":
        return u.clone()
    if spec.kind == "shot":
        return (torch.poisson(u * spec.level, generator=generator) / spec.level).clamp_(0, 1)
    z = torch.empty_like(u).normal_(generator=generator)
    scale = spec.level / 255 if spec.kind == "gauss" else u * spec.level
    return (u + scale * z).clamp_(0, 1)


# --- one fixed realisation an image ---------------------------------------------------------------------------------
def noise_key(relative_path: str) -> str:
    """Key of an image: its posix path below the tree's root without extension, "train/n01440764/img_1"."""
    return str(PurePosixPath(relative_path).with_suffix(""))


def keyed_noise(image: np.ndarray, spec: NoiseSpec, seed: int, key: str) -> np.ndarray:
    """The fixed noisy twin of a uint8 image of any shape: the same bytes for the same (seed, spec, key), anywhere.

    A float image in [0, 1] becomes float32 in [0, 1], see keyed_noise_float().
    Deviation: the release draws one stream over the whole data set in directory order. Here each image has its own.
    A noisy uint8 is a random uint8 whose distribution depends on the pixel's value and the noise alone, so it is drawn
    from a table of the published formula's probabilities (to 2^-25) by Walker's alias method (ACM TOMS 1977): one
    32-bit draw and one look-up a sample, at the same speed for every noise, an order faster than normals or Poissons.
    """
    if image.dtype != np.uint8:
        return keyed_noise_float(image, spec, seed, key)
    if spec.kind == "none":
        return image.copy()
    table = _alias_table(spec)
    bits = _bit_generator(spec, seed, key)
    noisy = np.empty(image.shape, np.uint8)
    source, target = np.ascontiguousarray(image).reshape(-1), noisy.reshape(-1)
    for start in range(0, source.size, _CHUNK):  # chunks that stay in the core's cache
        stop = min(start + _CHUNK, source.size)
        _sample(source[start:stop], target[start:stop], table, bits)
    return noisy


def keyed_noise_float(image: np.ndarray, spec: NoiseSpec, seed: int, key: str) -> np.ndarray:
    """The fixed noisy twin of a 16-bit or float image, values in [0, 1], without rounding to 8 bits. Float32."""
    assert image.dtype.kind == "f", image.dtype
    if spec.kind == "none":
        return image.astype(np.float32)
    rng = np.random.Generator(_bit_generator(spec, seed, key))
    return _noisy_values(image.astype(np.float64), spec, rng).astype(np.float32)


_CHUNK = 1 << 15  # samples; even, so that two 32-bit draws come of each 64-bit one


def _bit_generator(spec: NoiseSpec, seed: int, key: str) -> np.random.SFC64:
    """The stream of one image. NumPy guarantees raw streams of bit generators, unlike those of distributions."""
    name = f"{seed}\n{spec}\n{key}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.SFC64(int.from_bytes(digest, "little"))


def _sample(values: np.ndarray, out: np.ndarray, table: np.ndarray, bits: np.random.SFC64) -> None:
    """Draw out[i] ~ row values[i] of the alias table, in place. values, out: uint8 [n]."""
    draws = bits.random_raw((values.size + 1) // 2).astype("<u8", copy=False).view("<u4")[: values.size]
    index = values.astype(np.intp)
    index <<= 8
    column = draws.view(np.uint8)[::4]  # low byte of each draw
    index |= column
    entry = table.take(index, mode="clip")  # "clip" spares the bounds check; the index cannot leave the table
    np.bitwise_xor(entry.view(np.uint8)[::4], column, out=out)  # alias ^ column, kept where the alias is taken:
    out *= (draws | np.uint32(0xFF)) >= entry  # high 24 bits not below the threshold
    out ^= column  # arithmetic, as a masked copy would mispredict on every other sample


@lru_cache(maxsize=16)
def _alias_table(spec: NoiseSpec) -> np.ndarray:
    """Alias table of a noise: little-endian uint32 [256 * 256], entry [value * 256 + column] = threshold << 8 | alias.

    A row has 256 columns of mass 2^24. Column k keeps outcome k on its first `threshold` units; the rest of it belongs
    to outcome `alias`. Integers throughout, so that the table is the same on every machine.
    """
    mass = np.rint(_outcome_probabilities(spec) * 2.0**32).astype(np.int64)
    rows = np.arange(256)
    mass[rows, mass.argmax(1)] += (1 << 32) - mass.sum(1)  # rounding left the sum a few units off 2^32
    threshold = np.zeros((256, 256), np.int64)
    alias = np.tile(np.arange(256), (256, 1))
    # The poorest open column of each row is filled up by the richest, then closed, until all hold 2^24.
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
    full = alias == np.arange(256)  # 2^24 does not fit in 24 bits, nor is it needed here
    return ((np.where(full, 0, threshold) << 8) | alias).astype("<u4").reshape(-1)


def _outcome_probabilities(spec: NoiseSpec) -> np.ndarray:
    """P(noisy byte = k | byte = v) of the published formula with its clip and truncation. Float64 [256 v, 256 k]."""
    values = np.arange(256.0)[:, None]
    if spec.kind == "shot":
        return _shot_probabilities(spec.level)
    scale = np.full((256, 1), spec.level) if spec.kind == "gauss" else spec.level * values  # in grey levels
    edges = np.arange(1.0, 256.0)  # noisy * 255 in [k, k + 1) is truncated to k; below 1 to 0; from 255 on it is 255
    with np.errstate(divide="ignore"):
        z = np.where(scale > 0, (edges - values) / scale, np.inf)  # [256, 255]; speckle leaves black black
    below = 0.5 * np.frompyfunc(math.erfc, 1, 1)(-z / math.sqrt(2)).astype(np.float64)  # P(noisy * 255 < edge)
    cumulative = np.concatenate([np.zeros((256, 1)), below, np.ones((256, 1))], axis=1)
    return np.diff(cumulative, axis=1)


def _shot_probabilities(photons: float) -> np.ndarray:
    """The same for shot noise: Poisson counts, each truncated by the published float64 expression."""
    counts = np.arange(math.ceil(photons) + 1)  # from `photons` on, all counts clip to 255
    outcome = (np.clip(counts / photons, 0, 1) * 255).astype(np.uint8)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(counts[1:], 1)))])
    probabilities = np.zeros((256, 256))
    probabilities[0, 0] = 1.0
    for value in range(1, 256):
        mean = value / 255.0 * photons
        pmf = np.exp(counts * math.log(mean) - mean - log_factorial)
        probabilities[value] = np.bincount(outcome, weights=pmf, minlength=256)
        probabilities[value, 255] = max(0.0, 1.0 - probabilities[value, :255].sum())
    return probabilities
