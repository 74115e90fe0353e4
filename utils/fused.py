"""Functions that are compiled for a GPU, where each operation by itself would read and write whole tensors again."""

from collections.abc import Callable
from functools import cache, wraps

import torch


def fused(function: Callable) -> Callable:
    """`function`, through torch.compile where its first argument is a CUDA tensor; elsewhere as it is.

    torch.compiler.set_stance("force_eager") switches the compiler off for the whole process.
    """

    @cache
    def compiled() -> Callable:  # asked for late: PyTorch takes seconds to load its compiler
        return torch.compile(function)

    @wraps(function)
    def call(first: torch.Tensor, *rest):
        return (compiled() if first.is_cuda else function)(first, *rest)

    return call
