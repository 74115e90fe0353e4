"""A denoiser by another library: structured Noise2Void of careamics, for noise that near pixels share.

    pip install careamics        # in an environment of its own, as it may ask for another torch
    python exps/careamics_denoiser.py --data DIR --output n2v.pth --values log --mask square --span 3 --steps 2000
    python -m Neighbor2Neighbor.denoise --denoiser exps.careamics_denoiser:StructN2V --model n2v.pth --data DIR \\
        --noise none --values log

Noise2Void hides pixels and predicts them from what lies around them. Its structured form hides the neighbours too whose
noise would tell that of the pixel (Broaddus et al., "Removing structured noise with self-supervised blind-spot
networks", ISBI 2020): a line of --span pixels, a cross or a square. Network and the median that takes the place of a
hidden pixel are N2V2's (Hoeck et al., ECCV workshops 2022). Network, hiding and loss are careamics's, the loop is here.
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

DEPTH = 2  # poolings of the network
HIDDEN = 2.0  # percent of the pixels, the neighbours of each not counted
MASKS = ("none", "horizontal", "vertical", "cross", "square")


class StructN2V(LibraryDenoiser):
    name, multiple, reach = "careamics n2v", 2**DEPTH, 48

    @staticmethod
    def build(channels: int) -> torch.nn.Module:
        try:
            from careamics.models.unet import UNet
        except ImportError as error:
            raise ValueError("this denoiser needs careamics: pip install careamics") from error
        return UNet(2, channels, channels, DEPTH, num_channels_init=32, n2v2=True, independent_channels=False)

    @staticmethod
    def channels_of(weights: dict[str, Tensor]) -> int:
        return next(value for value in weights.values() if value.ndim == 4).shape[1]


def make_hiding(mask: str, span: int, seed: int):
    """What hides pixels of a batch: a function of [B, C, H, W] that returns (hidden, as it was, where), all alike."""
    from careamics.config.algorithms.n2v_manipulation import N2VManipulateConfig, StructMaskConfig
    from careamics.lightning.modules.n2v_utils import N2VManipulate

    structure = None if mask == "none" else StructMaskConfig(axes=mask, span=span)
    config = N2VManipulateConfig(
        strategy="median", masked_pixel_percentage=HIDDEN, struct_mask=structure, seed=seed + 1
    )
    return N2VManipulate(config, device="cpu")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--mask", choices=MASKS, default="square", help="neighbours that are hidden too [square]")
    parser.add_argument("--span", type=int, default=3, help="pixels of the mask, odd [3: noise shared with the next]")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    network, images = StructN2V.build(args.channels), read_images(args)
    from careamics.losses import n2v_loss

    hide = make_hiding(args.mask, args.span, args.seed)

    def loss(batch: Tensor) -> Tensor:
        hidden, whole, where = hide(batch)
        return n2v_loss(network(hidden), whole, where)

    train(network, images, args, loss)


if __name__ == "__main__":
    cli.run(main)
