"""The denoising U-Net, with the parameter names of the published code, so that published .pth files load.

Two 3x3 convolutions at full size, then `depth` times (2x2 max-pool, 3x3 convolution); a decoder of as many steps, each
a 2x2 transposed convolution, concatenation with the pooled input of that level (the image itself at the last), two
3x3 convolutions; 1x1 convolutions at the end. LeakyReLU(0.2), no norms. 1,259,475 parameters at the published size.
"""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.tensor_files import load_tensors
from utils.text import one_line


class Upsample(nn.Module):
    """2x2 transposed convolution of stride 2, then concatenation with the skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, 2)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return torch.cat([self.deconv(x), skip], dim=1)


class UNet(nn.Module):
    """f: [B, C, H, W] -> [B, C, H, W], H and W multiples of 2^depth, values in [0, 1] as a rule.

    init_scale: of the He-normal weights at the start. The published 0.1 makes the output and nearly all gradients
    vanish at first, which costs some hundred steps; 1 suits short trainings.
    """

    def __init__(self, channels: int = 3, features: int = 48, depth: int = 5, init_scale: float = 0.1):
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth {depth}: the U-Net needs at least one pooling")
        self.channels, self.features, self.depth = channels, features, depth
        wide = 2 * features
        self.enc_conv0 = nn.Conv2d(channels, features, 3, padding=1)
        for level in range(1, depth + 2):
            self.add_module(f"enc_conv{level}", nn.Conv2d(features, features, 3, padding=1))
        for level in range(depth, 0, -1):
            below = features if level == depth else wide
            skip = channels if level == 1 else features
            self.add_module(f"up{level}", Upsample(below))
            self.add_module(f"dec_conv{level}a", nn.Conv2d(below + skip, wide, 3, padding=1))
            self.add_module(f"dec_conv{level}b", nn.Conv2d(wide, wide, 3, padding=1))
        self.nin_a = nn.Conv2d(wide, wide, 1)
        self.nin_b = nn.Conv2d(wide, wide, 1)
        self.nin_c = nn.Conv2d(wide, channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight)
                module.weight.data *= init_scale
                nn.init.zeros_(module.bias)

    @property
    def multiple(self) -> int:
        """Both sides of the input must be multiples of it."""
        return 2**self.depth

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.multiple or x.shape[-2] % self.multiple or not x.numel():
            raise ValueError(
                f"the U-Net of depth {self.depth} reads sides that are multiples of {self.multiple} px, "
                f"not {x.shape[-2]}x{x.shape[-1]}; pad the images or train with a smaller --depth"
            )
        layer = self._modules
        skips = [x]
        x = _activation(self.enc_conv0(x))
        for level in range(1, self.depth + 1):
            x = F.max_pool2d(_activation(layer[f"enc_conv{level}"](x)), 2)  # [B, F, H / 2^level, W / 2^level]
            skips.append(x)
        x = _activation(layer[f"enc_conv{self.depth + 1}"](x))
        for level in range(self.depth, 0, -1):
            x = layer[f"up{level}"](x, skips[level - 1])
            x = _activation(layer[f"dec_conv{level}a"](x))
            x = _activation(layer[f"dec_conv{level}b"](x))
        x = _activation(self.nin_a(x))
        x = _activation(self.nin_b(x))
        return self.nin_c(x)


def _activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2, inplace=True)


def load_unet(path: Path | str) -> UNet:
    """The U-Net of a .pth file (ours or published), in eval mode; its size is read off the weights.

    ValueError for a file that is missing, damaged, no state dict, or does not match the architecture.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing; name the unet.pth of a trained denoiser")
    state = load_tensors(path)
    try:
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}  # saved from DataParallel
        features, channels = state["enc_conv0.weight"].shape[:2]
        depth = max(int(match[1]) for name in state if (match := re.fullmatch(r"up(\d+)\.deconv\.weight", name)))
    except (AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no weights of a Neighbor2Neighbor U-Net ({type(error).__name__})") from error
    network = UNet(channels, features, depth)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not match the U-Net: {one_line(error)}") from error
    return network.eval()
