"""Features of a frozen backbone over a data set: what every evaluator starts from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dinov2.data.dataset import ImageDataset, dataset_from_config, layout_of
from dinov2.data.eval_transforms import CentreCrop
from dinov2.data.index import MissingSplit, why_no_accuracy
from dinov2.data.loader import ImageBatch, ResidentImages, make_eval_loader
from utils import distributed, precision
from utils.progress import progress

LAST_BLOCKS = 4  # whose CLS tokens the linear probe uses


@dataclass(frozen=True)
class Features:
    """One row per image: values float32 [N, F] and labels int64 [N] on the device, names [N], names of the classes."""

    values: Tensor
    labels: Tensor
    names: list[str]
    classes: list[str]

    def take(self, rows: np.ndarray) -> Features:
        """These rows only."""
        index = torch.as_tensor(rows, device=self.values.device)
        return replace(self, values=self.values[index], labels=self.labels[index], names=[self.names[i] for i in rows])

    def split_per_class(self, n: int, seed: int) -> tuple[Features, Features]:
        """n random images of every class, and the rest. Raises ValueError naming a class with fewer than n."""
        labels, rng, chosen = self.labels.cpu().numpy(), np.random.default_rng(seed), []
        for label, name in enumerate(self.classes):
            own = np.flatnonzero(labels == label)
            if len(own) < n:
                found = f"class {name} has {len(own)} training images"
                raise ValueError(f"n_per_class={n}, but {found}: take a smaller number")
            chosen.append(rng.permutation(own)[:n])
        few = np.sort(np.concatenate(chosen))
        return self.take(few), self.take(np.setdiff1d(np.arange(len(labels)), few))


def eval_view(cfg: DictConfig) -> str:
    """The view that the run is evaluated on: eval.view, or that of its last stage (noisy after a mix)."""
    view = cfg.eval.view or cfg.curriculum.stages[-1].view
    return "noisy" if view == "mix" else view


def autocast(cfg: DictConfig, quick: bool = False) -> AbstractContextManager:
    """The precision of the run's training on a GPU; on a CPU float32 unless `quick`."""
    device = distributed.device()
    return precision.autocast(device, "fp32" if device.type == "cpu" and not quick else cfg.train.precision)


def cls_tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    """Normalised CLS token of the last block: [B, D]."""
    return backbone(images)["x_norm_clstoken"].float()


def block_tokens(backbone: nn.Module, images: Tensor) -> Tensor:
    """Normalised CLS tokens of the last four blocks (or all, if there are fewer), then the mean patch token, if there
    are patches: [B, 5 D]."""
    last = min(LAST_BLOCKS, len(backbone.blocks))
    outputs = backbone.get_intermediate_layers(images, n=last, return_class_token=True)
    patches = outputs[-1][0]
    means = [patches.mean(dim=1)] if patches.shape[1] else []
    return torch.cat([*(cls for _, cls in outputs), *means], dim=1).float()


def labelled_dataset(cfg: DictConfig, split: str) -> ImageDataset:
    """Labelled images of a split in the run's evaluation view. Raises ValueError when there are none."""
    dataset = dataset_from_config(cfg, split, views=(eval_view(cfg),))
    known = np.flatnonzero(dataset.labels >= 0)
    if not len(known):
        raise ValueError(why_without_labels(cfg))
    return dataset.keep(known)


def why_without_labels(cfg: DictConfig) -> str:
    """Why the data set gives no accuracies; empty if it does."""
    return why_no_accuracy(cfg.data.root, cfg.data.index_cache, layout_of(cfg))


def shown_dataset(cfg: DictConfig, views: tuple[str, ...]) -> ImageDataset:
    """Validation images or, if there are none, training images; with or without labels."""
    try:
        return dataset_from_config(cfg, "val", views=views)
    except MissingSplit:
        return dataset_from_config(cfg, "train", views=views)


def resident_images(cfg: DictConfig, split: str) -> ResidentImages | None:
    """With data.resident the decoded set, kept for all backbones of one call; else None."""
    if not cfg.data.resident:
        return None
    decides = {"data": cfg.data, "noise": cfg.noise, "eval": {"view": eval_view(cfg)}}
    return _load_resident(OmegaConf.to_yaml(OmegaConf.create(decides)), split)


@lru_cache(maxsize=2)
def _load_resident(config: str, split: str) -> ResidentImages:
    cfg = OmegaConf.create(config)
    return ResidentImages(labelled_dataset(cfg, split), cfg.data.workers, distributed.device())


def ordered_batches(
    cfg: DictConfig, dataset: ImageDataset, resident: ResidentImages | None, size: int
) -> Iterator[ImageBatch]:
    """This rank's images rank, rank + ranks, ..., once and in order."""
    rank, ranks = distributed.rank(), distributed.world_size()
    if resident is None:
        yield from make_eval_loader(dataset, size, rank, ranks, cfg.data.workers, distributed.device())
        return
    own = list(range(rank, len(dataset), ranks))
    for start in range(0, len(own), size):
        yield resident.batch(0, own[start : start + size])


def extract(
    backbone: nn.Module,
    cfg: DictConfig,
    split: str,
    read: Callable[[nn.Module, Tensor], Tensor] = cls_tokens,
) -> Features:
    """Features of every labelled image of a split, resized and centre-cropped; see `features_of`."""
    dataset = labelled_dataset(cfg, split)
    values = features_of(backbone, cfg, dataset, read, resident=resident_images(cfg, split))
    labels = torch.from_numpy(dataset.labels).to(values.device)
    return Features(values, labels, list(dataset.relatives), dataset.classes)


@torch.no_grad()  # not inference_mode: for live kNN a sharded network gathers weights that the next step writes to
def features_of(
    backbone: nn.Module,
    cfg: DictConfig,
    dataset: ImageDataset,
    read: Callable[[nn.Module, Tensor], Tensor] = cls_tokens,
    crops: Callable[[ImageBatch], Tensor] | None = None,
    resident: ResidentImages | None = None,
) -> Tensor:
    """Features of every image of a data set: float32 [N, F]. The ranks share the work, and each gets all features.

    `read(backbone, images [B, C, H, W])` gives [B, F]; `crops` makes the images of a batch (None: as evaluation does).
    A rank that has no more images passes a blank one through: the others may wait for its part of a sharded network.
    Raises FloatingPointError naming the first image whose features are not finite.
    """
    centre = CentreCrop(cfg.eval.resize, cfg.eval.crop, cfg.data.mean, cfg.data.std)
    crops = crops or (lambda batch: centre(batch.canvases[0], batch.sizes))
    size = max(1, cfg.eval.batch_size // distributed.world_size())
    steps, values = -(-len(dataset) // (size * distributed.world_size())), None
    what = f"features of {dataset.split or dataset.root}"
    batches = zip_longest(ordered_batches(cfg, dataset, resident, size), range(steps))  # None where a rank has fewer
    blank = torch.zeros(1, cfg.data.in_chans, cfg.eval.crop, cfg.eval.crop, device=distributed.device())
    for batch, _ in progress(batches, total=steps, desc=what, unit="batch"):
        with autocast(cfg):
            rows = read(backbone, blank if batch is None else crops(batch))
        if values is None:
            values = rows.new_zeros(len(dataset), rows.shape[1])
        if batch is not None:
            values[batch.indices.to(values.device, non_blocking=True)] = rows
    values = distributed.all_reduce_sum(values)  # each row comes from one rank and is zero on the others
    check_finite(values, dataset.relatives)
    return values


def gather_hits(own: Tensor, images: int) -> Tensor:
    """bool [..., N] for all `images`, from each rank's bool [..., n] for its images rank, rank + ranks, ..."""
    whole = torch.zeros(*own.shape[:-1], images, dtype=torch.uint8, device=own.device)
    whole[..., distributed.rank() :: distributed.world_size()] = own
    return distributed.all_reduce_sum(whole).bool()


def check_finite(values: Tensor, names: list[str]) -> None:
    """Raises FloatingPointError if a row of `values` [N, F] is not finite; names the first image and the count.

    The command line adds the checkpoint's name and makes it a ValueError.
    """
    bad = (~values.isfinite().all(dim=1)).nonzero().flatten()
    if len(bad):
        raise FloatingPointError(
            f"the features of {len(bad)} of {len(names)} images are not finite, the first of {names[int(bad[0])]}: "
            "the training has diverged, evaluate an earlier checkpoint"
        )
