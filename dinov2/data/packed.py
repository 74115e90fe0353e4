"""Many small tensors in one buffer, which a single asynchronous copy takes to a device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ALIGNED = 16  # bytes; a view in another dtype must start at a multiple of its size


@dataclass(frozen=True)
class Packed:
    """buffer: uint8 [bytes]; layout: (first byte, shape, dtype) of each tensor in it."""

    buffer: Tensor
    layout: tuple[tuple[int, tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Packed:
        layout, end = [], 0
        for tensor in tensors:
            layout.append((end, tuple(tensor.shape), tensor.dtype))
            end += -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
        packed = cls(torch.zeros(end, dtype=torch.uint8), tuple(layout))
        for place, tensor in zip(packed.tensors(), tensors, strict=True):
            place.copy_(tensor)
        return packed

    def tensors(self) -> list[Tensor]:
        """Views of the buffer, in the order in which they were packed."""
        views = []
        for start, shape, dtype in self.layout:
            stop = start + math.prod(shape) * dtype.itemsize
            views.append(self.buffer[start:stop].view(dtype).view(shape))
        return views

    def pin_memory(self) -> Packed:
        return replace(self, buffer=self.buffer.pin_memory())

    def to(self, device: torch.device | str) -> Packed:
        return replace(self, buffer=self.buffer.to(device, non_blocking=True))
