"""Boxes as torchvision's RandomResizedCrop, pixels as Pillow's bicubic resize."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from dinov2.data.resample import ATTEMPTS, cut, random_boxes
from tests.dinov2.data.trees import picture
from utils.noise import NoiseSpec, keyed_noise

LEVEL = 1 / 255 + 1e-6


def assert_pillows(out, expected, dense):
    """At most one level apart; torch's uint8 kernel, of 16-bit weights, now and then two."""
    difference = (out - expected).abs()
    assert difference.max() <= (1 if dense else 2) * LEVEL
    assert (difference > LEVEL).float().mean() < 0.002
    assert difference.mean() < 0.1 / 255


def canvas_of(images):
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    canvas = np.zeros((len(images), height, width, images[0].shape[2]), images[0].dtype)
    for place, image in zip(canvas, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return torch.from_numpy(canvas).permute(0, 3, 1, 2)


def pillow(image, box, size, flip):
    """Crop and resize, the horizontal pass first: Pillow 13 chooses the order of the passes, older versions did not."""
    top, left, height, width = box
    crop = Image.fromarray(image).crop((left, top, left + width, top + height))
    crop = crop.resize((size, height), Image.BICUBIC).resize((size, size), Image.BICUBIC)
    crop = crop.transpose(Image.FLIP_LEFT_RIGHT) if flip else crop
    return torch.from_numpy(np.asarray(crop).copy()).permute(2, 0, 1) / 255


BOXES = [  # of a 60 x 83 image: whole, reduced, enlarged, narrow, one pixel, one row
    (0, 0, 60, 83), (3, 10, 50, 61), (20, 30, 11, 9), (0, 40, 60, 3), (59, 82, 1, 1), (30, 0, 1, 83),
]  # fmt: skip


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("noisy", [True, False])
def test_cut_is_pillows_bicubic_to_one_level(dense, noisy):
    image = picture(0, 60, 83)
    if noisy:  # saturated pixels: the clamps between and after the two passes matter
        image = keyed_noise(image, NoiseSpec.parse("gauss255"), 0, "x")
    canvas = canvas_of([picture(1, 70, 90), image])
    flips = [False, True, False, True, True, False]
    boxes = torch.tensor([[(0, 0, 70, 90), box] for box in BOXES])
    for size in (16, 32, 96):
        out = cut(canvas, boxes, size, torch.tensor([[False, flip] for flip in flips]), dense=dense)
        assert out.shape == (2 * len(BOXES), 3, size, size) and out.min() >= 0 and out.max() <= 1
        for k, (box, flip) in enumerate(zip(BOXES, flips, strict=True)):
            difference = (out[2 * k + 1] - pillow(image, box, size, flip)).abs()
            assert difference.max() <= LEVEL, (size, box)
            assert difference.mean() < 0.1 / 255, (size, box)


def test_both_ways_of_cutting_agree_on_float_images():
    image = torch.rand(2, 1, 40, 57, generator=torch.Generator().manual_seed(0))
    image[0, 0, 10:20] = 1.0  # overshoots next to this edge
    boxes = torch.tensor([[(0, 0, 40, 57), (5, 7, 30, 20)], [(8, 3, 12, 50), (0, 0, 9, 9)]])
    flip = torch.tensor([[True, False], [False, True]])
    single, dense = (cut(image, boxes, 24, flip, dense=way) for way in (False, True))
    assert single.max() <= 1 and single.min() >= 0
    torch.testing.assert_close(dense, single, atol=2e-6, rtol=0)
    levels = single * 255
    assert (levels - levels.round()).abs().max() > 0.1, "float images must not be rounded to 8 bits"


@pytest.mark.parametrize("dense", [True, False])
def test_a_window_of_a_resized_image(dense):
    image = picture(3, 61, 47)
    whole = Image.fromarray(image).resize((62, 61), Image.BICUBIC).resize((62, 80), Image.BICUBIC)
    window = TF.to_tensor(whole)[:, 11 : 11 + 32, 5 : 5 + 32]
    boxes, grid, offset = (torch.tensor([[pair]]) for pair in ((0, 0, 61, 47), (80, 62), (11, 5)))
    out = cut(canvas_of([image]), boxes, 32, grid=grid, offset=offset, dense=dense)
    assert_pillows(out[0], window, dense)


def scalar_box(u, height, width, scale, ratio=(3 / 4, 4 / 3)):
    """torchvision's loop over ten attempts, from given uniform numbers."""
    for k in range(ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[k])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * u[ATTEMPTS + k])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def test_boxes_follow_torchvisions_attempts_and_fallbacks():
    sizes = torch.tensor([(375, 500), (96, 96), (1, 1), (1, 50), (200, 3), (30, 300), (7, 5)])
    uniform = torch.rand(
        40, len(sizes), 2 * ATTEMPTS + 2, generator=torch.Generator().manual_seed(1), dtype=torch.double
    )
    for scale in ((0.32, 1.0), (0.05, 0.32), (0.9, 1.0)):
        boxes = random_boxes(uniform, sizes, scale)
        expected = [
            [scalar_box(u, h, w, scale) for u, (h, w) in zip(row, sizes.tolist(), strict=True)]
            for row in uniform.tolist()
        ]
        assert boxes.tolist() == [[list(box) for box in row] for row in expected]


def test_boxes_are_distributed_as_torchvisions():
    height, width, n = 120, 160, 4000
    uniform = torch.rand(n, 1, 2 * ATTEMPTS + 2, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    ours = random_boxes(uniform, torch.tensor([(height, width)]), (0.32, 1.0))[:, 0].double()
    torch.manual_seed(3)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.32, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]).double()
    for sample in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = sample(ours), sample(theirs)
        error = math.sqrt((a.var() + b.var()) / n)
        assert abs(a.mean() - b.mean()) < 4 * error
        assert 0.9 < a.std() / b.std() < 1.1
