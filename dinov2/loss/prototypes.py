"""Self-distillation over prototypes: teacher targets (centring, Sinkhorn-Knopp), cross-entropies of DINO and iBOT."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.distributed import all_reduce_sum
from utils.fused import fused

# Logits whose float32 copies exist at a time: 2 MiB stay in a CPU's cache, 256 MiB fill a GPU.
CHUNK = {"cpu": 2**19, "cuda": 2**26}


def row_chunks(logits: Tensor) -> Iterator[slice]:
    """Slices over the rows of logits [n, K]: float32 copies of all rows at once are the largest tensors of a step."""
    rows = max(1, CHUNK.get(logits.device.type, 2**26) // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield slice(start, start + rows)


@fused
def _softmax_into(out: Tensor, logits: Tensor, center: Tensor, temp: float | Tensor) -> None:
    """out = softmax((logits - center) / temp).  # [n, K]"""
    scaled = (logits.float() - center).div_(temp)
    if out.dtype == scaled.dtype:
        torch.softmax(scaled, dim=-1, out=out)
    else:
        out.copy_(torch.softmax(scaled, dim=-1))


class Center(nn.Module):
    """Running mean of teacher logits, subtracted before the softmax (DINO).

    `softmax` uses the centre of the steps before; `observe` gathers the logits of this step (of every micro-batch),
    and `update` folds their mean over all ranks into the centre, once per step.
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
        """In float32; on a GPU in bf16 where the logits are: half of the largest tensor that a step keeps."""
        kept = torch.bfloat16 if logits.is_cuda and logits.dtype == torch.bfloat16 else torch.float32
        probabilities = torch.empty(logits.shape, device=logits.device, dtype=kept)
        if logits.is_cuda:  # a number would be compiled in, and this one changes from step to step
            temp = torch.full((), temp, device=logits.device)
        for rows in row_chunks(logits):
            _softmax_into(probabilities[rows], logits[rows], self.center.view(1, -1), temp)
        return probabilities

    @torch.no_grad()
    def observe(self, logits: Tensor) -> None:  # [n, K]
        count = torch.full((1,), float(len(logits)), device=logits.device)
        total = torch.cat((logits.sum(dim=0, dtype=torch.float32), count))
        self._total = total if self._total is None else self._total + total

    @torch.no_grad()
    def update(self) -> None:
        if self._total is None:
            return
        total = all_reduce_sum(self._total)
        mean = (total[:-1] / total[-1].clamp(min=1)).view_as(self.center)
        self.center.mul_(self.momentum).add_(mean, alpha=1 - self.momentum)
        self._total = None


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Assignment of tokens to equally used prototypes (SwAV), over all ranks.  # [n, K] → [n, K], rows sum to 1"""
    q = torch.exp(logits.float() / temp).t()  # [K, n]
    prototypes = q.shape[0]
    tokens = all_reduce_sum(torch.full((), float(q.shape[1]), device=q.device))
    q /= all_reduce_sum(q.sum())
    for _ in range(iterations):
        q /= all_reduce_sum(q.sum(dim=1, keepdim=True)) * prototypes
        q /= q.sum(dim=0, keepdim=True) * tokens
    return (q * tokens).t()


@fused
def _row_losses(student: Tensor, temp: float, targets: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """log Σ exp of each row [n, 1], and its cross-entropy with each of the targets [n]."""
    scaled = student.float() / temp
    log_probabilities = F.log_softmax(scaled, dim=-1)
    return scaled[:, :1] - log_probabilities[:, :1], [-(target * log_probabilities).sum(dim=-1) for target in targets]


@fused
def _gradient_into(out: Tensor, student: Tensor, log_sum: Tensor, temp: float, parts: list) -> None:
    """d loss / d logit_k = (softmax_k Σ targets - target_k) / temp, times its gradient; summed over teachers.

    parts: of each teacher, its targets [n, K] and the gradients of its losses over temp [n, 1]
    """
    mass = sum(target.sum(dim=-1, keepdim=True, dtype=torch.float32) * factor for target, factor in parts)
    gradient = (student.float() / temp).sub_(log_sum).exp_().mul_(mass)
    for target, factor in parts:
        gradient.addcmul_(target, factor, value=-1)
    out.copy_(gradient)


class _CrossEntropy(torch.autograd.Function):
    """Keeps logits and targets alone for the backward pass, which computes the softmax again, chunk by chunk."""

    @staticmethod
    def forward(ctx, student: Tensor, temp: float, consumed: bool, *targets: Tensor) -> Tensor:
        losses = torch.empty(len(targets), len(student), device=student.device)  # [A, n]
        log_sums = torch.empty(len(student), 1, device=student.device)
        for rows in row_chunks(student):
            log_sums[rows], parts = _row_losses(student[rows], temp, [target[rows] for target in targets])
            for loss, part in zip(losses, parts, strict=True):
                loss[rows] = part
        ctx.temp, ctx.consumed = temp, consumed
        ctx.save_for_backward(student, log_sums, *targets)
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor):
        student, log_sums, *targets = ctx.saved_tensors
        factors = (grad / ctx.temp)[..., None]  # [A, n, 1]
        fits = targets[0].dtype == student.dtype and targets[0].stride() == student.stride()
        out = targets[0] if ctx.consumed and fits else torch.empty_like(student)
        for rows in row_chunks(student):
            parts = [(target[rows], factor[rows]) for target, factor in zip(targets, factors, strict=True)]
            chunk = parts[0][0] if out is targets[0] else out[rows]  # as one argument, not as two of one memory
            _gradient_into(chunk, student[rows], log_sums[rows], ctx.temp, parts)
        return out, None, None, *(None for _ in targets)


def cross_entropy(student: Tensor, targets: Sequence[Tensor], temp: float, consumed: bool = False) -> Tensor:
    """-Σ_k targets * log_softmax(student / temp) of each row, in float32, against each of A teachers at once.

    student: [n, K]; targets: A tensors [n, K] without gradient → [A, n]
    consumed: nobody reads the targets later: where its type is theirs, the gradient takes the place of the first ones.
    """
    return _CrossEntropy.apply(student, temp, consumed, *targets)


def dino_loss(student: Tensor, targets: Sequence[Tensor], temp: float = 0.1) -> Tensor:
    """Sum over student crops s and teacher crops t of the mean cross-entropy over images, against each of A teachers.

    student: logits [S, B, K]; targets: A tensors [T, B, K] → [A]
    The sum over t is taken before the product with the student's log-probabilities: the same sum, S * T products less.
    """
    totals = [target.sum(dim=0, dtype=torch.float32) for target in targets]  # each [B, K]
    return sum(cross_entropy(crop, totals, temp).mean(dim=1) for crop in student)  # type: ignore[return-value]


def ibot_loss(student: Tensor, targets: Sequence[Tensor], weights: Tensor, crops: int, temp: float = 0.1) -> Tensor:
    """Cross-entropy on masked patches: mean over the mask of each crop, sum over crops / number of crops.

    student: logits [M, K] of the masked patches; targets: of A teachers, each [M, K]; weights: [M], 1 / masked patches
    of that crop → [A]. The targets are consumed.
    """
    return (cross_entropy(student, targets, temp, consumed=True) * weights).sum(dim=1) / crops
