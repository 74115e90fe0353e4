"""Is the denoiser allowed here? Neighbor2Neighbor assumes noise that is independent from pixel to pixel.

    python -m Neighbor2Neighbor.check mstar
    python -m Neighbor2Neighbor.check mini-imagenet --noise gauss255 --model runs/n2n-gauss255/unet.pth

The noise of a sample of images is looked at in two ways. Flat patches: the quarter of all patches with the least
structure for its noise (variance of the means of its 4x4 blocks, over that of its pixels), minus a fitted plane.
Residuals, with --model: the noisy image minus the denoised one. Both give the correlation of pixels 1 to 4 apart along
both axes and a diagonal.
A network that can tell a pixel's noise from its neighbour's keeps about that fraction of it, so "independent" means a
correlation of at most 0.1. The flat patches also show how the noise grows with the brightness.

The choice of the patches lowers the correlations by some hundredths (to -0.02 for independent noise), and the structure
that they still hold raises them: for images with little noise the figures are upper bounds. check.json and check.png
are written to --output, or beside --model.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from Neighbor2Neighbor.data import read_noisy, training_images
from Neighbor2Neighbor.denoisers import by_phases, denoise_images, make_denoiser, training_options
from utils import cli, distributed
from utils.files import write_text
from utils.images import ImageError
from utils.noise import EXAMPLES, NoiseSpec
from utils.progress import progress
from utils.report.check import draw, format_figures
from utils.text import count_of
from utils.values import Values, add_options, check, resolve, rule_for_reading

PATCH, BLOCK, LAGS = 16, 4, 4  # pixels
PATCHES = 4096  # of an image, at most: those of a megapixel; all of a large folder's would not fit into memory
QUIETEST = 0.25  # fraction of the patches that is taken
INDEPENDENT = 0.1  # largest correlation that counts as none
BINS = 10  # of brightness
DIRECTIONS = {"horizontal": (0, 1), "vertical": (1, 0), "diagonal": (1, 1)}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, help="folder of images; its train/ folder where it has one")
    add("--noise", default="none", help=f"noise added while loading ({EXAMPLES}; default none: noisy by nature)")
    add("--noise-seed", type=int, default=0, help="seed of the fixed noise (default 0)")
    add("--model", type=Path, help="unet.pth of a trained denoiser, for the residuals")
    add("--images", type=int, default=200, help="looked at, drawn by a fixed seed (default 200)")
    add("--channels", type=int, default=1, help="of the images; 1: grey (default 1, with --model its own)")
    add_options(parser, default=None)
    add("--subsample", type=int, default=1, help="look at every n-th pixel alone (default 1)")
    add("--output", type=Path, help="folder of check.json and check.png (default: that of --model, else none)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the verdict, writes the files. Returns 0, whatever the verdict."""
    args = parse_arguments(argv)
    if min(args.images, args.channels, args.subsample) < 1:
        raise ValueError("--images, --channels and --subsample must be at least 1")
    check(args.values or "auto", "--values")
    spec, denoiser = NoiseSpec.parse(args.noise), None
    if args.model:
        denoiser, args.channels, args.values = _load_denoiser(args, spec)
    kept = args.channels if args.mixed == "keep" else None
    relatives = training_images(args.data, None, None, 0, args.stack, kept)
    values, reason = resolve(args.values or "auto", args.data, relatives, args.channels, args.max_pixels)
    print(reason, flush=True)
    chosen = np.random.default_rng(0).permutation(len(relatives))[: args.images]
    names = [relatives[place] for place in sorted(chosen)]
    images = noisy_images(args, names, spec, rule_for_reading(values, args.data))
    result = {"data": str(args.data), "noise": str(spec), "values": str(values), "subsample": args.subsample,
              "images": len(names)} | measure(images, denoiser)  # fmt: skip
    result["verdict"] = verdict(result, jpeg=all(name.lower().endswith((".jpg", ".jpeg")) for name in names))
    print("\n".join([*format_figures(result), *result["verdict"]]), flush=True)
    if folder := args.output or (args.model and args.model.parent):
        write_text(folder / "check.json", json.dumps(result, indent=1) + "\n")
        draw(result, folder / "check.png")
    return 0


def _load_denoiser(args: argparse.Namespace, spec: NoiseSpec):
    """The denoiser, its channels, and the values that it was trained with."""
    options = training_options(args.model)
    denoiser = make_denoiser("n2n", spec, args.model, distributed.device(), "fp32")
    stride = options.get("subsample", 1)
    if stride % args.subsample == 0:
        stride //= args.subsample  # the images are parted already
    denoiser = by_phases(denoiser, stride)
    return denoiser, denoiser.channels, args.values or options.get("values")


def noisy_images(args: argparse.Namespace, names: list[str], spec: NoiseSpec, values: Values):
    """Noisy images [H, W, C], float32 in [0, 1]; those that cannot be read are named and passed over."""
    for name in progress(names, desc="looking at images", unit="img"):
        try:
            image = read_noisy(args.data, name, spec, args.noise_seed, args.channels, values, args.max_pixels)
        except ImageError as error:
            print(error, flush=True)
            continue
        image = image[:: args.subsample, :: args.subsample]
        yield image / np.float32(255) if image.dtype == np.uint8 else image


# --- figures --------------------------------------------------------------------------------------------------------
def flat_patches(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches of [H, W, C] in [0, 1] without their plane [N, 16, 16], their means [N], and their structure [N].

    Structure is the variance of the means of 4x4 blocks times 16, over that of the pixels: about 1 for independent
    noise alone. Patches without any noise, such as black ones, are left out. Of more than PATCHES so many are drawn.
    """
    height, width = (side // PATCH * PATCH for side in image.shape[:2])
    cells = image[:height, :width].reshape(height // PATCH, PATCH, width // PATCH, PATCH, -1)
    patches = cells.transpose(0, 2, 4, 1, 3).reshape(-1, PATCH, PATCH)
    if len(patches) > PATCHES:
        patches = patches[np.sort(np.random.default_rng(0).choice(len(patches), PATCHES, replace=False))]
    patches = patches.astype(np.float64)
    means = patches.mean((1, 2))
    axis = np.arange(PATCH) - (PATCH - 1) / 2
    patches = patches - means[:, None, None]
    for slope in (np.broadcast_to(axis, (PATCH, PATCH)), np.broadcast_to(axis[:, None], (PATCH, PATCH))):
        weight = (patches * slope).sum((1, 2)) / (slope**2).sum()
        patches = patches - weight[:, None, None] * slope
    variance = patches.var((1, 2))
    blocks = patches.reshape(-1, PATCH // BLOCK, BLOCK, PATCH // BLOCK, BLOCK).mean((2, 4))
    noisy = variance > 1e-9
    structure = blocks.var((1, 2))[noisy] * BLOCK**2 / variance[noisy]
    return patches[noisy], means[noisy], structure


def correlations(patches: np.ndarray) -> dict[str, list[float]]:
    """Mean correlation of pixels 1 to 4 apart in patches [N, H, W] of mean zero, each weighed alike."""
    variance = np.square(patches).mean((1, 2))
    result = {}
    for name, (down, right) in DIRECTIONS.items():
        result[name] = []
        for lag in range(1, LAGS + 1):
            y, x = down * lag, right * lag
            first = patches[:, : patches.shape[1] - y, : patches.shape[2] - x]
            product = (first * patches[:, y:, x:]).mean((1, 2))
            result[name].append(round(float((product / variance).mean()), 4))
    return result


def measure(images, denoiser=None) -> dict:
    """Figures of noisy images [H, W, C] in [0, 1]: patches (how many), correlation {direction: [lag 1, ..., lag 4]},
    residual_correlation (with a denoiser, else None), brightness and deviation (of the noise, by brightness).
    ValueError where the images hold no noise to look at.
    """
    found, residuals = [], []
    for image in images:
        if min(image.shape[:2]) < PATCH:
            continue
        found.append(flat_patches(image))
        if denoiser is not None:
            residuals.append(flat_patches(_subtract_denoised(image, denoiser))[0])
    patches, means, structure = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else ([], [], [])
    if not len(patches):
        raise ValueError(f"no image holds a patch of {PATCH} x {PATCH} px that is not of one value; nothing to look at")
    flat = structure <= np.quantile(structure, QUIETEST)
    brightness, deviation = noise_by_brightness(means[flat], patches[flat])
    return {
        "patches": int(flat.sum()), "correlation": correlations(patches[flat]),
        "residual_correlation": correlations(np.concatenate(residuals)) if residuals else None,
        "brightness": brightness, "deviation": deviation,
    }  # fmt: skip


def _subtract_denoised(image: np.ndarray, denoiser) -> np.ndarray:
    return image - denoise_images(denoiser, [image], distributed.device(), eight_bit=False)[0]


def noise_by_brightness(means: np.ndarray, patches: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean brightness and standard deviation of the noise, in equal bins of the patches ordered by brightness."""
    bins = np.array_split(np.argsort(means), min(BINS, len(means)))
    brightness = [round(float(means[own].mean()), 4) for own in bins]
    return brightness, [round(float(np.sqrt(patches[own].var())), 4) for own in bins]


# --- in words -------------------------------------------------------------------------------------------------------
def strongest_correlations(correlation: dict[str, list[float]]) -> list[float]:
    """The correlation of largest size over the directions, for each lag."""
    return [max(values, key=abs) for values in zip(*correlation.values(), strict=True)]


def verdict(result: dict, jpeg: bool) -> list[str]:
    """What the figures mean, a sentence each: correlation, residuals, growth with the brightness."""
    lags = strongest_correlations(result["correlation"])
    reach = max((lag for lag, value in enumerate(lags, 1) if abs(value) > INDEPENDENT), default=0)
    sentences = [f"independent from pixel to pixel (at most {max(map(abs, lags)):.2f}): Neighbor2Neighbor is allowed"]
    if reach:
        sentences = [_describe_correlation(lags, reach)]
        if jpeg and result["noise"] == "none":
            sentences.append("the files are JPEGs, and compression correlates pixels too: take the originals")
    if result["residual_correlation"]:
        residual = strongest_correlations(result["residual_correlation"])
        sentences.append(f"residuals of the denoiser: {residual[0]:.2f} at 1 pixel (what it kept is not in them)")
    return [*sentences, _describe_growth(result)]


def is_independent_by_halves(result: dict) -> bool:
    """Whether neighbouring pixels share their noise, but every second pixel does not."""
    lags = strongest_correlations(result["correlation"])
    return abs(lags[0]) > INDEPENDENT and _independent_by_halves(lags)


def _independent_by_halves(lags: list[float]) -> bool:
    return abs(lags[1]) <= INDEPENDENT and abs(lags[3]) <= INDEPENDENT


def _describe_correlation(lags: list[float], reach: int) -> str:
    over = f"correlated over {count_of(reach, 'pixel')}{' or more' if reach == len(lags) else ''}"
    keeps = f"{over} ({lags[0]:.2f} at 1): a denoiser trained on neighbours keeps about that fraction of the noise"
    if _independent_by_halves(lags):
        return f"{keeps}; --subsample 2 makes it independent ({lags[1]:.2f} at 2 pixels)"
    return f"{keeps}; choose another one by --denoiser, see docs/denoiser.md"


def _describe_growth(result: dict) -> str:
    """How the noise grows with the brightness: the exponent of a power law of its deviation, in words."""
    known = [(m, s) for m, s in zip(result["brightness"], result["deviation"], strict=True) if m > 0.01 and s > 0]
    if len(known) < 3 or known[-1][0] < 1.2 * known[0][0]:
        return "noise by brightness: the flat patches are too alike to say"
    slope = float(np.polyfit(*np.log(known).T, 1)[0])
    words = "about the same at every brightness"
    if slope > 0.75:
        words = "it grows with the brightness, as speckle: values=log makes it alike"
    elif slope > 0.25:
        words = "it grows as the root of the brightness, as photon noise or clipped speckle"
    elif slope < -0.25:
        words = "it falls with the brightness, as where values are clipped"
    return f"noise by brightness (exponent {slope:.2f}): {words}"


if __name__ == "__main__":
    cli.run(main)
