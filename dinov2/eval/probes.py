"""The linear classifiers of the probe, trained side by side, with one matrix product per feature set."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from utils import distributed

MOMENTUM = 0.9  # SGD, as published


@dataclass(frozen=True)
class FeatureSet:
    """CLS tokens of the last `blocks` blocks, with (`average`) or without the mean patch token of the last one."""

    blocks: int
    average: bool

    def columns(self, depth: int, width: int) -> slice:
        """Its columns in a row of CLS tokens of the last `depth` blocks, then the mean patch token; `width` each."""
        return slice((depth - self.blocks) * width, (depth + self.average) * width)


class Probes:
    """Linear classifiers for every feature set and learning rate, trained by SGD with momentum, without weight decay,
    with a cosine schedule to 0.

    `learning_rates` are final (already scaled by batch / 256). Each classifier evolves exactly as a separate nn.Linear
    with torch.optim.SGD would. Weights start as N(0, 0.01), biases at 0, as published.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        classes: int,
        learning_rates: list[float],
        seed: int,
        device,
        averages: bool = True,  # whether the features end with a mean patch token
    ):
        self.classes, self.learning_rates = classes, learning_rates
        choices = (False, True) if averages else (False,)
        self.sets = [FeatureSet(blocks, average) for blocks in sorted({1, depth}) for average in choices]
        self.slices = [features.columns(depth, width) for features in self.sets]
        self.rates = torch.tensor(learning_rates, device=device).repeat_interleave(classes)[:, None]  # [L * K, 1]
        generator = torch.Generator().manual_seed(seed)
        rows = len(learning_rates) * classes
        starts = [0.01 * torch.randn(rows, s.stop - s.start, generator=generator) for s in self.slices]
        # One per feature set: [L * K, D of the set + 1]; the last column is the bias.
        self.weights = [torch.cat([start, torch.zeros(rows, 1)], dim=1).to(device) for start in starts]
        self.momenta = [torch.zeros_like(weight) for weight in self.weights]

    @property
    def names(self) -> list[str]:
        """Names of the classifiers, in the order of `hits`.

        Deviation: the public names round the rate to five places, where the two lowest of batch 128 coincide.
        """
        return [
            f"classifier_{features.blocks}_blocks_avgpool_{features.average}_lr_{rate:.3g}"
            for features in self.sets
            for rate in self.learning_rates
        ]

    def _logits(self, features: Tensor) -> list[Tensor]:
        """[L, K, B] for each feature set. Images come last: a softmax over few adjacent classes is ten times slower."""
        shape = len(self.learning_rates), self.classes, len(features)  # the last may be 0: a rank without an image
        return [
            torch.addmm(weight[:, -1:], weight[:, :-1], features[:, s].T).view(shape)
            for s, weight in zip(self.slices, self.weights, strict=True)
        ]

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, progress: float) -> None:
        """One SGD step on this rank's `features` [B, F] and `labels` [B]; `progress` in [0, 1) is the fraction of
        training done.

        The loss is the mean cross-entropy over the images of all ranks, which have equally many. Its gradient is
        written out (softmax − one-hot, times the input): with 52 classifiers on one input, autograd's graph would cost
        more than the step.
        """
        decay = 0.5 * (1 + math.cos(math.pi * progress))
        one_hot = torch.nn.functional.one_hot(labels, self.classes).T.contiguous()  # [K, B]
        for s, logits, weight, momentum in zip(
            self.slices, self._logits(features), self.weights, self.momenta, strict=True
        ):
            delta = logits.softmax(dim=1).sub_(one_hot).div_(len(labels)).flatten(0, 1)  # [L * K, B]
            gradient = torch.cat([delta @ features[:, s], delta.sum(dim=1, keepdim=True)], dim=1)
            gradient = distributed.all_reduce_mean(gradient)
            momentum.mul_(MOMENTUM).add_(gradient)
            weight.addcmul_(momentum, self.rates * decay, value=-1)

    @torch.no_grad()
    def hits(self, features: Tensor, labels: Tensor) -> Tensor:
        """Which images each classifier gets right: bool [classifiers, 2, B], top-1 and top-5 (of fewer classes: all).

        A classifier that has diverged, with a logit that is not finite, counts as wrong.
        """
        logits = torch.cat(self._logits(features))  # [classifiers, K, B]
        right = logits.topk(min(5, self.classes), dim=1).indices == labels  # [classifiers, 5, B]
        right &= logits.isfinite().all(dim=1, keepdim=True)
        return torch.stack([right[:, 0], right.any(dim=1)], dim=1)

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"weights": self.weights, "momenta": self.momenta}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        for mine, saved in ((self.weights, state["weights"]), (self.momenta, state["momenta"])):
            for target, source in zip(mine, saved, strict=True):
                target.copy_(source)
