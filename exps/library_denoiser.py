"""What the denoisers by other libraries share: their options, the noisy images, and the interface around a network."""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils  # noqa: F401 - --help without torch

# isort: split
import torch
from torch import Tensor

from Neighbor2Neighbor.data import read_noisy, unit_values
from utils.files import atomic_path
from utils.images import list_images
from utils.noise import NoiseSpec
from utils.progress import progress
from utils.tensor_files import load_tensors
from utils.values import resolve

SIDE = 64  # pixels of a crop


class LibraryDenoiser:
    """The interface of Neighbor2Neighbor/denoisers.py around a network whose weights lie in a file."""

    name: str
    multiple: int
    reach: int

    def __init__(self, spec: NoiseSpec, model: Path | None, device: torch.device, precision: str):
        if model is None:
            raise ValueError(f"--model is missing; name the .pth that training the {self.name} denoiser wrote")
        weights = load_tensors(model)
        self.channels, self.device = self.channels_of(weights), device
        self.network = self.build(self.channels)
        self.network.load_state_dict(weights)
        self.network.to(device).eval()
        self.identity = f"{self.name} {hashlib.sha256(Path(model).read_bytes()).hexdigest()[:16]}"

    @staticmethod
    def build(channels: int) -> torch.nn.Module:
        raise NotImplementedError

    @staticmethod
    def channels_of(weights: dict[str, Tensor]) -> int:
        raise NotImplementedError

    @torch.inference_mode()
    def denoise(self, batch: Tensor) -> Tensor:
        return self.network(batch.to(self.device))


def make_parser(about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--values", default="auto")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_images(args: argparse.Namespace) -> list[Tensor]:
    """All images of the folder, noisy as they are: [C, H, W] in [0, 1]."""
    names = list_images(args.data)
    rule, sentence = resolve(args.values, args.data, names, args.channels)
    print(sentence)
    images = [read_noisy(args.data, name, NoiseSpec.parse("none"), 0, args.channels, rule) for name in names]
    return [unit_values(torch.from_numpy(image).permute(2, 0, 1)) for image in images]


def train(
    network: torch.nn.Module, images: list[Tensor], args: argparse.Namespace, loss: Callable[[Tensor], Tensor]
) -> None:
    """args.steps of Adam on loss(batch of crops), then the weights in args.output."""
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for batch in progress(_draw_batches(images, args), total=args.steps, desc=args.output.stem, unit="step"):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    with atomic_path(args.output) as temporary:
        torch.save(network.state_dict(), temporary)


def _draw_batches(images: list[Tensor], args: argparse.Namespace) -> Iterator[Tensor]:
    side = min(SIDE, *(length for image in images for length in image.shape[1:]))
    for _ in range(args.steps):
        yield torch.stack([_draw_crop(images[int(i)], side) for i in torch.randint(len(images), (args.batch_size,))])


def _draw_crop(image: Tensor, side: int) -> Tensor:
    top, left = (int(torch.randint(length - side + 1, ())) for length in image.shape[1:])
    return image[:, top : top + side, left : left + side]
