"""The toy's encoder and its self-supervised loss (invariance of two crops, and decorrelated unit-variance features)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from utils.tensor_files import load_tensors

COVARIANCE_WEIGHT = 0.5


class Encoder(nn.Module):
    """784 -> 128 -> 32 with a ReLU between and no biases; parameters are named as in the released weights."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 32, bias=False))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images: float [B, 28, 28] in [0, 1]. Returns features [B, 32]."""
        return self.net(images.flatten(1))


def seeded(module: type[nn.Module], seed: int, *args: int) -> nn.Module:
    """module(*args) with its default initial weights drawn from `seed`, the global random state left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module(*args)


def load_encoder(path: Path | str) -> Encoder:
    """The encoder of a checkpoint of this toy, or of a plain state dict as released. ValueError for any other file."""
    encoder = Encoder()
    try:
        state = load_tensors(path)
        encoder.load_state_dict(state.get("encoder", state))
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of the toy's 784-128-32 encoder") from error
    return encoder


def invariance_loss(z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of the squared distance of two crops' features [B, D]."""
    return (z1 - z2).square().sum(1).mean()


def covariance_penalty(z: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius distance of the covariance (with 1/n) of features [B, D] from the identity."""
    z = z - z.mean(0)
    return (z.T @ z / len(z) - torch.eye(z.shape[1], device=z.device)).square().sum()
