"""From the canvases of an iteration to crops and masks: the same ones, however ranks and micro-batches divide them."""

import random
from collections.abc import Iterator
from itertools import islice

import torch
from omegaconf import DictConfig
from torch import Tensor

from dinov2.config import check_ranks
from dinov2.data.augment import Augment, AugmentParameters
from dinov2.data.masking import sample_masks
from dinov2.data.packed import Packed
from dinov2.objectives.objective import GLOBAL_CROPS, CropBatch, index_masks
from utils import distributed


def seed_of(*parts: object) -> int:
    """A 63-bit seed of its own for each tuple of parts."""
    return random.Random(repr(parts)).getrandbits(63)


class BatchMaker:
    """Turns the canvases of one iteration into micro-batches of crops and masks, the same for any number of ranks.

    `plan` draws the random parameters on the CPU, in the loader's workers if there are any; a call applies them.
    """

    def __init__(self, cfg: DictConfig):
        self.cfg = cfg
        self.augment = Augment(cfg.crops, cfg.data.mean, cfg.data.std)
        self.grid = (cfg.crops.global_size // cfg.model.patch_size,) * 2
        ranks = distributed.world_size()
        if cfg.train.accumulate > 1:  # without micro-batches the sampler checks the ranks
            check_ranks(cfg, ranks, f"{ranks} ranks")
        self.rank_batch_size = cfg.train.batch_size // ranks  # images of this rank
        self.micro_batch_size = self.rank_batch_size // cfg.train.accumulate
        self.first = distributed.rank() * self.rank_batch_size  # image of this rank in the batch of all ranks

    def masks(self, iteration: int) -> Tensor:
        """Masks of all global crops of all ranks.  # [2, batch_size, N] bool"""
        cfg, total = self.cfg, self.cfg.train.batch_size
        generator = random.Random(seed_of(cfg.seed, iteration, "masks"))
        masks = sample_masks(
            GLOBAL_CROPS * total, self.grid, cfg.ibot.mask_probability, tuple(cfg.ibot.mask_ratio), generator
        )
        return torch.from_numpy(masks).unflatten(0, (GLOBAL_CROPS, total))

    def micro_batches(self) -> list[slice]:
        """The images of each micro-batch, within those of this rank."""
        size = self.micro_batch_size
        return [slice(start, start + size) for start in range(0, self.rank_batch_size, size)]

    def plan(self, iteration: int, sizes: Tensor) -> Packed:
        """Crop parameters and masks of this rank's images of sizes [rank_batch_size, 2], by micro-batches."""
        cfg, masks, tensors = self.cfg, self.masks(iteration), []
        for images in self.micro_batches():
            position = self.first + images.start  # of the micro-batch in the batch of all ranks
            generator = torch.Generator().manual_seed(seed_of(cfg.seed, iteration, "crops"))
            parameters = self.augment.sample(sizes[images], generator, position, cfg.train.batch_size)
            own_masks = masks[:, position : position + self.micro_batch_size].flatten(0, 1)
            tensors += [*parameters.tensors(), own_masks, *index_masks(own_masks)]
        return Packed.of(tensors)

    def __call__(self, data) -> Iterator[CropBatch]:
        tensors = iter(data.plan.tensors())
        for images in self.micro_batches():
            parameters = AugmentParameters.of(tensors)
            views, sizes = [canvas[images] for canvas in data.canvases], data.sizes[images]
            masks, masked_indices, mask_weights = islice(tensors, 3)
            yield CropBatch(
                global_crops=self.augment.apply_global(views[0], sizes, parameters),
                local_crops=self.augment.apply_local(views[0], sizes, parameters),
                masks=masks,
                other_global_crops=self.augment.apply_global(views[1], sizes, parameters) if len(views) > 1 else None,
                masked_indices=masked_indices,
                mask_weights=mask_weights,
            )
