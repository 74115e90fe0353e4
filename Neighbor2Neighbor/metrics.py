"""PSNR and SSIM of 8-bit images, as published denoising results are computed."""

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two images of values 0..255, [H, W] or [H, W, C]; infinite when equal."""
    assert a.shape == b.shape, (a.shape, b.shape)
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean()
    return float(10 * np.log10(255.0**2 / error)) if error > 0 else float("inf")


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), Gaussian window 11 of sigma 1.5, valid area, mean over channels.

    Images of values 0..255, [H, W] or [H, W, C], at least 11 px per side.
    """
    assert a.shape == b.shape and min(a.shape[:2]) >= 11, (a.shape, b.shape)
    a, b = (x.astype(np.float64).reshape(*x.shape[:2], -1) for x in (a, b))
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a, variance_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float((luminance * structure).mean())


def _blur(x: np.ndarray) -> np.ndarray:
    """The window's weighted mean at every place where it fits. [H, W, C] -> [H - 10, W - 10, C]."""
    window = np.exp(-np.square(np.arange(-5.0, 6.0)) / (2 * 1.5**2))
    window /= window.sum()
    height, width = x.shape[0] - 10, x.shape[1] - 10
    x = sum(weight * x[k : k + height] for k, weight in enumerate(window))
    return sum(weight * x[:, k : k + width] for k, weight in enumerate(window))
