"""Write noisy copies of a tree of images: noisy_<source>-<noise>/ with the same relative paths, as PNG, WebP or NPY.

    python utils/generate_noise.py                                   all nine noises of mini-imagenet/ in this folder
    python utils/generate_noise.py --source DIR --noise gauss255 shot3

Training needs none of it: noise is added while loading, with the same bytes. The noise of an image depends on the
seed, the noise and the image's relative path alone, so that the number of workers, the order and the machine make no
difference. A run that was killed goes on with the same command; manifest.json in a tree says that it is finished.
Images of more than 8 bits take their noise in float32: npy files hold it as it is, png and webp round it to 8 bits.
"""

import argparse
import math
import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python then looks for modules beside it, not in the project's folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from utils import cli, images
from utils.noise import ALL_NOISES, EXAMPLES, NoiseSpec, keyed_noise, noise_key
from utils.progress import Progress
from utils.results import VERSION
from utils.sampler import spread_evenly
from utils.text import count_of
from utils.trees import TreeWriter, report_errors
from utils.values import FULL, Values, add_options, check, manifest_entry, resolve
from utils.workers import map_unordered, worker_pool

SAMPLE = 8  # at most so many images are encoded in memory, to foresee the size on disk


@dataclass(frozen=True)
class Job:
    """What a worker needs to know: which tree it reads, and which tree it writes for each noise."""

    source: Path
    targets: dict[NoiseSpec, Path]
    seed: int
    format: str
    channels: int
    values: Values = FULL
    max_pixels: int = images.MAX_PIXELS

    def read(self, relative: str) -> np.ndarray:
        return images.read_image(self.source / relative, self.channels, "native", self.values, self.max_pixels)

    def noisy(self, image: np.ndarray, spec: NoiseSpec, relative: str) -> np.ndarray:
        """The noisy twin as it is written: what loading gives, rounded to 8 bits where the format has no more."""
        noisy = keyed_noise(image, spec, self.seed, noise_key(relative))
        return noisy if self.format == "npy" else images.eight_bit(noisy)


@dataclass
class Written:
    """What became of one image: bytes on disk, signal power and noise power for each noise, or an error."""

    bytes: int
    powers: dict[NoiseSpec, tuple[float, float]]
    error: str | None = None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("mini-imagenet"), help="tree (default mini-imagenet)")
    parser.add_argument("--noise", nargs="+", default=ALL_NOISES, help=f"such as {EXAMPLES} (default: all nine)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0, as while loading)")
    parser.add_argument("--output-root", type=Path, help="folder of the noisy trees (default: beside the source)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0: none (default: cores)")
    kinds = "png, webp: uint8, 1 or 3 channels; npy: any channels, float32 of images above 8 bits (default png)"
    parser.add_argument("--format", choices=images.FORMATS, default="png", help=kinds)
    parser.add_argument("--channels", type=int, default=3, help="of the images; 1: grey (default 3)")
    add_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Write the trees. Returns 0, or 2 where single images could not be read; all others are written then."""
    args = parse_arguments(argv)
    specs = list(dict.fromkeys(NoiseSpec.parse(text) for text in args.noise))
    if any(spec.kind == "none" for spec in specs):
        raise ValueError("noise 'none' adds nothing: use the source itself")
    if min(args.seed, args.workers) < 0:
        raise ValueError("--seed and --workers must not be negative")
    if args.channels < 1:
        raise ValueError(f"--channels {args.channels} must be at least 1")
    images.check_format(args.format, args.channels)
    check(args.values, "--values")
    relatives = images.list_images(args.source, args.stack)
    if args.mixed == "keep":
        relatives, left_out = images.of_channels(args.source, relatives, args.channels)
        print(left_out, end="\n" if left_out else "", flush=True)
    images.check_collisions(relatives)
    targets = {spec: _choose_target(args, spec) for spec in specs}
    values, reason = resolve(args.values, args.source, relatives, args.channels, args.max_pixels)
    print(reason, flush=True)
    job = Job(args.source, targets, args.seed, args.format, args.channels, values, args.max_pixels)
    writers = {
        spec: TreeWriter(args.source, target, relatives, _manifest_fields(job, spec), args.format)
        for spec, target in targets.items()
    }
    missing = {name: [spec for spec in specs if name in writers[spec].missing] for name in relatives}
    missing = {name: lacking for name, lacking in missing.items() if lacking}
    if missing:
        _check_disk(job, missing)  # before anything is written
    with ExitStack() as held:
        begun = [writer for writer in writers.values() if held.enter_context(writer.at_work())]
        if errors := _write_all(job, missing, args.workers) if missing else []:
            return report_errors(errors, "read", "the trees are")
        for writer in begun:
            left = writer.finish()
            assert not left, f"{left} images of {writer.root} were neither written nor named"
    return 0


def _choose_target(args: argparse.Namespace, spec: NoiseSpec) -> Path:
    root = images.noisy_root(args.source, spec)
    return root if args.output_root is None else args.output_root / root.name


def _manifest_fields(job: Job, spec: NoiseSpec) -> dict:
    source = images.describe_source(job.source, spec, job.seed) | manifest_entry(job.values)
    return source | {"kind": "noisy", "format": job.format, "channels": job.channels, "version": VERSION}


def _check_disk(job: Job, missing: dict[str, list[NoiseSpec]]) -> None:
    """ValueError where the disk cannot hold what is to be written, foreseen from a few of the images."""
    names = list(missing)
    size, count = 0, 0
    for index in spread_evenly(len(names), min(SAMPLE, 1 + len(names) // 32)):
        try:
            image = job.read(names[index])
        except images.ImageError:
            continue  # named when its turn comes
        for spec in missing[names[index]]:
            content = images.encode_image(job.noisy(image, spec, names[index]), job.format)
            size, count = size + len(content), count + 1
    files = sum(len(specs) for specs in missing.values())
    needed = size / max(count, 1) * files
    root = next(iter(job.targets.values())).parent
    free = shutil.disk_usage(next(path for path in (root, *root.resolve().parents) if path.exists())).free
    about, left = _format_bytes(needed), _format_bytes(free)
    print(f"{count_of(files, 'image')} to write, about {about}; {left} free", flush=True)
    if needed > free:
        raise ValueError(
            f"{root} has {left} free, and about {about} are needed; name another --output-root or fewer noises, or do "
            "without: training adds the noise while loading"
        )


def _format_bytes(number: float) -> str:
    power = min(4, int(math.log10(max(number, 1)) // 3))
    return f"{number / 1000**power:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _write_all(job: Job, missing: dict[str, list[NoiseSpec]], workers: int) -> list[str]:
    """Write what is missing and print each noise's SNR. Returns a line for each image that cannot be read."""
    errors, written = [], 0
    powers = {spec: np.zeros(2) for spec in job.targets}
    files = sum(len(specs) for specs in missing.values())
    with worker_pool(workers) as pool, Progress(files, "adding noise", "img") as bar:
        for result in map_unordered(pool, partial(_write_twins, job), missing.items(), window=4 * max(workers, 1)):
            if result.error is not None:
                errors.append(result.error)
                continue
            written += result.bytes
            for spec, power in result.powers.items():
                powers[spec] += power
            bar.update(len(result.powers), written=_format_bytes(written))
    for spec, (signal, noise) in powers.items():
        if signal > 0 and noise > 0:
            print(f"{spec}: SNR {10 * math.log10(signal / noise):.2f} dB over the images written", flush=True)
    return errors


def _write_twins(job: Job, item: tuple[str, list[NoiseSpec]]) -> Written:
    """Decode one image and write its noisy twins (in a worker process)."""
    relative, specs = item
    try:
        image = job.read(relative)
    except images.ImageError as error:
        return Written(0, {}, str(error))
    result = Written(0, {})
    clean = images.grey_levels(image).astype(np.float32, copy=False)
    for spec in specs:
        noisy = job.noisy(image, spec, relative)
        path = images.twin(job.targets[spec], relative, f".{job.format}")
        result.bytes += images.write_image(path, noisy, job.format)
        difference = clean - images.grey_levels(noisy)
        result.powers[spec] = (float(np.vdot(clean, clean)), float(np.vdot(difference, difference)))
    return result


if __name__ == "__main__":
    cli.run(main)
