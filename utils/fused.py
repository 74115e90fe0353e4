"""Functions that are compiled for a GPU, where separate operations would each read and write whole tensors."""

from collections.abc import Callable
from functools import cache, wraps

import torch


def fused(function: Callable) -> Callable:
    """`function`, compiled by torch.compile if its first argument is a CUDA tensor.

    torch.compiler.set_stance("force_eager") switches the compiler off for the whole process.
    """

    @cache
    def compiled() -> Callable:  # late, because PyTorch takes seconds to load its compiler
        return torch.compile(function)

    @wraps(function)
    def call(first: torch.Tensor, *rest):
        return (compiled() if first.is_cuda else function)(first, *rest)

    return call
