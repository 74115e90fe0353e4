"""Colour operations on batches of crops, each image with its own parameter.

All take float images [B, C, S, S] in [0, 1] (clamped again where an operation leaves that range), work on any device,
and compute what torchvision's functions of the same name compute on float images. Deviation: the published pipeline
runs them in Pillow and rounds to 8 bits after each; here nothing is rounded between the operations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def _each(value: Tensor, images: Tensor) -> Tensor:
    return value.to(images).view(-1, 1, 1, 1)


def luminance(images: Tensor) -> Tensor:
    """Grey image [B, 1, S, S]: ITU-R 601 weights for three channels, else the mean of the channels."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Times factor [B]."""
    return (images * _each(factor, images)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luminance of the image; factor [B] is the image's share."""
    factor = _each(factor, images)
    mean = luminance(images).mean((1, 2, 3), keepdim=True)
    return (images * factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luminance, three channels; factor [B] is the image's share."""
    factor = _each(factor, images)
    return (images * factor).add_(luminance(images) * (1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by shift [B] (of a full turn), three channels, saturation and value of HSV kept."""
    red, green, blue = images.unbind(1)  # [B, S, S]
    value = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - low
    scale = chroma.clamp(min=1e-12).reciprocal_()  # grey pixels have chroma 0: their hue has no effect
    # Hue in sixths of a turn: measured from the channel that is largest, red before green before blue.
    hue = (red - green).mul_(scale).add_(4)
    hue = torch.where(value == green, (blue - red).mul_(scale).add_(2), hue)
    hue = torch.where(value == red, (green - blue).mul_(scale), hue)
    hue.add_(6 * shift.to(hue).view(-1, 1, 1))
    hue.sub_(torch.floor(hue / 6), alpha=6)  # into [0, 6)
    out = torch.empty_like(images)
    # Share of the chroma in a channel: 1 within one sixth of its own hue, falling to 0 at two sixths.
    torch.sub(hue, 3, out=out[:, 0]).abs_().sub_(1)
    torch.sub(hue, 2, out=out[:, 1]).abs_().neg_().add_(2)
    torch.sub(hue, 4, out=out[:, 2]).abs_().neg_().add_(2)
    return out.clamp_(0, 1).mul_(chroma.unsqueeze(1)).add_(low.unsqueeze(1))


def grey(images: Tensor) -> Tensor:
    """The luminance in every channel."""
    return luminance(images).expand_as(images)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian of sigma [B] pixels, `kernel` (odd) taps an axis, borders reflected.

    Separable and symmetric: 2 x (kernel + 1) / 2 fused passes over the batch; measured faster on a CPU than a grouped
    convolution (4 times at 224 pixels) or banded matrix products.
    """
    half = kernel // 2
    taps = torch.exp(-0.5 * (torch.arange(half + 1, device=images.device) / sigma.to(images).unsqueeze(1)) ** 2)
    taps = taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1])  # [B, half + 1]: centre, then outwards
    for axis in (3, 2):
        length = images.shape[axis]
        margin = (half, half, 0, 0) if axis == 3 else (0, 0, half, half)
        padded = F.pad(images, margin, mode="reflect")
        images = padded.narrow(axis, half, length) * _each(taps[:, 0], images)
        for k in range(1, half + 1):
            pair = padded.narrow(axis, half - k, length) + padded.narrow(axis, half + k, length)
            images.addcmul_(pair, _each(taps[:, k], images))
    return images


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Values at or above the threshold (of 1) are inverted."""
    return torch.where(images >= threshold, 1 - images, images)


def jitter(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, for each image in its own order (torchvision's ColorJitter); in place.

    order: int [B, 4], the operation at each position; factors: float [B, 4], by operation; both on the CPU, because
    the images of one operation are gathered, and their number must be known without waiting for the device.
    A neutral factor (1; hue: 0) skips its operation; images that are not RGB take brightness and contrast alone.
    """
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    operations = operations if images.shape[1] == 3 else operations[:2]
    active = factors != torch.tensor([1.0, 1.0, 1.0, 0.0])  # [B, 4]
    for position in range(4):
        for number, operation in enumerate(operations):
            chosen = (order[:, position] == number) & active[:, number]
            on_chosen(images, chosen, lambda part, factor, run=operation: run(part, factor), factors[:, number])
    return images


def on_chosen(images: Tensor, chosen: Tensor, operation, *parameters: Tensor) -> None:
    """Replace the chosen (bool [B], CPU) images by operation(images, *parameters), parameters [B] on the CPU; in place."""
    index = chosen.nonzero().flatten()
    if not len(index):
        return
    parameters = [parameter[index].to(images.device, non_blocking=True) for parameter in parameters]
    index = index.to(images.device, non_blocking=True)
    images.index_copy_(0, index, operation(images.index_select(0, index), *parameters))
