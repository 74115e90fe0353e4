"""The noises of the method: one implementation for trees on disk, loaders, retrieval, validation and the toy.

A noise is a class below, found by the kind in its name (docs/noise.md has the formulas with their sources, and the
recipe for another one). It acts on each value u in [0, 1] of a pixel and channel by itself; what it gives is clipped to
[0, 1] and, for a uint8 image with u = x/255, times 255, truncated.

Every image has ONE fixed realisation: keyed_noise() depends on the seed, the noise and the image's relative path alone,
never on file order, worker, rank or machine. Redrawing it every epoch would show many noisy copies of one image, which
is what the setting forbids (that is Noise2Noise).
"""

import hashlib
import math
import re
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import PurePosixPath
from typing import ClassVar

import numpy as np

from utils import alias

ALL_NOISES = (
    "gauss50", "gauss100", "gauss255", "shot10", "shot3", "shot1", "speckle0.4", "speckle0.7", "speckle1.0",
)  # fmt: skip
EXAMPLES = "gauss255, gauss37.5, shot3, speckle0.4, saltpepper0.1, looks4, rayleigh1, poissongauss20-2, none"
NOISES: dict[str, type["NoiseSpec"]] = {}  # kind -> class; each class enters itself
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"


@dataclass(frozen=True)
class NoiseSpec:
    """One noise. A subclass says its kind and, as fields, the levels that follow it in the name, parted by "-"."""

    kind: ClassVar[str]
    most: ClassVar[float] = math.inf  # of each level; all are above 0
    trim: ClassVar[str] = "-"  # how NumPy writes whole levels: "-" 1, "0" 1.0

    def __init_subclass__(cls):
        NOISES[cls.kind] = cls

    def sample(self, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Noisy values, not yet clipped, of float64 values u in [0, 1] of any shape."""
        raise NotImplementedError

    def perturb(self, u, generator):
        """The same for a float tensor and a torch.Generator of its device. Returns a new tensor."""
        raise NotImplementedError

    def cdf(self, values: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """P(255 x noisy value < edge | byte), for bytes [256, 1] and edges 1.0..255.0 [255]. Float64 [256, 255]."""
        raise NotImplementedError

    def probabilities(self) -> np.ndarray:
        """P(noisy byte = k | byte = v), with the clip and the truncation. Float64 [256 v, 256 k]."""
        below = self.cdf(np.arange(256.0)[:, None], np.arange(1.0, 256.0))
        return np.diff(below, axis=1, prepend=0.0, append=1.0)

    @staticmethod
    def parse(text: str) -> "NoiseSpec":
        """ "gauss255" -> Gauss(255.0); any positive level. ValueError with examples for anything else."""
        match = re.fullmatch(rf"([a-z]+)(?:_?({_NUMBER}(?:-{_NUMBER})*))?", text)
        noise = match and NOISES.get(match[1])
        levels = [float(level) for level in match[2].split("-")] if match and match[2] else []
        if noise is None or len(levels) != len(fields(noise)):
            raise ValueError(f"noise {text!r} is not known; write a kind and its level, such as {EXAMPLES}")
        if not all(0 < level <= noise.most and level < math.inf for level in levels):
            limits = f"above 0 and {'finite' if noise.most == math.inf else f'at most {noise.most:g}'}"
            raise ValueError(f"noise {text!r}: the level of {noise.kind} must be {limits} (examples: {EXAMPLES})")
        return noise(*levels)

    def __str__(self) -> str:
        """The canonical name, which parse() reads back: folder names and keys are made from it."""
        levels = (getattr(self, field.name) for field in fields(self))
        return self.kind + "-".join(np.format_float_positional(level, trim=self.trim) for level in levels)


@dataclass(frozen=True)
class NoNoise(NoiseSpec):
    """For images that are noisy by nature. No method: what calls them returns the image as it is."""

    kind = "none"


@dataclass(frozen=True)
class Gauss(NoiseSpec):
    """u + N(0, level / 255): a standard deviation in grey levels."""

    kind = "gauss"
    level: float

    def sample(self, u, rng):
        return u + rng.normal(size=u.shape, scale=self.level / 255)

    def perturb(self, u, generator):
        return u + self.level / 255 * u.clone().normal_(generator=generator)

    def cdf(self, values, edges):
        return _normal_cdf((edges - values) / self.level)


@dataclass(frozen=True)
class Speckle(NoiseSpec):
    """u + u N(0, level): a standard deviation relative to the value."""

    kind, trim = "speckle", "0"
    level: float

    def sample(self, u, rng):
        return u + u * rng.normal(size=u.shape, scale=self.level)

    def perturb(self, u, generator):
        return u + u * self.level * u.clone().normal_(generator=generator)

    def cdf(self, values, edges):
        with np.errstate(divide="ignore"):  # black stays black: all edges lie infinitely far above it
            return _normal_cdf((edges - values) / (self.level * values))


@dataclass(frozen=True)
class Shot(NoiseSpec):
    """Poisson(level u) / level: level photons at white."""

    kind, most = "shot", 1e6  # above it shot noise is far below one grey level
    level: float

    def sample(self, u, rng):
        return rng.poisson(u * self.level) / self.level

    def perturb(self, u, generator):
        import torch  # here, so that processes that only write trees need not load it

        return torch.poisson(u * self.level, generator=generator) / self.level

    def probabilities(self):
        """From the counts, each truncated by the published float64 expression, in place of a cdf()."""
        counts = np.arange(math.ceil(self.level) + 1)  # from `level` on, all counts clip to 255
        outcome = (np.clip(counts / self.level, 0, 1) * 255).astype(np.uint8)
        log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(counts[1:], 1)))])
        probabilities = np.zeros((256, 256))
        probabilities[0, 0] = 1.0
        for value in range(1, 256):
            mean = value / 255.0 * self.level
            pmf = np.exp(counts * math.log(mean) - mean - log_factorial)
            probabilities[value] = np.bincount(outcome, weights=pmf, minlength=256)
            probabilities[value, 255] = max(0.0, 1.0 - probabilities[value, :255].sum())
        return probabilities


@dataclass(frozen=True)
class SaltPepper(NoiseSpec):
    """0 or 1 with probability level / 2 each, else u."""

    kind, most = "saltpepper", 1.0
    level: float

    def sample(self, u, rng):
        chance = rng.random(u.shape)
        return np.where(chance < self.level, chance < self.level / 2, u)

    def perturb(self, u, generator):
        chance = u.clone().uniform_(generator=generator)
        return (chance < self.level / 2).to(u.dtype).where(chance < self.level, u)

    def cdf(self, values, edges):
        return self.level / 2 + (1 - self.level) * (values < edges)


@dataclass(frozen=True)
class Looks(NoiseSpec):
    """u G, G ~ Gamma(level, 1 / level): the speckle of a radar image of intensities, averaged over `level` looks."""

    kind, most, power = "looks", 1e6, 1.0
    level: float

    def sample(self, u, rng):
        return u * (rng.standard_gamma(self.level, u.shape) / self.level) ** self.power

    def perturb(self, u, generator):
        import torch

        gamma = torch._standard_gamma(
            torch.full_like(u, self.level), generator
        )  # torch.distributions takes no generator
        return u * (gamma / self.level) ** self.power

    def cdf(self, values, edges):
        from scipy.special import gammainc

        gain = (edges / np.maximum(values, 1e-9)) ** (1 / self.power)  # black stays black
        return gammainc(self.level, self.level * gain)


@dataclass(frozen=True)
class Rayleigh(Looks):
    """u sqrt(G), G ~ Gamma(level, 1 / level): the same on amplitudes; that of one look is a Rayleigh variable."""

    kind, power = "rayleigh", 0.5


@dataclass(frozen=True)
class PoissonGauss(NoiseSpec):
    """(Poisson(photons u) + N(0, read)) / photons: a sensor's shot and read noise, both in electrons."""

    kind, most = "poissongauss", 1e4  # electrons; the table sums over all counts
    photons: float
    read: float

    def sample(self, u, rng):
        return (rng.poisson(u * self.photons) + rng.normal(size=u.shape, scale=self.read)) / self.photons

    def perturb(self, u, generator):
        import torch

        counts = torch.poisson(u * self.photons, generator=generator)
        return (counts + self.read * u.clone().normal_(generator=generator)) / self.photons

    def cdf(self, values, edges):
        from scipy.special import gammaln, ndtr, xlogy

        counts = np.arange(math.ceil(self.photons + 10 * math.sqrt(self.photons) + 50))  # above: below 1e-20
        means = values * self.photons / 255
        pmf = np.exp(xlogy(counts, means) - means - gammaln(counts + 1))  # [256, counts]
        pmf /= pmf.sum(1, keepdims=True)  # off by 1e-11 at most
        return pmf @ ndtr((edges * self.photons / 255 - counts[:, None]) / self.read)


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * np.frompyfunc(math.erfc, 1, 1)(-z / math.sqrt(2)).astype(np.float64)


# --- a noise on an image --------------------------------------------------------------------------------------------
def add_noise(image: np.ndarray, spec: NoiseSpec, rng: np.random.Generator) -> np.ndarray:
    """The published algorithm on a uint8 image [H, W, C] or [H, W]; draws from rng. Returns uint8 of that shape."""
    if spec.kind == "none":
        return image.copy()
    return (np.clip(spec.sample(image / 255.0, rng), 0, 1) * 255).astype(np.uint8)


def perturb(u, spec: NoiseSpec, generator=None):
    """Noise drawn anew at each call, for the toy and for validation.

    u: float tensor of any shape in [0, 1]; generator: torch.Generator of its device. Returns a new tensor in [0, 1].
    """
    return u.clone() if spec.kind == "none" else spec.perturb(u, generator).clamp_(0, 1)


# --- one fixed realisation per image -------------------------------------------------------------------------------
def noise_key(relative_path: str) -> str:
    """Key of an image: its posix path below the tree's root without extension, "train/n01440764/img_1"."""
    return str(PurePosixPath(relative_path).with_suffix(""))


def keyed_noise(image: np.ndarray, spec: NoiseSpec, seed: int, key: str) -> np.ndarray:
    """The fixed noisy twin of a uint8 image of any shape: the same bytes for the same (seed, spec, key), anywhere.

    A float image in [0, 1] becomes float32 in [0, 1], see keyed_noise_float().
    Deviation: the release draws one stream over the whole data set in directory order. Here each image has its own.
    A noisy uint8 is a random uint8 whose distribution depends on the pixel's value and the noise alone, so it is drawn
    from a table of the published formula's probabilities (to 2^-25) by Walker's alias method (ACM TOMS 1977): one
    32-bit draw and one look-up per sample, at the same speed for every noise, an order faster than normals or Poissons.
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
        alias.sample(source[start:stop], target[start:stop], table, bits)
    return noisy


def keyed_noise_float(image: np.ndarray, spec: NoiseSpec, seed: int, key: str) -> np.ndarray:
    """The fixed noisy twin of a 16-bit or float image, values in [0, 1], without rounding to 8 bits. Float32."""
    assert image.dtype.kind == "f", image.dtype
    if spec.kind == "none":
        return image.astype(np.float32)
    rng = np.random.Generator(_bit_generator(spec, seed, key))
    return np.clip(spec.sample(image.astype(np.float64), rng), 0, 1).astype(np.float32)


_CHUNK = 1 << 15  # samples; even, so that two 32-bit draws come of each 64-bit one


def _bit_generator(spec: NoiseSpec, seed: int, key: str) -> np.random.SFC64:
    """The stream of one image. NumPy guarantees raw streams of bit generators, unlike those of distributions."""
    name = f"{seed}\n{spec}\n{key}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(name, digest_size=16).digest()
    return np.random.SFC64(int.from_bytes(digest, "little"))


@lru_cache(maxsize=16)
def _alias_table(spec: NoiseSpec) -> np.ndarray:
    return alias.table(spec.probabilities())
