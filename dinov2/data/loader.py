"""Batches of padded canvases. Workers decode images, add the noise and pad.

An image's bytes depend only on the image (and, in the view "mix", on the iteration), so the batches are the same for
any number of workers, and for a resident set (decoded once, held on the training device) as for one decoded in every
pass.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dinov2.data.dataset import ImageDataset
from dinov2.data.packed import Packed
from utils.images import ImageError
from utils.progress import progress
from utils.sampler import IterationSampler
from utils.workers import start_loader_worker


@dataclass
class ImageBatch:
    """B images in V views.

    canvases: V tensors [B, C, H, W], uint8 or (files above 8 bits) float32 in [0, 1], each image at the top left, zeros
    around it. The rest stays on the CPU: sizes int64 [B, 2] (height, width) in pixels, labels int64 [B] (-1 without
    classes), indices int64 [B] into the data set, iteration. plan: the random parameters of the batch, on the device of
    the canvases. bad: reason by index for images that a skipping loader left out; there are no canvases if no image is
    left.
    """

    canvases: list[Tensor]
    sizes: Tensor
    labels: Tensor
    indices: Tensor
    iteration: int
    plan: Packed | None = None
    bad: dict[int, str] = field(default_factory=dict)

    def pin_memory(self) -> "ImageBatch":
        plan = self.plan and self.plan.pin_memory()
        return replace(self, canvases=[canvas.pin_memory() for canvas in self.canvases], plan=plan)

    def to(self, device: torch.device | str) -> "ImageBatch":
        """The batch with canvases and plan on the device. Pinned memory is copied without waiting, on a separate
        stream, while the device still computes the previous step."""
        if torch.device(device).type != "cuda":
            return self._move(device)
        stream, current = _copy_stream(torch.device(device)), torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):
            moved = self._move(device)
        current.wait_stream(stream)
        for tensor in (*moved.canvases, *([moved.plan.buffer] if moved.plan else [])):
            tensor.record_stream(current)  # its memory is not reused for copies before the step has ended
        return moved

    def _move(self, device) -> "ImageBatch":
        canvases = [canvas.to(device, non_blocking=True) for canvas in self.canvases]
        return replace(self, canvases=canvases, plan=self.plan and self.plan.to(device))


@cache
def _copy_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


Plan = Callable[[int, Tensor], Packed]  # (iteration, sizes [B, 2]) -> random parameters of that batch


def make_loader(
    dataset: ImageDataset,
    batch_size: int,
    seed: int = 0,
    start_iteration: int = 0,
    stop_iteration: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    resident: "ResidentImages | None" = None,
    plan: Plan | None = None,
    option: str = "train.batch_size=",
) -> Iterator[ImageBatch]:
    """Training batches of a rank from start_iteration to stop_iteration (None: without end), canvases on `device`.

    batch_size: images of one iteration over all ranks, which the user gives as `option`; the order is that of
    IterationSampler, with its errors.
    resident: the decoded set, used instead of reading files. plan: draws ImageBatch.plan, in the workers if there are
    any. ImageError (a ValueError) names a file that cannot be read.
    """
    order = IterationSampler(len(dataset), batch_size, seed, rank, world_size, start_iteration, stop_iteration, option)
    if resident is not None:
        return (resident.batch(iteration, indices, plan) for iteration, indices in order)
    return _load_batches(dataset, order, workers, device, plan=plan)


def make_eval_loader(
    dataset: ImageDataset,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    start: int = 0,
    skip_bad: bool = False,
) -> Iterator[ImageBatch]:
    """One pass over the images rank, rank + world_size, ... in order from `start`; the last batch is smaller.

    skip_bad: images that cannot be read are left out, and named in their batch, instead of ending the pass.
    """
    own = range(start + rank, len(dataset), world_size)
    order = [(k, list(own[start : start + batch_size])) for k, start in enumerate(range(0, len(own), batch_size))]
    return _load_batches(dataset, order, workers, device, skip_bad=skip_bad)


class ResidentImages:
    """The decoded images of a set on a device: a canvas [N, C, H, W] for each kind of image that the views need.

    Takes N * C * H * W bytes for each kind (four times that with files above 8 bits), H and W being the largest sides;
    twice that while loading.
    """

    def __init__(self, dataset: ImageDataset, workers: int = 0, device: torch.device | str = "cpu"):
        self.dataset, self.device = dataset, torch.device(device)
        order = [(0, list(range(start, min(start + 64, len(dataset))))) for start in range(0, len(dataset), 64)]
        loaded = _load_batches(dataset, order, workers, device, kinds=dataset.kinds)
        parts = list(progress(loaded, total=len(order), desc="decoding the resident set", unit="batch"))
        self.sizes = torch.cat([part.sizes for part in parts])
        self.canvases = {
            kind: _concatenate([part.canvases[number] for part in parts]) for number, kind in enumerate(dataset.kinds)
        }

    def batch(self, iteration: int, indices: list[int], plan: Plan | None = None) -> ImageBatch:
        """The same batch as from files, except that it is padded to the largest sides of the whole set."""
        own = torch.tensor(indices)
        on_device = own.to(self.device, non_blocking=True)
        canvases = []
        for number, view in enumerate(self.dataset.views):
            if view == "mix":
                chosen = [self.dataset.choose(index, iteration)[number] == "denoised" for index in indices]
                pair = [self.canvases[kind].index_select(0, on_device) for kind in ("denoised", "noisy")]
                if pair[0].dtype != pair[1].dtype:  # such as 16-bit files with a denoised copy in 8 bits
                    pair = [canvas if canvas.is_floating_point() else canvas / 255 for canvas in pair]
                chosen = torch.tensor(chosen).view(-1, 1, 1, 1).to(self.device, non_blocking=True)
                canvases.append(torch.where(chosen, *pair))
            else:
                canvases.append(self.canvases[view].index_select(0, on_device))
        labels, drawn = torch.from_numpy(self.dataset.labels[indices]), None
        if plan:
            drawn = plan(iteration, self.sizes[own])
            drawn = (drawn.pin_memory() if self.device.type == "cuda" else drawn).to(self.device)
        return ImageBatch(canvases, self.sizes[own], labels, own, iteration, drawn)


class _BatchDataset(Dataset):
    """Item (iteration, indices) is a whole ImageBatch, or the message about an image that cannot be read: an exception
    that crosses from a worker process drags two tracebacks along."""

    def __init__(self, dataset: ImageDataset, kinds: tuple[str, ...] | None, plan: Plan | None, skip_bad: bool):
        self.dataset, self.kinds, self.plan, self.skip_bad = dataset, kinds, plan, skip_bad

    def __getitem__(self, key: tuple[int, list[int]]) -> ImageBatch | str:
        iteration, indices = key
        dataset, images, bad = self.dataset, [], {}
        for index in indices:
            try:
                images.append(dataset.read(index, self.kinds or dataset.choose(index, iteration)))
            except (ValueError, OSError) as error:
                if not self.skip_bad:
                    return str(error)
                bad[index] = str(error)
        indices = [index for index in indices if index not in bad]
        sizes = torch.tensor([image[0].shape[:2] for image in images]).view(-1, 2)
        return ImageBatch(
            canvases=[_pad(view) for view in zip(*images, strict=True)],
            sizes=sizes,
            labels=torch.from_numpy(dataset.labels[indices]),
            indices=torch.tensor(indices, dtype=torch.int64),
            iteration=iteration,
            bad=bad,
            plan=self.plan and self.plan(iteration, sizes),
        )


def _load_batches(dataset, order, workers, device, kinds=None, plan=None, skip_bad=False) -> Iterator[ImageBatch]:
    """Yields the batch of each (iteration, indices) of `order`."""
    loader = DataLoader(
        _BatchDataset(dataset, kinds, plan, skip_bad),
        batch_size=None,
        sampler=order,
        num_workers=min(workers, os.cpu_count() or 1),
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=start_loader_worker,
        generator=torch.Generator(),  # its own: the loader would draw its workers' seed from the global stream
    )
    for batch in loader:
        if isinstance(batch, str):
            raise ImageError(batch)
        yield batch.to(device)


def _pad(images: tuple[np.ndarray, ...]) -> Tensor:
    """Images [H, W, C] -> canvas [B, C, H, W] in channels-last memory, as they are decoded and cut."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    eight_bit = all(image.dtype == np.uint8 for image in images)
    canvas = np.zeros((len(images), height, width, images[0].shape[2]), np.uint8 if eight_bit else np.float32)
    for place, image in zip(canvas, images, strict=True):
        image = image / np.float32(255) if image.dtype == np.uint8 and not eight_bit else image
        place[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(canvas).permute(0, 3, 1, 2)


def _concatenate(canvases: list[Tensor]) -> Tensor:
    """Several canvas batches as one, padded to the largest, float if any of them is."""
    height, width = (max(canvas.shape[axis] for canvas in canvases) for axis in (2, 3))
    dtype = torch.uint8 if all(canvas.dtype == torch.uint8 for canvas in canvases) else torch.float32
    count, channels = sum(map(len, canvases)), canvases[0].shape[1]
    shape, device = (count, channels, height, width), canvases[0].device
    joined = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last).zero_()
    start = 0
    for canvas in canvases:
        part = canvas if canvas.dtype == dtype else canvas / 255
        joined[start : start + len(canvas), :, : canvas.shape[2], : canvas.shape[3]] = part
        start += len(canvas)
    return joined
