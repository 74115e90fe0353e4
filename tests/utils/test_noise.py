"""Noise: the published formula to the byte, and the fixed realisations that trees and loaders share."""

import hashlib
import time
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from tests.conftest import golden
from utils import noise
from utils.noise import ALL_NOISES, NoiseSpec, add_noise, keyed_noise, keyed_noise_float, noise_key, perturb

KEY = "train/n01440764/img_1"
OTHERS = ("saltpepper0.1", "saltpepper1", "looks1", "looks4", "looks0.5", "rayleigh1", "rayleigh4.5",
          "poissongauss20-2", "poissongauss1-0.3", "poissongauss300-12")  # fmt: skip


@pytest.mark.parametrize("name", ALL_NOISES)
def test_add_noise_is_the_published_code_to_the_byte(name):
    recorded = golden("noise.npz")
    rng = np.random.default_rng(int(recorded["rng_seed"]))
    assert np.array_equal(add_noise(recorded["image"], NoiseSpec.parse(name), rng), recorded[name])


def test_names_round_trip():
    for text, canonical in {
        "gauss255": "gauss255", "gauss_255": "gauss255", "gauss37.50": "gauss37.5", "shot3": "shot3",
        "shot.5": "shot0.5", "speckle1": "speckle1.0", "speckle0.4": "speckle0.4", "gauss0.00001": "gauss0.00001",
        "none": "none", "saltpepper0.10": "saltpepper0.1",
        "looks4": "looks4", "rayleigh_1.0": "rayleigh1", "poissongauss20-2.50": "poissongauss20-2.5",
    }.items():  # fmt: skip
        spec = NoiseSpec.parse(text)
        assert str(spec) == canonical
        assert NoiseSpec.parse(canonical) == spec


@pytest.mark.parametrize("text", ["", "gauss", "gauss-5", "gauss0", "gaussinf", "gauss1e3", "poisson3", "shot2000000",
                                  "none3", "gauss255 ", "../gauss1", "saltpepper1.1", "looks0",
                                  "poissongauss20", "poissongauss20,2", "gauss5-2", "shot", "gausss3",
                                  "speckled3"])  # fmt: skip
def test_what_does_not_parse_is_refused_with_examples(text):
    with pytest.raises(ValueError, match="gauss37.5"):
        NoiseSpec.parse(text)


# Bytes that any version of this code must keep: denoised copies on disk were made from them.
RECORDED = {
    "gauss50": "13597a1f9eb8cbd9",
    "gauss100": "e4af677e03d4c285",
    "gauss255": "4d87b851bfa56a99",
    "shot10": "80b7ee873edabe52",
    "shot3": "e498e20b535827bc",
    "shot1": "892619bba92a7cce",
    "speckle0.4": "caa7972cbfb3928a",
    "speckle0.7": "057d2d88c098a32f",
    "speckle1.0": "2a53ffdf2f5c05c4",
    "gauss37.5": "8d1cd8bd7ec2fb58",
}


@pytest.mark.parametrize("name", RECORDED)
def test_keyed_noise_keeps_its_bytes(name):
    noisy = keyed_noise(golden("noise.npz")["image"], NoiseSpec.parse(name), 0, KEY)
    assert hashlib.sha256(noisy.tobytes()).hexdigest()[:16] == RECORDED[name]


@pytest.mark.parametrize("name", [*ALL_NOISES, "gauss3", "shot400", "speckle5", *OTHERS])
def test_keyed_noise_has_the_published_distribution(name):
    """Two samples of each grey level, one by the published formula: chi-square over the bytes that occur."""
    spec = NoiseSpec.parse(name)
    n = 20_000
    levels = np.array([0, 1, 2, 17, 84, 85, 128, 200, 254, 255], np.uint8)
    image = np.repeat(levels, n).reshape(len(levels), n)
    ours = keyed_noise(image, spec, 3, "a")
    theirs = add_noise(image, spec, np.random.default_rng(5))
    statistic, freedom = 0.0, 0
    for mine, published in zip(ours, theirs, strict=True):
        a, b = np.bincount(mine, minlength=256), np.bincount(published, minlength=256)
        common = a + b >= 20
        statistic += ((a - b)[common] ** 2 / (a + b)[common]).sum()
        freedom += max(0, int(common.sum()) - 1)
        rare = (a + b)[~common].sum() / (2 * n)
        assert abs(a[~common].sum() - b[~common].sum()) / n < 5 * np.sqrt(2 * rare / n) + 1e-9
        spread = published.std() / np.sqrt(n)
        assert abs(mine.mean() - published.astype(float).mean()) <= 5 * np.sqrt(2) * spread
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(
    "name",
    [
        *ALL_NOISES,
        "gauss0.1",
        "gauss100000",
        "shot0.25",
        "shot100000",
        *OTHERS,
        "looks1000000",
        "looks0.001",
        "poissongauss10000-3",
        "poissongauss0.3-40",
    ],
)
def test_the_table_draws_the_published_probabilities(name):
    """What the alias table draws, summed over its columns, is the formula's probability of each byte."""
    spec = NoiseSpec.parse(name)
    entry = noise._alias_table(spec).astype(np.int64).reshape(256, 256)
    threshold, alias = entry >> 8, entry & 255
    kept = np.where(alias == np.arange(256), 1 << 24, threshold)
    drawn = kept.copy()
    for value in range(256):
        np.add.at(drawn[value], alias[value], (1 << 24) - kept[value])
    assert (drawn.sum(1) == 1 << 32).all()
    assert np.abs(drawn / 2**32 - spec.probabilities()).max() < 2**-25  # 256 roundings


def test_the_realisation_depends_on_seed_noise_and_key_alone():
    image = np.full((40, 50, 3), 128, np.uint8)
    spec = NoiseSpec.parse("gauss100")
    first = keyed_noise(image, spec, 0, KEY)
    np.random.seed(7)  # the global stream has no part in it
    assert np.array_equal(keyed_noise(image.copy(order="F"), spec, 0, KEY), first)
    others = [
        keyed_noise(image, spec, 1, KEY),
        keyed_noise(image, spec, 0, KEY + "0"),
        keyed_noise(image, NoiseSpec.parse("gauss100.5"), 0, KEY),
    ]
    for other in others:
        correlation = np.corrcoef(first.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(image.size)
    neighbours = np.corrcoef(first[:, :-1].ravel(), first[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(image.size)


# The formulas of docs/noise.md once more, by SciPy's distributions: P(noisy value <= t | u), before the clip.
def _salt_pepper(p, u, t):
    return p / 2 + (1 - p) * (t >= u) if t < 1 else 1.0


def _sensor(photons, read, u, t):
    counts = np.arange(5000)
    return stats.poisson.pmf(counts, photons * u) @ stats.norm.cdf(t * photons, counts, read)


FORMULAS = {
    "saltpepper0.1": partial(_salt_pepper, 0.1),
    "saltpepper1": partial(_salt_pepper, 1.0),
    "looks1": lambda u, t: stats.expon.cdf(t, scale=u),
    "looks4": lambda u, t: stats.gamma.cdf(t, 4, scale=u / 4),
    "looks0.5": lambda u, t: stats.gamma.cdf(t, 0.5, scale=u / 0.5),
    "rayleigh1": lambda u, t: stats.rayleigh.cdf(t, scale=u / np.sqrt(2)),
    "rayleigh4.5": lambda u, t: stats.nakagami.cdf(t, 4.5, scale=u),
    "poissongauss20-2": partial(_sensor, 20, 2),
    "poissongauss1-0.3": partial(_sensor, 1, 0.3),
    "poissongauss300-12": partial(_sensor, 300, 12),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_bytes_have_the_probabilities_of_the_formula(name):
    """Exactly, as the classes give them to the table; and the samples that are drawn, by chi-square."""
    spec, values = NoiseSpec.parse(name), np.array([1, 3, 50, 128, 200, 255])
    below = [[FORMULAS[name](v / 255, np.nextafter(k / 255, 0)) for k in range(1, 256)] for v in values]
    expected = np.diff(below, axis=1, prepend=0.0, append=1.0)
    assert np.abs(spec.probabilities()[values] - expected).max() < 1e-12
    n = 50_000
    noisy = keyed_noise(np.repeat(values.astype(np.uint8), n).reshape(-1, n), spec, 0, KEY)
    statistic, freedom = 0.0, 0
    for row, p in zip(noisy, expected, strict=True):
        counts, common = np.bincount(row, minlength=256), p * n >= 5
        assert not counts[p < 1e-13].any()
        statistic += ((counts - n * p)[common] ** 2 / (n * p)[common]).sum()
        freedom += max(0, int(common.sum()) - 1)
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("name", FORMULAS)
def test_float_values_and_perturbations_have_the_distribution_of_the_formula(name):
    """The largest distance of the empirical distribution from the formula's (Kolmogorov-Smirnov, chance 1e-4)."""
    spec, n = NoiseSpec.parse(name), 40_000
    for u in (0.02, 0.3, 0.8):
        image = np.full(n, u, np.float32)
        for noisy in (keyed_noise_float(image, spec, 0, KEY),
                      perturb(torch.from_numpy(image), spec, torch.Generator().manual_seed(0)).numpy()):  # fmt: skip
            assert noisy.dtype == np.float32
            for t in np.linspace(0.003, 0.997, 200):
                assert abs(np.mean(noisy <= t) - FORMULAS[name](u, t)) < 2.23 / np.sqrt(n), (u, t)
            assert FORMULAS[name](u, 0) == pytest.approx(np.mean(noisy == 0), abs=2.23 / np.sqrt(n))


def test_every_shape_and_the_end_of_a_chunk():
    spec = NoiseSpec.parse("shot10")
    whole = np.random.default_rng(0).integers(0, 256, 2 * noise._CHUNK + 3, dtype=np.uint8)
    noisy = keyed_noise(whole, spec, 0, "k")
    for size in (1, 2, 3, noise._CHUNK - 1, noise._CHUNK, noise._CHUNK + 1):
        assert np.array_equal(keyed_noise(whole[:size], spec, 0, "k"), noisy[:size])
    assert keyed_noise(whole[:1].reshape(1, 1, 1), spec, 0, "k").shape == (1, 1, 1)
    assert keyed_noise(np.zeros((0, 4, 3), np.uint8), spec, 0, "k").shape == (0, 4, 3)


def test_none_changes_nothing_and_returns_a_copy():
    image = golden("noise.npz")["image"]
    for noisy in (keyed_noise(image, NoiseSpec.parse("none"), 0, "k"), add_noise(image, NoiseSpec.parse("none"), None)):
        assert np.array_equal(noisy, image) and noisy is not image


def test_keys_drop_the_extension_alone():
    assert noise_key("train/a.b/img.v2.JPEG") == "train/a.b/img.v2"


def test_float_images_keep_their_depth():
    image = np.linspace(0, 1, 5000, dtype=np.float32).reshape(50, 100, 1)
    for name in (*ALL_NOISES, *OTHERS):
        spec = NoiseSpec.parse(name)
        noisy = keyed_noise_float(image, spec, 0, KEY)
        assert noisy.dtype == np.float32 and noisy.min() >= 0 and noisy.max() <= 1
        assert np.array_equal(noisy, keyed_noise_float(image, spec, 0, KEY))
    noisy = keyed_noise_float(image, NoiseSpec.parse("gauss10"), 0, KEY)
    inner = (noisy > 0) & (noisy < 1)
    assert abs((noisy - image)[inner].std() * 255 - 10) < 0.5
    assert np.mean(np.mod(noisy[inner] * 255, 1) > 0.01) > 0.9, "rounded to 8 bits"


@pytest.mark.parametrize("name", ["gauss102", "shot3", "speckle0.7", "none", *OTHERS])
def test_perturb_draws_anew_and_matches_the_formula(name):
    spec = NoiseSpec.parse(name)
    u = torch.linspace(0, 1, 9).repeat(20_000, 1)  # [20000, 9]
    first = perturb(u, spec, torch.Generator().manual_seed(0))
    assert torch.equal(first, perturb(u, spec, torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    second, third = perturb(u, spec, generator), perturb(u, spec, generator)
    assert torch.equal(second, third) == (name == "none")
    expected = u.double().numpy()
    expected = np.clip(spec.sample(expected, np.random.default_rng(0)), 0, 1) if name != "none" else expected
    error = 5 * np.sqrt(2) * expected.std(0) / np.sqrt(len(u)) + 1e-6
    assert (np.abs(first.numpy().mean(0) - expected.mean(0)) < error).all()
    assert np.allclose(first.numpy().std(0), expected.std(0), rtol=0.05, atol=1e-6)


def test_keyed_noise_is_faster_than_the_published_formula():
    image = np.random.default_rng(0).integers(0, 256, (500, 375, 3), dtype=np.uint8)
    specs = [NoiseSpec.parse(name) for name in ALL_NOISES]

    def seconds(add) -> float:
        started = time.process_time()
        for spec in specs:
            add(image, spec)
        return time.process_time() - started

    seconds(lambda image, spec: keyed_noise(image, spec, 0, "k"))  # builds the tables
    ours = min(seconds(lambda image, spec: keyed_noise(image, spec, 0, "k")) for _ in range(3))
    published = seconds(lambda image, spec: add_noise(image, spec, np.random.default_rng(0)))
    assert ours < published / 2
