"""Self-distillation over prototypes: teacher targets (centring or Sinkhorn-Knopp) and cross-entropies of DINO and iBOT."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def all_reduce_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place; the tensor itself without ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Center(nn.Module):
    """Running mean of teacher logits, subtracted before the softmax (DINO, eq. 4).

    `softmax` uses the centre of the steps before; `observe` gathers the logits of this step (of every micro-batch),
    and `update` folds their mean over all ranks into the centre, once a step.
    shape: of the buffer `center`; public checkpoints have (1, K) for DINO and (1, 1, K) for iBOT.
    Deviation: with several ranks the release averages each rank's mean over its own masked patches; here every token
    counts the same, so that the centre does not depend on how a batch is split.
    """

    def __init__(self, shape: tuple[int, ...], momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(shape))
        self._total: Tensor | None = None  # [K + 1]: sum of the logits, and how many

    @torch.no_grad()
    def softmax(self, logits: Tensor, temp: float) -> Tensor:  # [n, K] → [n, K]
        return F.softmax((logits.float() - self.center.view(1, -1)) / temp, dim=-1)

    @torch.no_grad()
    def observe(self, logits: Tensor) -> None:  # [n, K]
        count = torch.full((1,), float(len(logits)), device=logits.device)
        total = torch.cat((logits.sum(dim=0, dtype=torch.float32), count))
        self._total = total if self._total is None else self._total + total

    @torch.no_grad()
    def update(self) -> None:
        if self._total is None:
            return
        total = all_reduce_(self._total)
        mean = (total[:-1] / total[-1].clamp(min=1)).view_as(self.center)
        self.center.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
        self._total = None


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Assignment of tokens to prototypes with equal shares (SwAV), over all ranks.  # [n, K] → [n, K], rows sum to 1"""
    q = torch.exp(logits.float() / temp).t()  # [K, n]
    prototypes = q.shape[0]
    tokens = all_reduce_(torch.tensor(float(q.shape[1]), device=q.device))
    q /= all_reduce_(q.sum())
    for _ in range(iterations):
        q /= all_reduce_(q.sum(dim=1, keepdim=True)) * prototypes
        q /= q.sum(dim=0, keepdim=True) * tokens
    return (q * tokens).t()


def cross_entropy(student: Tensor, targets: Tensor, temp: float) -> Tensor:
    """-Σ_k targets * log_softmax(student / temp) of each row, in float32.  # [..., K], [..., K] → [...]"""
    return -(targets * F.log_softmax(student.float() / temp, dim=-1)).sum(dim=-1)


def dino_loss(student: Tensor, targets: Tensor, temp: float = 0.1) -> Tensor:
    """Sum over student crops s and teacher crops t of the mean cross-entropy over images.

    student: logits [S, B, K]; targets: [T, B, K] → []
    The sum over t is taken before the product with the student's log-probabilities: the same sum, S * T products less.
    """
    total = targets.sum(dim=0)  # [B, K]
    return cross_entropy(student, total, temp).sum() / student.shape[1]


def ibot_loss(student: Tensor, targets: Tensor, weights: Tensor, crops: int, temp: float = 0.1) -> Tensor:
    """Cross-entropy on masked patches: mean over the mask of each crop, sum over crops / number of crops.

    student, targets: [M, K] of the masked patches; weights: [M], 1 / masked patches of that crop → []
    """
    return (cross_entropy(student, targets, temp) * weights).sum() / crops
