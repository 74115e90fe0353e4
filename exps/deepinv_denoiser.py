"""A denoiser by another library: UNSURE of deepinv, which learns from noisy images alone and need not know their level.

    pip install deepinv
    python exps/deepinv_denoiser.py --data DIR --output unsure.pth --values log --steps 2000
    python -m Neighbor2Neighbor.denoise --denoiser exps.deepinv_denoiser:Unsure --model unsure.pth --data DIR \\
        --noise none --values log

Stein's estimate of the error in place of pairs of neighbours (Tachella, Davies and Jacques, "UNSURE: self-supervised
learning with unknown noise level and Stein's unbiased risk estimate", ICLR 2025). As it stands here it takes the noise
for Gaussian, alike everywhere and independent between pixels: the logarithm makes speckle nearly so. R2R, for noise of
known level, is another loss of the same library (deepinv.loss.R2RLoss); it was not tried.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from Neighbor2Neighbor.data import read_noisy, unit_values  # noqa: E402
from utils import cli  # noqa: E402
from utils.files import atomic_path  # noqa: E402
from utils.images import list_images  # noqa: E402
from utils.noise import NoiseSpec  # noqa: E402
from utils.progress import progress  # noqa: E402
from utils.tensor_files import load_tensors  # noqa: E402
from utils.values import resolve  # noqa: E402

SIDE, DEPTH = 64, 8  # pixels of a crop; convolutions of the network, which decide how far it looks


def build(channels: int) -> torch.nn.Module:
    try:
        from deepinv.models import DnCNN
    except ImportError as error:
        raise ValueError("this denoiser needs deepinv: pip install deepinv") from error
    return DnCNN(in_channels=channels, out_channels=channels, depth=DEPTH, nf=48, pretrained=None)


class Unsure:
    """The interface of Neighbor2Neighbor/denoisers.py around the trained network."""

    multiple, reach = 1, DEPTH

    def __init__(self, spec: NoiseSpec, model: Path | None, device: torch.device, precision: str):
        if model is None:
            raise ValueError("--model is missing; name the .pth that exps/deepinv_denoiser.py wrote")
        weights = load_tensors(model)
        self.channels, self.device = weights["in_conv.weight"].shape[1], device
        self.network = build(self.channels)
        self.network.load_state_dict(weights)
        self.network.to(device).eval()
        self.identity = "deepinv unsure " + hashlib.sha256(Path(model).read_bytes()).hexdigest()[:16]

    @torch.inference_mode()
    def denoise(self, batch: Tensor) -> Tensor:
        return self.network(batch.to(self.device))


class WithPhysics(torch.nn.Module):
    """The network as the loss calls it: with what made the measurement, which a denoiser does not need."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, y: Tensor, physics=None, **_) -> Tensor:
        return self.network(y)


def train(images: list[Tensor], steps: int, batch: int, seed: int) -> torch.nn.Module:
    """images: [C, H, W] in [0, 1], noisy."""
    torch.manual_seed(seed)
    network = build(len(images[0]))
    from deepinv.loss import SureGaussianLoss
    from deepinv.physics import Denoising

    loss, physics = SureGaussianLoss(sigma=0.1, unsure=True), Denoising()
    model = WithPhysics(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in progress(range(steps), total=steps, desc="UNSURE", unit="step"):
        y = torch.stack([crop(images[int(i)]) for i in torch.randint(len(images), (batch,))])
        optimizer.zero_grad()
        loss(y=y, x_net=network(y), physics=physics, model=model).mean().backward()
        optimizer.step()
    print(f"noise level found: {float(loss.sigma2.detach()) ** 0.5:.3f} of the range")
    return network


def crop(image: Tensor) -> Tensor:
    side = min(SIDE, *image.shape[1:])
    top, left = (int(torch.randint(length - side + 1, ())) for length in image.shape[1:])
    return image[:, top : top + side, left : left + side]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--values", default="auto")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names = list_images(args.data)
    rule, sentence = resolve(args.values, args.data, names, args.channels)
    print(sentence)
    images = [read_noisy(args.data, name, NoiseSpec.parse("none"), 0, args.channels, rule) for name in names]
    noisy = [unit_values(torch.from_numpy(image).permute(2, 0, 1)) for image in images]
    network = train(noisy, args.steps, args.batch_size, args.seed)
    with atomic_path(args.output) as temporary:
        torch.save(network.state_dict(), temporary)


if __name__ == "__main__":
    cli.run(main)
