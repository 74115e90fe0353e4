"""Random boxes, and the cut of a box out of a padded canvas with an antialiased bicubic resize.

A canvas batch is [B, C, H, W], each image at the top left of its plane. `cut` equals `crop` followed by Pillow's
BICUBIC resize (a = -0.5, support widened by the reduction), which is what the published pipeline runs; antialiasing
matters here more than elsewhere, because it averages the noise. There are two implementations:

- on a CPU, torch's uint8 kernel, one box at a time (0.15 ms per 224 crop, against 2 ms for dense products);
- elsewhere, two batched matrix products with one resampling matrix per image and axis.

8-bit images are clamped and rounded after the horizontal and after the vertical pass, as in Pillow, because noise of
large sigma often overshoots; float images are clamped once at the end. On noisy photographs both are within one level
of Pillow, except for one value in a million of the CPU's kernel (two levels). The passes come in the order of Pillow
before version 13, which does the vertical one first where that is less work.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ATTEMPTS = 10  # tries of a random box before the central one, as in torchvision


def random_boxes(uniform: Tensor, sizes: Tensor, scale: tuple[float, float], ratio=(3 / 4, 4 / 3)) -> Tensor:
    """Boxes of a random resized crop: torchvision's RandomResizedCrop.get_params, vectorised.

    uniform: [..., B, 2 * ATTEMPTS + 2] numbers of [0, 1); sizes: int [B, 2] (height, width); scale: fraction of
    the area, uniform; ratio: width / height, log-uniform. An attempt counts if it fits; when none fits, the largest
    central box of an allowed ratio. Returns int64 [..., B, 4]: top, left, height, width.
    """
    height, width = sizes.double().unbind(-1)  # [B]
    fractions = torch.lerp(*_as_doubles(scale), uniform[..., :ATTEMPTS])  # [..., B, ATTEMPTS]
    areas = (height * width).unsqueeze(-1) * fractions
    low, high = (math.log(end) for end in ratio)
    aspects = torch.exp(torch.lerp(*_as_doubles((low, high)), uniform[..., ATTEMPTS : 2 * ATTEMPTS]))
    w = torch.round(torch.sqrt(areas * aspects))
    h = torch.round(torch.sqrt(areas / aspects))
    fits = (w > 0) & (w <= width.unsqueeze(-1)) & (h > 0) & (h <= height.unsqueeze(-1))
    first = fits.byte().argmax(-1, keepdim=True)  # the first attempt that fits
    h, w = h.gather(-1, first).squeeze(-1), w.gather(-1, first).squeeze(-1)  # [..., B]
    top = torch.floor(uniform[..., -2] * (height - h + 1))
    left = torch.floor(uniform[..., -1] * (width - w + 1))

    central_h = torch.where(width / height < ratio[0], torch.round(width / ratio[0]), height)
    central_w = torch.where(width / height > ratio[1], torch.round(height * ratio[1]), width)
    central_top, central_left = torch.floor((height - central_h) / 2), torch.floor((width - central_w) / 2)
    central = torch.stack((central_top, central_left, central_h, central_w), -1)  # [B, 4]
    return torch.where(fits.any(-1, keepdim=True), torch.stack((top, left, h, w), -1), central).long()


def cut(
    canvas: Tensor,
    boxes: Tensor,
    size: int,
    flip: Tensor | None = None,
    grid: Tensor | None = None,
    offset: Tensor | None = None,
    dense: bool | None = None,
) -> Tensor:
    """Cut boxes and resize each to size x size: float32 [n * B, C, size, size] in [0, 1], crop-major.

    canvas: uint8 (or float32 in [0, 1]) [B, C, H, W]; boxes: int [n, B, 4] (top, left, height, width);
    flip: bool [n, B], mirrored horizontally. With grid and offset (int [n, B, 2], height and width) the box is
    resized to `grid` instead, and the size x size window at `offset` of it is returned (resize, then centre crop).
    dense: force (True) or forbid (False) the matrix products; None: by the canvas's device.
    """
    if dense is None:
        dense = canvas.device.type != "cpu"
    n, batch = boxes.shape[:2]
    grid = torch.full((n, batch, 2), size, device=boxes.device) if grid is None else grid
    offset = torch.zeros_like(grid) if offset is None else offset
    flip = torch.zeros(n, batch, dtype=torch.bool, device=boxes.device) if flip is None else flip
    method = _cut_dense if dense else _cut_single
    out = method(canvas, boxes, size, flip, grid, offset)
    return out.div_(255) if canvas.dtype == torch.uint8 else out.clamp_(0, 1)


def _as_doubles(pair):
    return (torch.tensor(float(end), dtype=torch.float64) for end in pair)


def _cut_single(canvas, boxes, size, flip, grid, offset):
    """One box at a time through torch's kernel; values as in the canvas."""
    n, batch = boxes.shape[:2]
    out = torch.empty(n * batch, canvas.shape[1], size, size)  # planar: the colour operations run over planes
    plan = torch.cat((boxes, grid, offset, flip.unsqueeze(-1)), -1).flatten(0, 1).tolist()
    for k, (top, left, height, width, grid_h, grid_w, y, x, mirrored) in enumerate(plan):
        box = canvas[k % batch, :, top : top + height, left : left + width].unsqueeze(0)
        image = F.interpolate(box, (grid_h, grid_w), mode="bicubic", antialias=True)[0]
        image = image[:, y : y + size, x : x + size]
        out[k] = image.flip(-1) if mirrored else image
    return out


def _cut_dense(canvas, boxes, size, flip, grid, offset):
    """Two batched products for all crops: first along the width, then along the height, as Pillow."""
    n, batch = boxes.shape[:2]
    channels, height, width = canvas.shape[1:]

    def as_stored(values):
        return values.round().clamp(0, 255) if canvas.dtype == torch.uint8 else values

    moved = (tensor.to(canvas.device, non_blocking=True) for tensor in (boxes, grid, offset, flip))
    box, target, shift, mirrored = (tensor.transpose(0, 1).flatten(0, 1) for tensor in moved)  # of [B * n]
    columns = _resampling_matrix(
        box[:, 1], box[:, 3], target[:, 1], shift[:, 1], size, width, mirrored
    )  # [B * n, size, W]
    rows = _resampling_matrix(box[:, 0], box[:, 2], target[:, 0], shift[:, 0], size, height)  # [B * n, size, H]
    pixels = canvas.to(torch.float32, memory_format=torch.contiguous_format).view(batch, channels * height, width)
    wide = torch.bmm(pixels, columns.view(batch, n * size, width).transpose(1, 2))  # [B, C * H, n * size]
    wide = as_stored(wide).view(batch, channels, height, n, size).permute(0, 3, 2, 1, 4)
    out = torch.bmm(rows, wide.reshape(batch * n, height, channels * size))  # [B * n, size, C * size]
    return as_stored(out).view(batch, n, size, channels, size).permute(1, 0, 3, 2, 4).flatten(0, 1)


def _resampling_matrix(start, length, grid, shift, size, extent, mirrored=None):
    """Resampling matrices [B, size, extent]: row i weighs the pixels of [start, start + length) for output i."""
    index = torch.arange(size, device=start.device).expand(len(start), size)
    if mirrored is not None:
        index = torch.where(mirrored.unsqueeze(1), size - 1 - index, index)
    start, end, shift = (value.float().unsqueeze(1) for value in (start, start + length, shift))  # [B, 1]
    scale = (end - start) / grid.unsqueeze(1)
    centre = (start + (index + shift + 0.5) * scale).unsqueeze(2)  # [B, size, 1]
    pixel = torch.arange(extent, device=start.device) + 0.5  # [extent]
    weight = _bicubic((pixel - centre) / scale.clamp(min=1).unsqueeze(2))
    weight = weight * ((pixel > start) & (pixel < end)).unsqueeze(1)
    return weight / weight.sum(-1, keepdim=True)


def _bicubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5."""
    x = x.abs()
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, 0.0))
