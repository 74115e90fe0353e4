"""Colour operations on batches of crops, each image with its own parameter.

All take float images [B, C, S, S] in [0, 1] (clamped again if an operation leaves that range), work on any device, and
compute what torchvision's functions of the same name compute on float images. Deviation: the published pipeline runs
them in Pillow and rounds to 8 bits after each one; here nothing is rounded in between.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def _broadcast(value: Tensor, images: Tensor) -> Tensor:
    return value.to(images, non_blocking=True).view(-1, 1, 1, 1)


def luminance(images: Tensor) -> Tensor:
    """Grey image [B, 1, S, S]: ITU-R 601 weights for three channels, else the mean of the channels."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Times factor [B]; in place."""
    return images.mul_(_broadcast(factor, images)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luminance of the image; factor [B] is the weight of the image; in place."""
    factor = _broadcast(factor, images)
    mean = luminance(images).mean((1, 2, 3), keepdim=True)
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the luminance, three channels; factor [B] is the weight of the image; in place."""
    factor = _broadcast(factor, images)
    other = luminance(images).mul_(1 - factor)
    return images.mul_(factor).add_(other).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue by shift [B] (of a full turn), three channels, keeping saturation and value of HSV; in place.

    Without branches, as `where` costs a CPU as much as forty arithmetic passes. With the channels scaled to r, g, b in
    [0, 1] (one of them 0, one of them 1) and y = g - b, the hue in sixths of a turn is y where red is largest, else
    3 - y (1 + r): if r is neither 0 nor 1, y is 1 or -1.
    """
    red, green, blue = images.unbind(1)  # [B, S, S]
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(low)
    divisor = chroma.clamp(min=1e-12)  # grey pixels have chroma 0 and no hue
    r, y = (red - low).div_(divisor), (green - blue).div_(divisor)
    hue = torch.addcmul(y, y, r).neg_().add_(3)
    hue.addcmul_(r.floor_(), y.sub_(hue))  # floor(r) is 1 where red is largest
    hue.add_(6 * shift.to(hue, non_blocking=True).view(-1, 1, 1))
    hue.sub_(torch.div(hue, 6, out=y).floor_(), alpha=6)  # into [0, 6)
    # Fraction of the chroma in a channel: 1 within one sixth of its own hue, falling to 0 at two sixths.
    red.copy_(hue).sub_(3).abs_().sub_(1)
    green.copy_(hue).sub_(2).abs_().neg_().add_(2)
    blue.copy_(hue).sub_(4).abs_().neg_().add_(2)
    return images.clamp_(0, 1).mul_(chroma.unsqueeze(1)).add_(low.unsqueeze(1))


def grey(images: Tensor) -> Tensor:
    """The luminance in every channel."""
    return luminance(images).expand_as(images)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian of sigma [B] pixels, `kernel` (odd) taps per axis, borders reflected.

    Separable and symmetric: 2 x (kernel + 1) / 2 fused passes over the batch; measured faster on a CPU than a grouped
    convolution (4 times at 224 pixels) or banded matrix products.
    """
    half = kernel // 2
    taps = torch.exp(-0.5 * (torch.arange(half + 1, device=images.device) / sigma.to(images).unsqueeze(1)) ** 2)
    taps = taps * (taps > 1e-8)  # negligible in float32, but their products are denormal numbers, which are slow
    taps = taps / (2 * taps.sum(1, keepdim=True) - taps[:, :1])  # [B, half + 1]: centre, then outwards
    out, pair = torch.empty_like(images), torch.empty_like(images)
    for axis in (3, 2):
        length = images.shape[axis]
        margin = (half, half, 0, 0) if axis == 3 else (0, 0, half, half)
        padded = F.pad(images if axis == 3 else out, margin, mode="reflect")
        torch.mul(padded.narrow(axis, half, length), _broadcast(taps[:, 0], images), out=out)
        for k in range(1, half + 1):
            torch.add(padded.narrow(axis, half - k, length), padded.narrow(axis, half + k, length), out=pair)
            out.addcmul_(pair, _broadcast(taps[:, k], images))
    return out


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Values at or above the threshold (of 1) are inverted."""
    return torch.where(images >= threshold, 1 - images, images)


def jitter(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, for each image in its own order (torchvision's ColorJitter).

    order: int [B, 4], the operation at each position; factors: float [B, 4], by operation; both on the CPU, because
    the number of images of an operation on a device would have to be waited for. At each position the batch is sorted
    by operation, and each operation runs over its part in place. A neutral factor (1; hue: 0) skips its operation;
    images that are not RGB only take brightness and contrast.
    """
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    operations = operations if images.shape[1] == 3 else operations[:2]
    neutral = factors == torch.tensor([1.0, 1.0, 1.0, 0.0])
    number = torch.arange(len(images))  # of the image in each place
    for position in range(4):
        chosen = order[number, position]
        chosen = torch.where(neutral[number, chosen] | (chosen >= len(operations)), 4, chosen)  # 4: none
        moved = chosen.argsort()
        images = images.index_select(0, moved.to(images.device, non_blocking=True))
        number, chosen = number[moved], chosen[moved]
        for k, operation in enumerate(operations):
            start, stop = torch.searchsorted(chosen, torch.tensor([k, k + 1])).tolist()
            if start < stop:
                operation(images[start:stop], factors[number[start:stop], k])
    return images.index_select(0, number.argsort().to(images.device, non_blocking=True))


def jitter_without_choices(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """`jitter` with order and factors on the images' device: every operation at every position on all images, of which
    each keeps its own. Many times the work, but a compiler can fuse it."""
    last = SATURATION if images.shape[1] != 3 else HUE + 1  # the first operation that only RGB images take
    neutral = torch.cat((factors[:, :HUE] == 1, factors[:, HUE:] == 0), dim=1)
    skipped = neutral | (torch.arange(HUE + 1, device=factors.device) >= last)
    for position in range(4):
        chosen = order[:, position : position + 1]  # [B, 1]
        factor, skip = (value.gather(1, chosen).view(-1, 1, 1, 1) for value in (factors, skipped))
        chosen, grey = chosen.view(-1, 1, 1, 1), luminance(images)
        other = torch.where(chosen == CONTRAST, grey.mean((1, 2, 3), keepdim=True), grey) * (chosen != BRIGHTNESS)
        changed = (images * factor + other * (1 - factor)).clamp(0, 1)
        if images.shape[1] == 3:
            changed = torch.where(chosen == HUE, adjust_hue(images.clone(), factor.flatten()), changed)
        images = torch.where(skip, images, changed)
    return images


def on_chosen(images: Tensor, chosen: Tensor, operation, *parameters: Tensor) -> None:
    """Replace the chosen images by operation(images, *parameters), in place; chosen bool [B], parameters [B]: CPU."""
    index = chosen.nonzero().flatten()
    if not len(index):
        return
    parameters = [parameter[index].to(images.device, non_blocking=True) for parameter in parameters]
    index = index.to(images.device, non_blocking=True)
    images.index_copy_(0, index, operation(images.index_select(0, index), *parameters))
