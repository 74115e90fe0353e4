"""PSNR and SSIM of a denoiser on clean images of other sets, with noise drawn on the fly, as published results are."""

from pathlib import Path

import numpy as np
import torch

from Neighbor2Neighbor.data import unit_values
from Neighbor2Neighbor.denoisers import UNetDenoiser, by_phases, denoise_images
from Neighbor2Neighbor.metrics import psnr, ssim
from Neighbor2Neighbor.unet import UNet
from utils.images import MAX_PIXELS, grey_levels, list_images, read_image, visible, write_image
from utils.noise import NoiseSpec, perturb
from utils.values import FULL, Values

SHEET_IMAGES, SHEET_SIDE = 4, 256  # of the sample sheet: rows, and px of each picture


class Validation:
    """Clean images below root, one folder per set (Kodak/, Set14/), or a single set where root itself holds images.

    values: what scales their files, as those of the training.
    """

    def __init__(
        self, root: Path, spec: NoiseSpec, channels: int, device: torch.device, precision: str, stride: int = 1,
        max_pixels: int = MAX_PIXELS, values: Values = FULL,
    ):  # fmt: skip
        if spec.kind == "none":
            raise ValueError("--val-clean needs a noise to add; name it with --val-noise")
        self.spec, self.device, self.precision, self.stride = spec, device, precision, stride
        self.images: dict[str, np.ndarray] = {}
        for relative in list_images(root):
            self.images[relative] = image = read_image(root / relative, channels, "native", values, max_pixels)
            if min(image.shape[:2]) < 11:
                raise ValueError(f"{root / relative} is smaller than 11 px, the window of SSIM; remove it")
        self.name = root.resolve().name

    def measure(self, network: UNet, sheet: Path) -> dict[str, float]:
        """psnr (dB), ssim of the denoised and noisy_psnr, noisy_ssim of the noisy images: means over all images, and
        over each set as Kodak_psnr and so on. The noise is the same at each call. Denoised and noisy images are rounded
        to 8 bits where the clean one has no more. Writes the sample sheet.
        """
        denoiser = by_phases(UNetDenoiser(network, self.device, self.precision), self.stride)
        generator = torch.Generator().manual_seed(101)
        rows: dict[str, list[tuple[float, ...]]] = {}
        pictures = []
        for relative, clean in self.images.items():
            noisy = perturb(unit_values(torch.from_numpy(clean)), self.spec, generator).numpy()
            eight_bit = clean.dtype == np.uint8
            (denoised,) = denoise_images(denoiser, [noisy], self.device, eight_bit=eight_bit)
            noisy = (noisy * 255 + 0.5).astype(np.uint8) if eight_bit else noisy
            levels = [grey_levels(image) for image in (clean, noisy, denoised)]
            values = psnr(levels[2], levels[0]), ssim(levels[2], levels[0]), psnr(*levels[:2]), ssim(*levels[:2])
            rows.setdefault(relative.rpartition("/")[0].replace("/", "_") or self.name, []).append(values)
            if len(pictures) < SHEET_IMAGES:
                pictures.append([visible(image) for image in (clean, noisy, denoised)])
        write_image(sheet, _contact_sheet(pictures))
        names = ("psnr", "ssim", "noisy_psnr", "noisy_ssim")
        result = dict(zip(names, _average_columns([row for rows_ in rows.values() for row in rows_]), strict=True))
        for group, values in rows.items():
            result |= {f"{group}_{name}": mean for name, mean in zip(names, _average_columns(values), strict=True)}
        return result


def _average_columns(rows: list[tuple[float, ...]]) -> list[float]:
    return [float(mean) for mean in np.mean(rows, axis=0)]


def _contact_sheet(pictures: list[list[np.ndarray]]) -> np.ndarray:
    """One row per image: clean, noisy, denoised, the top left part of each."""
    channels = pictures[0][0].shape[2]
    sheet = np.full((len(pictures) * SHEET_SIDE, 3 * SHEET_SIDE, channels), 255, np.uint8)
    for i, row in enumerate(pictures):
        for j, picture in enumerate(row):
            part = picture[:SHEET_SIDE, :SHEET_SIDE]
            y, x = i * SHEET_SIDE, j * SHEET_SIDE
            sheet[y : y + part.shape[0], x : x + part.shape[1]] = part
    return sheet
