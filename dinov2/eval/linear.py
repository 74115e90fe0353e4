"""Linear probe, the main metric: linear classifiers on a frozen backbone, trained as in the public DINOv2.

    python -m dinov2.eval.linear run=runs/nct-gauss255 checkpoints=all
    python -m dinov2.eval.linear run=runs/nct-gauss255 checkpoints=all eval.linear.protocol=cached

One forward pass feeds 52 classifiers: 13 learning rates, CLS tokens of the last 1 or 4 blocks, with and without the
mean patch token. The best one on the validation images is reported, with the figures of all. protocol=exact draws a new
crop each time a training image is used; protocol=cached computes features of a few such crops once and uses them in
turn. A killed probe resumes where it was.
"""

import io
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dinov2.checkpoint import load_tensors
from dinov2.data.eval_transforms import RandomCrop, draw_crops, spread_crops
from dinov2.data.loader import make_loader
from dinov2.eval import common
from dinov2.eval.features import (
    LAST_BLOCKS,
    Features,
    autocast,
    block_tokens,
    extract,
    gather_hits,
    labelled_dataset,
    ordered_batches,
    resident_images,
)
from dinov2.eval.probes import Probes
from utils import distributed
from utils.files import atomic_path, naming_errors
from utils.locks import process_tag
from utils.progress import Progress
from utils.sampler import IterationSampler

SAVE_SECONDS = 300  # between saves of a probe's state
OPTION = "eval.batch_size="  # that the ranks must divide
CHUNK = 2048  # validation images at a time: 2,048 x 52 x 1,000 logits are 400 MiB
Source = Iterator[tuple[Tensor, Tensor]]  # this rank's features [B, F] and labels [B] of successive iterations


def evaluate(backbone: nn.Module, cfg: DictConfig, job: common.Job) -> Iterator[common.Result]:
    """Yields linear_top1 (percent) of the best classifier; details: its name, top-5, and the top-1 of every classifier.

    Raises ValueError as `extract` does.
    """
    probe = cfg.eval.linear
    # First, because broken weights show here, before hours of training.
    val = extract(backbone, cfg, "val", block_tokens)
    rates = [rate * cfg.eval.batch_size / 256 for rate in probe.learning_rates]
    blocks, width = min(LAST_BLOCKS, len(backbone.blocks)), backbone.embed_dim
    averages = val.values.shape[1] > blocks * width
    probes = Probes(blocks, width, len(val.classes), rates, cfg.seed, val.values.device, averages)
    total = probe.epochs * probe.epoch_length
    state = job.scratch(f"linear-{common.settings_hash('linear', cfg)}.pth")
    start = resume(probes, state)
    if start < total:
        if probe.protocol == "exact":
            source = exact_source(backbone, cfg, start, total)
        else:
            source = cached_source(backbone, cfg, start, job.scratch(f"features.tmp-{process_tag()}"))
        train(probes, source, start, total, state)
    value, details, hits = summary(probes, val, probe.protocol)
    yield "linear_top1", value, details | common.accuracy_details(hits, val, backbone, cfg)
    if distributed.is_main():
        state.unlink(missing_ok=True)


def train(probes: Probes, source: Source, start: int, total: int, state: Path) -> None:
    """Trains from iteration `start` to `total`; saves the state every SAVE_SECONDS and at the end."""
    saved = time.monotonic()
    with Progress(total, "linear probe", "it", initial=start, enabled=distributed.is_main()) as bar:
        for iteration in range(start, total):
            features, labels = next(source)
            probes.step(features, labels, iteration / total)
            if distributed.is_main() and (time.monotonic() - saved >= SAVE_SECONDS or iteration == total - 1):
                save(probes, iteration + 1, state)
                saved = time.monotonic()
            bar.update(1)


def save(probes: Probes, iteration: int, path: Path) -> None:
    """Saves weights, momenta and the number of iterations done, atomically. The ranks' classifiers are equal."""
    buffer = io.BytesIO()  # first to memory, because torch raises no OSError on a full disk
    torch.save({"iteration": iteration} | probes.state_dict(), buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def resume(probes: Probes, path: Path) -> int:
    """Loads a saved state, if there is one. Returns the number of iterations done."""
    if not path.is_file():
        return 0
    content = load_tensors(path)
    probes.load_state_dict(content)
    return content["iteration"]


def summary(probes: Probes, val: Features, protocol: str) -> tuple[float, dict, Tensor]:
    """Best top-1 in percent, details, and which images the best classifier gets right, bool [N]. The ranks share the
    validation images."""
    rows = slice(distributed.rank(), None, distributed.world_size())
    parts = zip(val.values[rows].split(CHUNK), val.labels[rows].split(CHUNK), strict=True)
    own = torch.cat([probes.hits(*part) for part in parts], dim=2)  # a rank without an image has one empty part
    hits = gather_hits(own, len(val.labels))  # [classifiers, 2, N]
    percent = hits.sum(dim=2).cpu().double() * 100 / len(val.labels)
    best = int(percent[:, 0].argmax())
    classifiers = {name: round(float(value), 4) for name, value in zip(probes.names, percent[:, 0], strict=True)}
    details = {"protocol": protocol, "classifier": probes.names[best], "top5": float(percent[best, 1])}
    return float(percent[best, 0]), details | {"classifiers": classifiers}, hits[best, 0]


def exact_source(backbone: nn.Module, cfg: DictConfig, start: int, stop: int) -> Source:
    """A new random crop and flip of each image each time. Iteration i depends only on (seed, i): resumable."""
    dataset, resident = labelled_dataset(cfg, "train"), resident_images(cfg, "train")
    rank, ranks, batch_size = distributed.rank(), distributed.world_size(), cfg.eval.batch_size
    transform = RandomCrop(cfg.eval.crop, cfg.data.mean, cfg.data.std)
    device = distributed.device()
    loader = make_loader(
        dataset, batch_size, cfg.seed, start, stop, rank, ranks, cfg.data.workers, device, resident, option=OPTION
    )
    for batch in loader:
        drawn = draw_crops(batch_size, _make_generator(cfg.seed, 0, batch.iteration))  # for any number of ranks
        images = transform(batch.canvases[0], batch.sizes, drawn.chunk(ranks)[rank])
        with torch.inference_mode(), autocast(cfg):
            features = block_tokens(backbone, images)
        yield features, batch.labels.to(features.device, non_blocking=True)


def cached_source(backbone: nn.Module, cfg: DictConfig, start: int, file: Path) -> Source:
    """Features of a few random crops of each image, computed once; each pass over the images takes the next crop.

    The V crops of an image scatter about their mean with (V - 1) / V of the variance of fresh crops. The rest is added
    at each use, as in a smoothed bootstrap: the deviation of a random crop of another image from that image's mean,
    divided by sqrt(V - 1); nothing if V is 1. Iteration i depends only on (seed, i): resumable.
    """
    values, labels = cache_crops(backbone, cfg, file)  # [V, N, F]
    crops, n, _ = values.shape
    batch_size, rank, ranks = cfg.eval.batch_size, distributed.rank(), distributed.world_size()
    means = average_crops(values) if crops > 1 else None  # [N, F]
    rank_batch_size, device = batch_size // ranks, distributed.device()
    for iteration, indices in IterationSampler(n, batch_size, cfg.seed, rank, ranks, start, option=OPTION):
        first = iteration * batch_size + rank * rank_batch_size
        passes = torch.arange(first, first + rank_batch_size) // n
        rows = torch.tensor(indices)
        features = values[passes % crops, rows].float()
        if means is not None:
            drawn = _make_generator(cfg.seed, 2, iteration)  # for any number of ranks
            others = torch.randint(n, (batch_size,), generator=drawn).chunk(ranks)[rank]
            of_these = torch.randint(crops, (batch_size,), generator=drawn).chunk(ranks)[rank]
            features.add_(values[of_these, others] - means[others], alpha=(crops - 1) ** -0.5)
        yield features.to(device, non_blocking=True), labels[rows].to(device, non_blocking=True)


def average_crops(values: Tensor) -> Tensor:
    """[V, N, F] float16 -> [N, F] float32; one crop after another, as the file may exceed the memory."""
    means = torch.zeros(values.shape[1:])
    for crop in values:
        means.add_(crop)
    return means.div_(len(values))


def count_crops(cfg: DictConfig, images: int) -> int:
    """Crops per image for eval.linear.cached_fraction of the exact protocol's forward passes; at least one."""
    probe = cfg.eval.linear
    passes = probe.epochs * probe.epoch_length * cfg.eval.batch_size / images
    return max(1, round(probe.cached_fraction * passes))


@torch.inference_mode()
def cache_crops(backbone: nn.Module, cfg: DictConfig, file: Path) -> tuple[Tensor, Tensor]:
    """Features of V crops of each training image: float16 [V, N, F], and labels [N], on the CPU.

    Above eval.linear.cache_gib they are in `file`, which disappears with the process. float16 halves the size and
    rounds by 0.05 %, far below the spread between crops. Each rank computes a part of them, and holds all.
    """
    dataset, resident = labelled_dataset(cfg, "train"), resident_images(cfg, "train")
    crops, ranks = count_crops(cfg, len(dataset)), distributed.world_size()
    transform = RandomCrop(cfg.eval.crop, cfg.data.mean, cfg.data.std)
    size = max(1, cfg.eval.batch_size // ranks)
    total, values = crops * -(-len(dataset) // (size * ranks)), None
    with Progress(total, f"features of {crops} crops per image", "batch", enabled=distributed.is_main()) as bar:
        for k, batch in enumerate(ordered_batches(cfg, dataset, resident, size)):
            draws = spread_crops(len(batch.sizes), crops, _make_generator(cfg.seed, 1, k * ranks + distributed.rank()))
            for crop, drawn in enumerate(draws):
                with autocast(cfg, quick=True):
                    rows = block_tokens(backbone, transform(batch.canvases[0], batch.sizes, drawn))
                if values is None:
                    values = _allocate((crops, len(dataset), rows.shape[1]), cfg.eval.linear.cache_gib, file)
                values[crop, batch.indices] = rows.cpu().half()
                bar.update(1)
    if ranks > 1:  # each row comes from one rank and is zero on the others
        for part in values.flatten(0, 1).split(CHUNK):
            part.copy_(distributed.all_reduce_sum(part.to(distributed.device(), torch.float32)))
    assert values is not None, "no images"
    return values, torch.from_numpy(dataset.labels)


def _allocate(shape: tuple[int, int, int], limit_gib: float, file: Path) -> Tensor:
    """Zeros of float16: in memory or, above the limit, in a file that is mapped."""
    size = 2 * math.prod(shape)  # bytes
    if size <= limit_gib * 2**30:
        return torch.zeros(shape, dtype=torch.float16)
    try:
        with naming_errors(file), open(file, "wb") as created:
            if hasattr(os, "posix_fallocate"):  # a disk that fills up under a mapping would kill the process
                os.posix_fallocate(created.fileno(), 0, size)
            created.truncate(size)
        mapped = np.memmap(file, np.float16, "r+", shape=shape)
    finally:
        file.unlink(missing_ok=True)  # the mapping keeps it alive; nothing is left, however the process ends
    return torch.from_numpy(mapped)


def _make_generator(seed: int, stream: int, number: int) -> torch.Generator:
    """A CPU generator that depends only on these three."""
    mixed = np.random.SeedSequence((seed, stream, number)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> 1))


if __name__ == "__main__":
    common.main("linear", evaluate, __doc__)
