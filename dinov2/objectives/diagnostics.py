"""Signs of collapse, computed from the tensors of a step or a few: are prototypes used, do features spread?"""

import math

import torch
from torch import Tensor

from dinov2.loss.prototypes import row_chunks
from utils import distributed
from utils.spectrum import effective_rank


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of each row.  # [..., K] → [...]"""
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


class Information:
    """Entropies of the targets of a window of crops; stays on the device until it is read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name: [K + 2]: sum of p, sum of entropies, rows

    @torch.no_grad()
    def add(self, name: str, targets: Tensor) -> None:
        """targets: probabilities [..., K]; rows of all ranks and micro-batches may be added one after another."""
        rows = targets.flatten(0, -2)  # [n, K]
        count = torch.full((), float(len(rows)), device=rows.device)
        entropies = sum((entropy(rows[part].float()).sum() for part in row_chunks(rows)), torch.zeros_like(count))
        new = torch.cat([rows.sum(dim=0, dtype=torch.float32), torch.stack([entropies, count])])
        self.sums[name] = self.sums[name] + new if name in self.sums else new

    def read(self) -> dict[str, dict[str, float]]:
        """{name: information and entropies in nats, ln K}; all ranks call it. Starts the next window."""
        found = {}
        for name, sums in self.sums.items():
            total = distributed.all_reduce_sum(sums)
            rows = total[-1].clamp(min=1)
            of_mean, mean = entropy(total[:-2] / rows), total[-2] / rows
            found[name] = {
                "information": float(of_mean - mean),
                "target_entropy": float(mean),
                "target_entropy_of_mean": float(of_mean),
                "log_prototypes": math.log(len(total) - 2),
            }
        self.sums = {}
        return found


def centred_rank(features: Tensor) -> float:
    """Effective rank of features [n, D] about their mean; NaN for diverged ones, which the losses report."""
    return effective_rank(features - features.mean(dim=0))


@torch.no_grad()
def diagnose(
    targets: Tensor, logits: Tensor, cls_tokens: Tensor, bottleneck: Tensor, temp: float = 0.1
) -> dict[str, float]:
    """Entropy of the student (nats), fraction of prototypes in use, norm and rank of CLS tokens and of the bottleneck.

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
        "cls_effective_rank": centred_rank(cls),
        "bottleneck_norm": float(bottleneck.norm(dim=-1).mean()),
        "bottleneck_effective_rank": centred_rank(bottleneck),
    }


@torch.no_grad()
def diagnose_embeddings(first_cls: Tensor, second_cls: Tensor, first: Tensor, second: Tensor) -> dict[str, float]:
    """Norm and rank of CLS tokens [B, D], spread and rank of the embeddings [B, d] that two crops are compared by.

    embedding_spread: standard deviation of the unit embeddings, times sqrt(d): 1 where they fill the sphere, 0 where
    all are the same, as SimSiam measures collapse. crop_similarity: mean cosine of an image's two embeddings.
    """
    cls = torch.cat((first_cls, second_cls)).float()
    first, second = (torch.nn.functional.normalize(own.float(), dim=-1) for own in (first, second))
    return {
        "cls_norm": float(cls.norm(dim=-1).mean()),
        "cls_effective_rank": centred_rank(cls),
        "embedding_spread": float(first.std(dim=0).mean() * first.shape[1] ** 0.5),
        "embedding_effective_rank": centred_rank(first),
        "crop_similarity": float((first * second).sum(dim=-1).mean()),
    }
