"""How many directions features spread over."""

import torch
from torch import Tensor


def effective_rank(features: Tensor, epsilon: float = 0.0) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007), in [1, min(n, D)].  # [n, D]

    In the precision and on the device of the features, which are taken as they are: centre them first if their mean is
    no information. epsilon: added to each normalised value. NaN where the decomposition fails (diverged features).
    """
    try:
        singular = torch.linalg.svdvals(features)
    except torch.linalg.LinAlgError:
        return float("nan")
    p = singular / singular.sum().clamp(min=max(epsilon, 1e-12)) + epsilon
    return float(torch.exp(-torch.xlogy(p, p).sum()))
