"""What the denoiser will cost on this machine, and whether the noise is of its kind: for a plan, before any training.

    python -m Neighbor2Neighbor.outlook OPTIONS      those of Neighbor2Neighbor.train; nothing is written

Prints a line of JSON: verdict (the sentences of Neighbor2Neighbor.check, over 64 images), subsample (as asked by
--subsample; else 2 where that makes the noise independent, else 1), step_s (seconds of a training step) and megapixel_s
(of denoising 10^6 pixels), both of a few with this subsample, the first ones left out.
"""

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from Neighbor2Neighbor.check import is_independent_by_halves, measure, noisy_images, verdict
from Neighbor2Neighbor.data import choose_crop, make_loader, training_images
from Neighbor2Neighbor.denoisers import UNetDenoiser, by_phases, denoise_images
from Neighbor2Neighbor.train import Training, parse_arguments
from utils import cli, distributed, values
from utils.noise import NoiseSpec
from utils.sampler import IterationSampler, spread_evenly

IMAGES = 64  # looked at
SECONDS = 2.0  # of training steps, and of denoising
PIXELS = 2**24  # of the images that are kept to be denoised


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.data = Path(args.data)
    spec, kept = NoiseSpec.parse(args.noise), args.channels if args.mixed == "keep" else None
    relatives = training_images(args.data, args.subset, args.sides, args.seed, args.stack, kept)
    rule, _ = values.resolve(args.values, args.data, relatives, args.channels, args.max_pixels)
    sample, args.values = [relatives[i] for i in spread_evenly(len(relatives), IMAGES)], str(rule)
    images: list[np.ndarray] = []
    looked_at = _keep_some(noisy_images(args, sample, spec, values.rule_for_reading(rule, args.data)), images)
    found = judge_noise(looked_at, str(spec), sample)
    args.subsample = found["subsample"] = args.subsample if args.subsample > 1 else found["subsample"]
    training = Training(args, sample, choose_crop(args.data, sample, args.crop, args.depth, args.subsample))
    found |= {"step_s": seconds_per_step(training), "megapixel_s": seconds_per_megapixel(training, images)}
    print(json.dumps(found))
    return 0


def _keep_some(images: Iterable[np.ndarray], kept: list[np.ndarray]) -> Iterator[np.ndarray]:
    """All of the images; the first ones, up to about PIXELS, are also put into `kept`."""
    for image in images:
        if sum(one.shape[0] * one.shape[1] for one in kept) < PIXELS:
            kept.append(image)
        yield image


def judge_noise(images: Iterable[np.ndarray], noise: str, names: list[str]) -> dict:
    """verdict: the sentences on the noise; subsample: 2 where only every second pixel has independent noise, else 1."""
    try:
        result = measure(images) | {"noise": noise}
    except ValueError as error:
        return {"verdict": [str(error)], "subsample": 1}
    jpeg = all(name.lower().endswith((".jpg", ".jpeg")) for name in names)
    return {"verdict": verdict(result, jpeg), "subsample": 2 if is_independent_by_halves(result) else 1}


def seconds_per_step(training: Training) -> float:
    """Of a training step with its crops: the mean over SECONDS, the first step left out."""
    batch, seed = training.args.batch_size, training.args.seed
    order = IterationSampler(len(training.crops), batch, seed, option="--batch-size ")
    done, started = 0, 0.0
    for crops in make_loader(training.crops, order, 0, pin=False):
        if isinstance(crops, str):
            raise ValueError(crops)
        training.train_step(crops.to(training.device))
        _synchronize()
        if not started:  # the first one also sets up what the others find
            started = time.perf_counter()
        elif time.perf_counter() - started > SECONDS:
            return (time.perf_counter() - started) / (done + 1)
        else:
            done += 1
    raise AssertionError("the order of images has no end")


def seconds_per_megapixel(training: Training, images: list[np.ndarray]) -> float:
    """Of denoising; the first image, which also sets up what the others find, is denoised twice and counted once."""
    denoiser = by_phases(UNetDenoiser(training.network, training.device, "fp32"), training.args.subsample)
    pixels, started = 0, 0.0
    for image in [images[0], *images]:
        denoise_images(denoiser, [image], distributed.device())
        pixels += image.shape[0] * image.shape[1] if started else 0
        started = started or time.perf_counter()
        if time.perf_counter() - started > SECONDS:
            break
    return 1e6 * (time.perf_counter() - started) / max(pixels, 1)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    cli.run(main)
