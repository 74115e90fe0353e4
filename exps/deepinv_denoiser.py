"""A denoiser by another library: UNSURE or R2R of deepinv, which learn from noisy images alone.

    pip install deepinv
    python exps/deepinv_denoiser.py --data DIR --output unsure.pth --values log --steps 2000
    python exps/deepinv_denoiser.py --data DIR --output r2r.pth --sigma 0.1        # noise of a known level
    python -m Neighbor2Neighbor.denoise --denoiser exps.deepinv_denoiser:Deepinv --model unsure.pth --data DIR \\
        --noise none --values log

UNSURE has Stein's estimate of the error in place of pairs of neighbours (Tachella, Davies and Jacques, "UNSURE:
self-supervised learning with unknown noise level and Stein's unbiased risk estimate", ICLR 2025). R2R corrupts a noisy
image once more, so that two images with independent noise come out of it (Pang et al., "Recorrupted-to-Recorrupted",
CVPR 2021). As they stand here, both take the noise for Gaussian, alike everywhere and independent between pixels: the
logarithm makes speckle nearly so. The images are denoised as they are: R2R's average over corrupted ones is left out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils  # noqa: F401 - --help without torch

# isort: split
import torch
from torch import Tensor

from exps.library_denoiser import LibraryDenoiser, make_parser, read_images, train
from utils import cli

DEPTH = 8  # convolutions of the network, which decide how far it looks


class Deepinv(LibraryDenoiser):
    name, multiple, reach = "deepinv", 1, DEPTH

    @staticmethod
    def build(channels: int) -> torch.nn.Module:
        try:
            from deepinv.models import DnCNN
        except ImportError as error:
            raise ValueError("this denoiser needs deepinv: pip install deepinv") from error
        return DnCNN(in_channels=channels, out_channels=channels, depth=DEPTH, nf=48, pretrained=None)

    @staticmethod
    def channels_of(weights: dict[str, Tensor]) -> int:
        return weights["in_conv.weight"].shape[1]


class WithPhysics(torch.nn.Module):
    """The network as the losses call it: with what made the measurement, which a denoiser does not need."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, y: Tensor, physics=None, **_) -> Tensor:
        return self.network(y)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sigma", type=float, help="R2R: deviation of the noise, of the range 1 [unknown: UNSURE]")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    network, images = Deepinv.build(args.channels), read_images(args)
    from deepinv.loss import R2RLoss, SureGaussianLoss
    from deepinv.physics import Denoising, GaussianNoise

    physics, model = Denoising(), WithPhysics(network)
    if args.sigma is None:
        unsure = SureGaussianLoss(sigma=0.1, unsure=True)
        train(network, images, args, lambda y: unsure(y=y, x_net=network(y), physics=physics, model=model).mean())
        print(f"noise level found: {float(unsure.sigma2.detach()) ** 0.5:.3f} of the range")
        return
    r2r = R2RLoss(noise_model=GaussianNoise(args.sigma))
    corrupting = r2r.adapt_model(model)

    def loss(y: Tensor) -> Tensor:
        x_net = corrupting(y, physics, update_parameters=True)
        return r2r(x_net=x_net, y=y, physics=physics, model=corrupting).mean()

    train(network, images, args, loss)


if __name__ == "__main__":
    cli.run(main)
