"""The losses of a step, watched one step late, so that the host never waits for a GPU."""

import math

import torch
from torch import Tensor

from utils import distributed


class HostCopy:
    """A tensor on its way to the host; `values` waits for the work before the copy, not for later work."""

    def __init__(self, tensor: Tensor):
        self.copied, self.host = None, tensor
        if tensor.is_cuda:
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def values(self) -> list:
        if self.copied:
            self.copied.synchronize()
        return self.host.tolist()


class LossMonitor:
    """Loss terms of the last step, averaged over ranks. They are copied to the host after the step, and read when the
    next one has been launched, so that the host never waits for a GPU.

    Stops the run at the first NaN or inf, and tells when any rank was asked to leave.
    """

    def __init__(self) -> None:
        self.leaving = False  # this rank was asked to
        self.all_leaving = False  # some rank was: known to all one step later
        self.pending: tuple[int, list[str], HostCopy] | None = None
        self.terms: dict[str, float] = {}

    def ask_to_leave(self, *_: object) -> None:
        self.leaving = True

    def put(self, iteration: int, terms: dict[str, Tensor]) -> None:
        flag = torch.full((), float(self.leaving), device=next(iter(terms.values())).device)
        stacked = torch.stack([*(term.detach().float() for term in terms.values()), flag])
        self.pending = iteration, list(terms), HostCopy(distributed.all_reduce_mean(stacked))

    def read(self) -> bool:
        """Updates `terms` to the last step's. True when the run is to leave; FloatingPointError on NaN or inf."""
        if self.pending is None:
            return self.all_leaving
        (iteration, names, copy), self.pending = self.pending, None
        *values, leaving = copy.values()
        self.terms = dict(zip(names, values, strict=True))
        if wrong := [name for name, value in self.terms.items() if not math.isfinite(value)]:
            raise FloatingPointError(f"{wrong[0]} is {self.terms[wrong[0]]} at iteration {iteration}")
        self.all_leaving |= leaving > 0
        return self.all_leaving
