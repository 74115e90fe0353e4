"""Denoise a tree of images: the same relative paths under another root, as PNG, WebP or NPY.

    python -m Neighbor2Neighbor.denoise --model DIR/unet.pth --data mini-imagenet --noise gauss255
    python -m Neighbor2Neighbor.denoise --model DIR/unet.pth --data noisy_mini-imagenet-gauss255 --noise none
    torchrun --nproc-per-node 4 -m Neighbor2Neighbor.denoise ...       (or --shard 0/4 ... --shard 3/4 by hand)

Both read the same noisy bytes: the first adds the fixed noise while loading. Decoding, noise and encoding run in
processes beside the network. The tree may be killed at any time; the same command goes on with what is missing.
"""

import argparse
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from Neighbor2Neighbor.data import read_noisy, read_or_message
from Neighbor2Neighbor.denoisers import (
    TILE,
    Denoiser,
    by_phases,
    denoise_images,
    make_denoiser,
    padded_size,
    training_options,
)
from utils import cli, distributed, images
from utils.memory import keep_freed_memory
from utils.noise import EXAMPLES, NoiseSpec
from utils.progress import Progress
from utils.results import VERSION
from utils.text import count_of
from utils.trees import TreeWriter, report_errors
from utils.values import Values, add_options, check, is_consistent, is_deep, manifest_entry, resolve, rule_for_reading
from utils.workers import worker_pool

BLOCK = 256  # images planned together: batches of like sizes are made within a block, whatever is done already
AHEAD = 3  # batches decoded ahead of the network


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="weights: unet.pth of a training, or a published .pth")
    parser.add_argument("--data", type=Path, required=True, help="tree of images: clean with --noise, or noisy")
    parser.add_argument("--noise", required=True, help=f"noise added while loading ({EXAMPLES}); none: images as are")
    parser.add_argument("--noise-seed", type=int, default=0, help="seed of the fixed noise (default 0)")
    parser.add_argument("--output", type=Path, help="tree to write (default noisy_<data>-<noise>-denoised)")
    parser.add_argument("--denoiser", default="n2n", help="n2n, nlm, or package.module:Class (default n2n)")
    batch = 8 if torch.cuda.is_available() else 1
    parser.add_argument("--batch-size", type=int, default=batch, help="of 512x512 px, or as many pixels (GPU 8, CPU 1)")
    parser.add_argument("--tile", type=int, default=TILE, help="larger images go in tiles of this side, px")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the network (default fp32)")
    kinds = (
        "png, webp: rounded to uint8, 1 or 3 channels; npy: float32 in [0, 1], any channels "
        "(default: npy for images of more than 8 bits, else png)"
    )
    parser.add_argument("--format", choices=images.FORMATS, help=kinds)
    parser.add_argument("--subsample", type=int, help="each n-th pixel by itself (default: as the model was trained)")
    add_options(parser, default=None)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes; 0: none")
    parser.add_argument("--shard", default="0/1", help="i/n: this process does the i-th of n parts (default 0/1)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Denoises one tree (or this process's part). Returns 0, or 2 where single images could not be read."""
    args = parse_arguments(argv)
    spec = NoiseSpec.parse(args.noise)
    shard, shards = _parse_shard(args.shard)
    if min(args.batch_size, args.tile, args.subsample or 1) < 1:
        raise ValueError("--batch-size, --tile and --subsample must be at least 1")
    relatives = images.list_images(args.data, args.stack)
    images.check_collisions(relatives)
    source = images.describe_source(args.data, spec, args.noise_seed)
    target = args.output or images.denoised_root(args.data, spec)
    text = _choose_values(args)
    stride = args.subsample or training_options(args.model).get("subsample", 1)
    device = distributed.device()
    keep_freed_memory()
    with worker_pool(args.workers) as pool:
        denoiser = make_denoiser(args.denoiser, spec, args.model, device, args.precision)
        denoiser = by_phases(denoiser, stride)
        if args.mixed == "keep":
            relatives, left_out = images.of_channels(args.data, relatives, denoiser.channels)
            print(left_out, end="\n" if left_out else "", flush=True)
        values, reason = resolve(text, args.data, relatives, denoiser.channels, args.max_pixels)
        print(reason, flush=True)
        deep = values.kind != "full" or is_deep(args.data, relatives, denoiser.channels, args.max_pixels)
        form = args.format or ("npy" if deep else "png")
        images.check_format(form, denoiser.channels)
        fields = source | {
            "kind": "denoised", "denoiser": denoiser.identity, "precision": args.precision, "format": form,
            "version": VERSION,
        } | manifest_entry(values)  # fmt: skip
        writer = TreeWriter(args.data, target, relatives, fields, form)
        scale = rule_for_reading(values, args.data)
        read = partial(
            read_noisy, args.data, spec=spec, noise_seed=args.noise_seed, channels=denoiser.channels, values=scale,
            max_pixels=args.max_pixels,
        )  # fmt: skip
        with writer.at_work(f"-{shard}-of-{shards}" if shards > 1 else "") as begun:
            if not begun:
                return 0
            run = TreeRun(args.data, writer, read, denoiser, device, args.tile, args.batch_size)
            if errors := run.denoise(pool, shard, shards):
                return report_errors(errors, "denoised", f"{target} is")
            missing = writer.finish()
    assert not missing or shards > 1, f"{missing} images were neither written nor named"
    if missing:
        print(f"{target}: this shard is done, {count_of(missing, 'image')} of other shards still to come", flush=True)
    else:
        print(f"{target}: {count_of(len(relatives), 'image')}", flush=True)
    return 0


def _choose_values(args: argparse.Namespace) -> str:
    """--values, or those of the training that wrote the model, which must agree; auto where neither is given."""
    if args.values is not None:
        check(args.values, "--values")
    trained = training_options(args.model).get("values")
    if trained is None or args.values is None or is_consistent(args.values, Values.parse(trained)):
        return trained or args.values or "auto"
    raise ValueError(f"{args.model} was trained with values {trained}, not {args.values}; leave --values out")


def _parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of --shard, or the rank and the number of ranks."""
    if text == "0/1":
        return distributed.read_launcher()
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard {text} is not i/n with i in 0..n-1, such as 0/4")
    return int(index), int(count)


class TreeRun:
    """One pass over a tree. Every batch is a function of the list of images alone, so that a pass which was killed and
    taken up again puts each image through the network in the same company, and ends with the same bytes.
    """

    def __init__(
        self, source: Path, writer: TreeWriter, read: Callable[[str], np.ndarray],
        denoiser: Denoiser, device: torch.device, tile: int, batch_size: int,
    ):  # fmt: skip
        self.source, self.writer, self.read, self.denoiser = source, writer, read, denoiser
        self.device, self.tile, self.batch_size = device, tile, batch_size
        self.errors: list[str] = []

    def denoise(self, pool: Executor, shard: int = 0, shards: int = 1) -> list[str]:
        """Denoise the images of this shard that are missing; returns a line for each image that cannot be read."""
        relatives, missing = self.writer.relatives, self.writer.missing
        blocks = [relatives[k : k + BLOCK] for k in range(0, len(relatives), BLOCK)][shard::shards]
        total = sum(map(len, blocks))
        finished = total - sum(relative in missing for block in blocks for relative in block)
        batches = self._plan(pool, blocks)
        decoding: deque[tuple[list[str], list[Future]]] = deque()
        with Progress(total, f"denoising {self.writer.root.name}", "img", finished, enabled=shard == 0) as bar:
            while True:
                for batch in islice(batches, AHEAD - len(decoding)):
                    decoding.append((batch, [pool.submit(read_or_message, self.read, name) for name in batch]))
                if not decoding:
                    break
                batch, futures = decoding.popleft()
                self._write_denoised(pool, batch, [future.result() for future in futures])
                bar.update(sum(relative in missing for relative in batch))
            self.writer.wait()
        return self.errors

    def _plan(self, pool: Executor, blocks: list[list[str]]) -> Iterator[list[str]]:
        """Batches of one padded size that hold at least one missing image."""
        for block in blocks:
            if self.writer.missing.isdisjoint(block):
                continue
            groups: dict[tuple[int, int], list[str]] = {}
            sizes = [pool.submit(read_or_message, images.image_size, self.source / relative) for relative in block]
            for relative, size in zip(block, sizes, strict=True):
                if isinstance(shape := size.result(), str):
                    self.errors.append(shape)
                else:
                    groups.setdefault(padded_size(*shape, multiple=self.denoiser.multiple), []).append(relative)
            for (height, width), members in groups.items():
                number = max(1, self.batch_size * 512 * 512 // (height * width))
                for k in range(0, len(members), number):
                    batch = members[k : k + number]
                    if not self.writer.missing.isdisjoint(batch):
                        yield batch

    def _write_denoised(self, pool: Executor, batch: list[str], decoded: list[np.ndarray | str]) -> None:
        self.errors += [error for error in decoded if isinstance(error, str)]
        whole = {name: image for name, image in zip(batch, decoded, strict=True) if not isinstance(image, str)}
        if whole:
            eight_bit = self.writer.format != "npy"
            denoised = denoise_images(self.denoiser, list(whole.values()), self.device, self.tile, eight_bit)
            for relative, image in zip(whole, denoised, strict=True):
                self.writer.write(pool, relative, image)


if __name__ == "__main__":
    cli.run(main)
