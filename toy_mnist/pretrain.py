"""Pretraining of the toy's encoder on two augmented crops of each digit; resumable at every fifth epoch."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from toy_mnist.augment import augment, sample_augmentation
from toy_mnist.model import COVARIANCE_WEIGHT, Encoder, covariance_penalty, invariance_loss, load_encoder, seeded
from utils.files import atomic_path
from utils.noise import NoiseSpec, perturb
from utils.progress import Progress
from utils.results import append_json
from utils.tensor_files import load_tensors

BATCH = 256
LEARNING_RATE = 1e-4
SAVE_EVERY = 5  # epochs


def stream_seed(*names: object) -> int:
    """A seed for one random stream: a function of the names alone, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=4).digest(), "little")


def two_crops(images: torch.Tensor, spec: NoiseSpec, generator: torch.Generator) -> torch.Tensor:
    """Two noisy, augmented crops of each image. images: uint8 [B, S, S]. Returns float [2 B, S, S], first crops first.

    Noise comes before the augmentation and is drawn anew for each crop, as in the paper's toy. Everywhere else in this
    project an image has one fixed noise.
    """
    noisy = perturb((images.float() / 255).repeat(2, 1, 1), spec, generator)
    return augment(noisy, sample_augmentation(len(noisy), images.shape[-1], generator))


def checkpoint_path(folder: Path, stage: str, epoch: int) -> Path:
    """Where the encoder of a stage after `epoch` epochs lies."""
    return folder / f"{stage}_{epoch}.pth"


def pretrain(
    images: torch.Tensor, spec: NoiseSpec, epochs: int, seed: int, folder: Path, stage: str, initial: Path | None = None
) -> Path:
    """Trains an encoder for `epochs` epochs and returns the path of its last checkpoint, <folder>/<stage>_<epochs>.pth.

    images: uint8 [N, 28, 28]. initial: the checkpoint whose encoder it starts from (Adam starts afresh), or None for
    fresh weights, which depend on the seed alone. Goes on from the last checkpoint of the stage; every epoch has a
    random stream of its own, so an interrupted run ends in the same weights as one that was not.
    """
    done = max((e for e in range(epochs + 1) if checkpoint_path(folder, stage, e).is_file()), default=0)
    start = checkpoint_path(folder, stage, done) if done else initial
    encoder = load_encoder(start) if start else seeded(Encoder, stream_seed(seed, "encoder"))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=LEARNING_RATE, fused=True)
    if done:
        optimizer.load_state_dict(load_tensors(start)["optimizer"])
    if done < epochs:
        with Progress(epochs, f"seed {seed}: pretrain {stage}", "epochs", initial=done) as bar:
            for epoch in range(done + 1, epochs + 1):
                generator = torch.Generator().manual_seed(stream_seed(seed, stage, epoch))
                losses = train_epoch(encoder, optimizer, images, spec, generator)
                append_json(folder / "metrics.jsonl", {"stage": stage, "epoch": epoch, **losses})
                if epoch % SAVE_EVERY == 0 or epoch == epochs:
                    with atomic_path(checkpoint_path(folder, stage, epoch)) as temporary:
                        torch.save({"encoder": encoder.state_dict(), "optimizer": optimizer.state_dict()}, temporary)
                bar.update(1, **losses)
    return checkpoint_path(folder, stage, epochs)


def train_epoch(
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    spec: NoiseSpec,
    generator: torch.Generator,
) -> dict[str, float]:
    """One pass over the shuffled images, the last batch smaller. Returns the means of both losses over the steps."""
    invariance_sum, covariance_sum, steps = 0.0, 0.0, 0
    for index in torch.randperm(len(images), generator=generator).split(BATCH):
        z = encoder(two_crops(images[index], spec, generator))
        invariance, covariance = invariance_loss(*z.chunk(2)), covariance_penalty(z)
        optimizer.zero_grad()
        (invariance + COVARIANCE_WEIGHT * covariance).backward()
        optimizer.step()
        invariance_sum += invariance.item()
        covariance_sum += covariance.item()
        steps += 1
    return {"invariance": invariance_sum / steps, "covariance": covariance_sum / steps}
