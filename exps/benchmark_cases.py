"""What exps/benchmark.py times. Every case is a factory: case(job, **options) → Case, built in a process of its own."""

from __future__ import annotations

import importlib.util
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.flop_counter import FlopCounterMode

from dinov2.data.augment import Augment
from dinov2.data.dataset import dataset_from_config
from dinov2.data.eval_transforms import RandomCrop, draw_crops
from dinov2.data.loader import make_loader
from dinov2.data.masking import sample_masks
from dinov2.eval.features import LAST_BLOCKS, autocast, block_tokens
from dinov2.eval.probes import Probes
from dinov2.models.vision_transformer import build_backbone
from dinov2.objectives import DINOv2
from dinov2.objectives.objective import GLOBAL_CROPS, CropBatch, Objective
from dinov2.train.anchor import with_anchor
from dinov2.train.trainer import Trainer
from Neighbor2Neighbor.denoisers import UNetDenoiser, denoise_images
from Neighbor2Neighbor.subsample import draw_pairs, neighbor_loss
from Neighbor2Neighbor.unet import UNet
from utils import precision as precisions
from utils.images import read_image
from utils.noise import NoiseSpec, keyed_noise
from utils.results import read_json_lines

PROBE_CLASSES = 100
PHOTO = (375, 500)  # height and width of most of ImageNet, px


@dataclass(frozen=True)
class Job:
    """What every case is told: the configuration, the device and a folder of JPEG photographs, train/ and val/."""

    config: str
    device: str
    photographs: str

    @property
    def cfg(self) -> DictConfig:
        return OmegaConf.create(self.config)

    def with_precision(self, precision: str) -> DictConfig:
        cfg = self.cfg
        cfg.train.precision, cfg.output_dir = precision, tempfile.mkdtemp()
        return cfg

    def files(self) -> list[Path]:
        return sorted(Path(self.photographs, "train").rglob("*.jpg"))


@dataclass(frozen=True)
class Case:
    """step(): the unit of work that is timed, over `images` images. A step may return figures of its own."""

    step: Callable[[], dict | None]
    images: int


def write_photographs(root: Path, number: int) -> None:
    """`number` JPEGs of 500 x 375 px below root/{train,val}: random parts of scikit-learn's two photographs."""
    photos = [Image.fromarray(array) for array in load_sample_images().images]  # 640 x 427
    rng = np.random.default_rng(0)
    for k in range(number):
        photo = photos[k % 2]
        width = int(rng.integers(320, 560))
        height = width * PHOTO[0] // PHOTO[1]
        left, top = int(rng.integers(0, photo.width - width)), int(rng.integers(0, photo.height - height))
        part = photo.crop((left, top, left + width, top + height)).resize(PHOTO[::-1], Image.Resampling.BICUBIC)
        path = root / ("val" if k == number - 1 else "train") / "photo" / f"{k:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.save(path, quality=92)


# --- training step --------------------------------------------------------------------------------------------------
def random_batch(cfg: DictConfig, images: int, device: str) -> CropBatch:
    """Random crops of `images` images in both views, masked as in training."""
    side, grid = cfg.crops.global_size, cfg.crops.global_size // cfg.model.patch_size
    masks = sample_masks(
        GLOBAL_CROPS * images, (grid, grid), cfg.ibot.mask_probability, tuple(cfg.ibot.mask_ratio), random.Random(0)
    )
    channels, locals_ = cfg.data.in_chans, cfg.crops.local_number * images
    return CropBatch(
        global_crops=torch.randn(GLOBAL_CROPS * images, channels, side, side, device=device),
        local_crops=torch.randn(locals_, channels, cfg.crops.local_size, cfg.crops.local_size, device=device),
        masks=torch.from_numpy(masks).to(device),
        other_global_crops=torch.randn(GLOBAL_CROPS * images, channels, side, side, device=device),
    )


def build_model(cfg: DictConfig, anchored: bool) -> Objective:
    torch.manual_seed(0)
    return with_anchor(DINOv2)(cfg, weight=1.0) if anchored else DINOv2(cfg)


def training_step(job: Job, precision: str, anchored: bool = False) -> Case:
    """Forward, backward, clipping, AdamW and EMA of one batch; anchored: of NCT."""
    cfg = job.with_precision(precision)
    trainer = Trainer(cfg, build_model(cfg, anchored), dataset=None, stop_epoch=1)
    size = cfg.train.batch_size // cfg.train.accumulate
    batches = [random_batch(cfg, size, job.device) for _ in range(cfg.train.accumulate)]

    def step() -> None:
        trainer.step(0, iter(batches))

    return Case(step, cfg.train.batch_size)


def step_flops(job: Job, anchored: bool) -> float:
    """Floating-point operations of a training step for one image: all matrix products, counted on a CPU."""
    cfg, images = job.cfg, 2
    model, batch = build_model(cfg, anchored).train(), random_batch(cfg, images, "cpu")
    with FlopCounterMode(display=False) as counter:
        model(batch, 0.05)[0].backward()
    return counter.get_total_flops() / images


def compared(job: Job, file: str, function: str, **options: str) -> Case:
    """A case from another file: function(cfg, device, ...) → step, over a batch or over the list of photographs."""
    spec = importlib.util.spec_from_file_location("compared", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if function == "data":
        files = job.files()[:16]
        return Case(module.data(job.cfg, files), len(files))
    return Case(module.step(job.cfg, job.device, **options), job.cfg.train.batch_size)


# --- data path ------------------------------------------------------------------------------------------------------
def decode(job: Job, noise: str) -> Case:
    """A worker's part: JPEGs decoded, the noise added."""
    spec, files = NoiseSpec.parse(noise), job.files()[:16]

    def step() -> None:
        for path in files:
            keyed_noise(read_image(path), spec, 0, path.name)

    return Case(step, len(files))


def crops(job: Job, noise: str | None = None) -> Case:
    """All crops of an image, cut, augmented, normalised on the device; with `noise` decoding and noise before that."""
    cfg, files = job.cfg, job.files()[:16]
    augment = Augment(cfg.crops, cfg.data.mean, cfg.data.std)
    sizes = torch.tensor([PHOTO] * len(files))
    generator = torch.Generator().manual_seed(0)

    def canvas() -> torch.Tensor:
        images = [read_image(path) for path in files]
        if noise:
            images = [keyed_noise(x, NoiseSpec.parse(noise), 0, p.name) for x, p in zip(images, files, strict=True)]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(job.device)

    fixed = canvas()

    def step() -> None:
        views = canvas() if noise else fixed
        parameters = augment.sample(sizes, generator)
        augment.apply_global(views, sizes, parameters)
        augment.apply_local(views, sizes, parameters)

    return Case(step, len(files))


def workers(job: Job) -> Case:
    """The loader with its worker processes, crops left out. The batches that they made while others had their turn are
    thrown away first."""
    cfg = job.cfg
    dataset = dataset_from_config(cfg, "train", ("noisy",))
    loader = iter(make_loader(dataset, cfg.train.batch_size, workers=cfg.data.workers, device=job.device))
    batches = 8 + 2 * cfg.data.workers

    def step() -> dict:
        for _ in range(2 * cfg.data.workers + 1):
            next(loader)
        start = time.perf_counter()
        for _ in range(batches):
            next(loader)
        return {"images_per_s": batches * cfg.train.batch_size / (time.perf_counter() - start)}

    return Case(step, batches * cfg.train.batch_size)


# --- step and data path together ------------------------------------------------------------------------------------
def end_to_end(job: Job, precision: str, iterations: int) -> Case:
    """The trainer from files to checkpoint. Its log says how long it waited; start-up and checkpoint are left out."""

    def step() -> dict:
        cfg = job.with_precision(precision)
        cfg.train.epochs, cfg.train.epoch_length, cfg.train.log_every = 1, iterations, max(1, iterations // 4)
        Trainer(cfg, build_model(cfg, False), dataset_from_config(cfg, "train", ("noisy",)), stop_epoch=1).fit()
        rows = read_json_lines(Path(cfg.output_dir, "metrics.jsonl"))[1:]  # the first one has the warm-up in it
        return {key: float(np.median([row[key] for row in rows])) for key in ("images_per_s", "data_wait")}

    return Case(step, job.cfg.train.batch_size * iterations)


# --- denoiser -------------------------------------------------------------------------------------------------------
def denoising(job: Job, precision: str) -> Case:
    """The denoiser over noisy photographs that are decoded already."""
    number = 1 if job.device == "cpu" else 8
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*PHOTO, 3), dtype=np.uint8) for _ in range(number)]
    denoiser = UNetDenoiser(UNet(), torch.device(job.device), precision)

    def step() -> None:
        denoise_images(denoiser, images, torch.device(job.device))

    return Case(step, number)


def denoiser_training(job: Job, precision: str) -> Case:
    """A step of the published schedule: four crops of 256 px."""
    network = UNet(init_scale=1.0).to(job.device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), 3e-4)
    noisy = torch.rand(4, 3, 256, 256, device=job.device).contiguous(memory_format=torch.channels_last)
    pairs = draw_pairs(noisy, torch.Generator(job.device).manual_seed(0))

    def predict(x):
        with precisions.autocast(torch.device(job.device), precision):
            return network(x)

    def step() -> None:
        optimizer.zero_grad()
        sum(neighbor_loss(predict, noisy, pairs)).backward()
        optimizer.step()

    return Case(step, len(noisy))


# --- linear probe ---------------------------------------------------------------------------------------------------
def probe(job: Job, protocol: str) -> Case:
    """An iteration of the probe's classifiers; protocol exact: with the random crops and their features before it."""
    cfg, device = job.cfg, job.device
    number = cfg.eval.batch_size
    backbone = build_backbone(cfg, drop_path=False).to(device).eval()
    rates = list(cfg.eval.linear.learning_rates)
    classifiers = Probes(min(LAST_BLOCKS, len(backbone.blocks)), backbone.embed_dim, PROBE_CLASSES, rates, 0, device)
    photo = torch.from_numpy(read_image(job.files()[0])).permute(2, 0, 1)
    canvas, sizes = photo.expand(number, -1, -1, -1).to(device), torch.tensor([PHOTO] * number)
    transform = RandomCrop(cfg.eval.crop, cfg.data.mean, cfg.data.std)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number, device=device) % PROBE_CLASSES

    @torch.inference_mode()
    def features():
        with autocast(cfg):
            return block_tokens(backbone, transform(canvas, sizes, draw_crops(number, generator)))

    fixed = features().clone()

    def step() -> None:
        classifiers.step(features() if protocol == "exact" else fixed, labels, 0.5)

    return Case(step, number)


# --- checkpoint -----------------------------------------------------------------------------------------------------
def checkpoint(job: Job, action: str) -> Case:
    """Saving all that a resumed run needs together with the teacher's weights, or loading it."""
    cfg = job.with_precision("bf16")
    trainer = Trainer(cfg, build_model(cfg, False), dataset=None, stop_epoch=1)
    trainer.step(0, iter([random_batch(cfg, 1, job.device)]))  # the optimiser has a state from here on
    trainer.iteration = 1
    trainer.save(evaluate=True)

    def step() -> dict:
        if action == "save":
            trainer.save(evaluate=True)
        else:
            trainer.resume()
        files = [path.stat().st_size for path in Path(cfg.output_dir).rglob("*") if path.is_file()]
        return {"bytes": sum(files)}

    return Case(step, 0)


def matrix_product(job: Job, precision: str) -> Case:
    """The rate that counts as 100 % of utilisation: a large square product, over and over."""
    side, times = (2048, 20) if job.device == "cpu" else (8192, 50)
    a, b = (torch.randn(side, side, device=job.device, dtype=precisions.DTYPES[precision]) for _ in range(2))
    out = torch.empty_like(a)

    def step() -> dict:
        for _ in range(times):
            torch.mm(a, b, out=out)
        return {"flops": times * 2.0 * side**3}

    return Case(step, 0)
