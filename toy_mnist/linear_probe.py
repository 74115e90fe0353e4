"""Linear probe of the toy: 32 features -> 10 digits on a frozen encoder.

    python -m toy_mnist.linear_probe clean_mlp_final.pth --noise gauss102 --seeds 2 --data DIR

prints the test accuracy of any encoder of that shape, released weights included. About 20 s per seed on one core.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from toy_mnist.data import Digits, load_digits_or_mnist
from toy_mnist.model import Encoder, load_encoder, seeded
from toy_mnist.pretrain import BATCH, LEARNING_RATE, stream_seed
from utils import cli
from utils.noise import NoiseSpec, perturb
from utils.progress import Progress


def probe(encoders: list[Encoder], data: Digits, spec: NoiseSpec, seed: int, epochs: int = 50) -> list[float]:
    """Test accuracy (percent) of a linear classifier on each frozen encoder, trained and tested under `spec`.

    Training noise is drawn anew every epoch, test noise once. All encoders read the same noisy batches: the noise costs
    as much as an encoder, and a comparison on the same draws is the sharper one. An encoder's figure doesn't depend on
    which others are probed beside it.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, "probe", str(spec)))
    heads = [seeded(torch.nn.Linear, stream_seed(seed, "head"), 32, 10) for _ in encoders]
    optimizer = torch.optim.Adam([p for head in heads for p in head.parameters()], lr=LEARNING_RATE, fused=True)
    with Progress(epochs, f"seed {seed}: probe {len(encoders)} on {view_name(spec)}", "epochs") as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(data.train_images), generator=generator).split(BATCH):
                features = encode(encoders, data.train_images[index], spec, generator)
                losses = [
                    F.cross_entropy(head(z), data.train_labels[index]) for head, z in zip(heads, features, strict=True)
                ]
                optimizer.zero_grad()
                sum(losses).backward()
                optimizer.step()
            bar.update(1)
    features = encode(encoders, data.test_images, spec, generator)
    return [
        100 * (head(z).argmax(1) == data.test_labels).float().mean().item()
        for head, z in zip(heads, features, strict=True)
    ]


@torch.no_grad()
def encode(
    encoders: list[Encoder], images: torch.Tensor, spec: NoiseSpec, generator: torch.Generator
) -> list[torch.Tensor]:
    """Features [B, 32] of one noisy draw of uint8 images [B, 28, 28], for each encoder."""
    noisy = perturb(images.float() / 255, spec, generator)
    return [encoder(noisy) for encoder in encoders]


def view_name(spec: NoiseSpec) -> str:
    """What the encoder reads: "clean" without noise, else "noisy"."""
    return "clean" if spec.kind == "none" else "noisy"


def main() -> None:
    """Command line: prints one line of accuracy per seed and encoder."""
    parser = argparse.ArgumentParser(prog="python -m toy_mnist.linear_probe", description=__doc__.splitlines()[0])
    parser.add_argument("weights", nargs="+", help="checkpoints of 784-128-32 encoders")
    parser.add_argument("--noise", default="gauss102", help="of train and test images, or none (default: gauss102)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="number of seeds (default: 1)")
    parser.add_argument("--data", metavar="DIR", help="folder of MNIST's idx files; default: download; or digits")
    args = parser.parse_args()
    spec = NoiseSpec.parse(args.noise)
    encoders = [load_encoder(path) for path in args.weights]
    data = load_digits_or_mnist(args.data)
    for seed in range(args.seeds):
        for path, accuracy in zip(args.weights, probe(encoders, data, spec, seed), strict=True):
            print(f"{path} on {data.name}, {spec}, seed {seed}: {accuracy:.2f} %", flush=True)


if __name__ == "__main__":
    cli.run(main)
