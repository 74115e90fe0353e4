"""Denoisers behind one small interface, and what any of them needs around it: padding, tiles, rounding.

A denoiser is an object with
    denoise(batch)   float tensor [B, C, H, W] in [0, 1] -> the same shape, values free to leave [0, 1]
    channels         C
    multiple         H and W must be multiples of it
    reach            pixels around a pixel that its output depends on (overlap of tiles)
    identity         text that changes with its weights or settings; trees by different denoisers are not mixed
To bring your own: --denoiser package.module:Class, built as Class(spec=NoiseSpec, model=path or None, device=...,
precision=...). NonLocalMeans below is such a class.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from Neighbor2Neighbor.data import pad_reflect, unit_values
from Neighbor2Neighbor.unet import UNet, load_unet
from utils.noise import Gauss, NoiseSpec
from utils.precision import autocast

TILE = 1024  # pixels per side; larger images are denoised in parts


class Denoiser(Protocol):
    """The interface; see the module's docstring."""

    channels: int
    multiple: int
    reach: int
    identity: str

    def denoise(self, batch: Tensor) -> Tensor: ...


class UNetDenoiser:
    """Neighbor2Neighbor: the whole noisy image through the network once."""

    def __init__(self, network: UNet, device: torch.device, precision: str, identity: str = ""):
        self.network = network.to(device, memory_format=torch.channels_last).eval()
        self.device, self.precision, self.identity = device, precision, identity
        self.channels, self.multiple = network.channels, network.multiple
        self.reach = 5 * network.multiple  # sum over all convolutions and poolings, rounded up from 5 * 2^depth - 3

    @classmethod
    def load(cls, spec: NoiseSpec, model: Path | None, device: torch.device, precision: str) -> "UNetDenoiser":
        """The network of a .pth file; spec is not used, as the network has learned its noise."""
        if model is None:
            raise ValueError("--model is missing; name the unet.pth that training wrote")
        network = load_unet(model)
        return cls(network, device, precision, "n2n " + hashlib.sha256(Path(model).read_bytes()).hexdigest()[:16])

    @torch.inference_mode()
    def denoise(self, batch: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self.network(batch.contiguous(memory_format=torch.channels_last)).float()


class NonLocalMeans:
    """Non-local means of scikit-image: an example of another denoiser, and a baseline without training."""

    multiple, reach, channels = 1, 9, 3

    def __init__(self, spec: NoiseSpec, model: Path | None, device: torch.device, precision: str):
        try:
            from skimage.restoration import denoise_nl_means
        except ImportError as error:
            raise ValueError("--denoiser nlm needs scikit-image: pip install scikit-image") from error
        self._denoise = denoise_nl_means
        self.sigma = spec.level / 255 if isinstance(spec, Gauss) else None
        self.identity = f"nlm sigma {self.sigma or 'estimated'}"

    def denoise(self, batch: Tensor) -> Tensor:
        images = batch.permute(0, 2, 3, 1).cpu().numpy()  # [B, H, W, C]
        return torch.stack([torch.from_numpy(self._denoise_one(image)) for image in images]).permute(0, 3, 1, 2)

    def _denoise_one(self, image: np.ndarray) -> np.ndarray:
        sigma = self.sigma or _estimate_sigma(image)
        options = {"patch_size": 5, "patch_distance": 6, "fast_mode": True, "channel_axis": -1}
        return self._denoise(image, h=0.8 * sigma, sigma=sigma, **options).astype(np.float32)


class PhaseDenoiser:
    """Another denoiser on each of the stride x stride sub-images of every stride-th pixel, put together again.

    For noise that is correlated over fewer pixels than the stride: within a sub-image it is independent.
    """

    def __init__(self, inner: Denoiser, stride: int):
        self.inner, self.stride, self.channels = inner, stride, inner.channels
        self.multiple, self.reach = inner.multiple * stride, inner.reach * stride
        self.identity = f"{inner.identity} subsample {stride}"

    def denoise(self, batch: Tensor) -> Tensor:
        count, channels, height, width = batch.shape
        size = height // self.stride, width // self.stride
        phases = F.pixel_unshuffle(batch, self.stride).view(count, channels, -1, *size).transpose(1, 2)
        whole = self.inner.denoise(phases.reshape(-1, channels, *size))  # [B * stride^2, C, H / stride, W / stride]
        whole = whole.view(count, -1, channels, *size).transpose(1, 2)
        return F.pixel_shuffle(whole.reshape(count, -1, *size), self.stride)


def by_phases(denoiser: Denoiser, stride: int) -> Denoiser:
    """The denoiser on sub-images of every stride-th pixel; itself for a stride of 1."""
    return denoiser if stride == 1 else PhaseDenoiser(denoiser, stride)


def _estimate_sigma(image: np.ndarray) -> float:
    """Standard deviation of the noise, from mixed second differences, in which slopes cancel (Immerkaer 1996)."""
    mixed = np.diff(np.diff(image, axis=0), axis=1)  # four pixels each: variance 4 sigma^2
    return max(1e-3, float(np.abs(mixed).mean() * np.sqrt(np.pi / 2) / 2)) if mixed.size else 1e-3


def make_denoiser(name: str, spec: NoiseSpec, model: Path | None, device: torch.device, precision: str) -> Denoiser:
    """The denoiser of a name: "n2n", "nlm", or "package.module:Class"."""
    if name in ("n2n", "nlm"):
        factory = UNetDenoiser.load if name == "n2n" else NonLocalMeans
    else:
        module, _, attribute = name.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--denoiser {name} is neither n2n nor nlm, nor package.module:Class ({error})") from error
    return factory(spec=spec, model=model, device=device, precision=precision)


def training_options(model: Path | None) -> dict:
    """The options of the training that wrote the weights: config.json beside them; empty where there is none."""
    path = Path(model).parent / "config.json" if model is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        options = json.loads(path.read_text())
        return options if "increase_ratio" in options else {}  # another program's, as a Hugging Face model's
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); it says how {model} was trained") from error


def padded_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """Each side up to a multiple. Deviation: the release pads to a square, which is a third more work at 4:3."""
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def denoise_images(
    denoiser: Denoiser, images: list[np.ndarray], device: torch.device, tile: int = TILE, eight_bit: bool = True
) -> list[np.ndarray]:
    """Denoised images of noisy ones [H, W, C] that share one padded size; larger ones than `tile` go in tiles.

    The noisy images are uint8, or float32 in [0, 1]. The denoised ones are uint8 or, without eight_bit, float32; these
    too are clipped to [0, 1], in which all images lie: the noisy ones are clipped, and no value beyond can be true.
    """
    (size,) = {padded_size(image.shape[0], image.shape[1], denoiser.multiple) for image in images}
    if len({image.dtype for image in images}) > 1:
        images = [image if image.dtype != np.uint8 else image / np.float32(255) for image in images]
    stacked = np.stack([pad_reflect(image, *size) for image in images])
    batch = unit_values(torch.from_numpy(stacked).to(device).permute(0, 3, 1, 2))  # [B, C, H, W]
    result = denoiser.denoise(batch) if max(size) <= tile else _in_tiles(denoiser, batch, tile)
    result = result.clamp(0, 1)
    result = (result * 255 + 0.5).to(torch.uint8) if eight_bit else result
    whole = result.permute(0, 2, 3, 1).cpu().numpy()
    return [whole[i, : image.shape[0], : image.shape[1]] for i, image in enumerate(images)]


def _in_tiles(denoiser: Denoiser, batch: Tensor, tile: int) -> Tensor:
    """The same as denoise(batch) from tiles, each with the denoiser's whole reach around it: no seams.

    Tiles start at multiples of what the network pools, so that its grid is that of the whole image.
    """
    step = -(-tile // denoiser.multiple) * denoiser.multiple
    margin = -(-denoiser.reach // denoiser.multiple) * denoiser.multiple
    height, width = batch.shape[-2:]
    result = torch.empty_like(batch)
    for top in range(0, height, step):
        for left in range(0, width, step):
            y, x = max(0, top - margin), max(0, left - margin)
            part = denoiser.denoise(batch[..., y : top + step + margin, x : left + step + margin])
            part = part[..., top - y : top - y + step, left - x : left - x + step]
            result[..., top : top + step, left : left + step] = part
    return result
