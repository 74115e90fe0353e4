"""Signs of collapse, computed from the tensors of one step: are prototypes used, do features spread?"""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of each row.  # [..., K] → [...]"""
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007), in [1, min(n, D)].  # [n, D]

    NaN where there are none: what has diverged is for the losses to say.
    """
    try:
        singular = torch.linalg.svdvals(features.float() - features.float().mean(dim=0))
    except torch.linalg.LinAlgError:
        return float("nan")
    return float(entropy(singular / singular.sum().clamp(min=1e-12)).exp())


@torch.no_grad()
def diagnose(
    targets: Tensor, logits: Tensor, cls_tokens: Tensor, bottleneck: Tensor, temp: float = 0.1
) -> dict[str, float]:
    """Entropy of the student (nats), share of prototypes in use, norm and rank of CLS tokens and of the bottleneck.

    targets: teacher's probabilities [2, B, K]; logits: student's [2, B, K]; cls_tokens: student's [2, B, D];
    bottleneck: the head's output for them before its normalisation [2 * B, d].
    prototypes_used: distinct favourites of the teacher's CLS tokens, of as many as the batch could have.
    """
    teacher = targets.flatten(0, 1).float()  # [2 * B, K]
    student = (logits.flatten(0, 1).float() / temp).softmax(dim=-1)
    cls, bottleneck = cls_tokens.flatten(0, 1).float(), bottleneck.float()
    return {
        "student_entropy": float(entropy(student).mean()),
        "prototypes_used": teacher.argmax(dim=-1).unique().numel() / min(teacher.shape),
        "cls_norm": float(cls.norm(dim=-1).mean()),
        "cls_effective_rank": effective_rank(cls),
        "bottleneck_norm": float(bottleneck.norm(dim=-1).mean()),
        "bottleneck_effective_rank": effective_rank(bottleneck),
    }
