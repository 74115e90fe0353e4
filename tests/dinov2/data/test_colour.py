"""Every colour operation against torchvision's function with the same parameters, on float images."""

import pytest
import torch
import torchvision.transforms.functional as TF
import torchvision.transforms.v2.functional as TF2

from dinov2.data import colour
from tests.dinov2.data.trees import picture

TOLERANCE = 2e-6  # float32 rounding of another order of operations
PAIRS = {
    "brightness": (colour.adjust_brightness, TF2.adjust_brightness, (0.0, 0.6, 1.0, 1.4)),
    "contrast": (colour.adjust_contrast, TF2.adjust_contrast, (0.0, 0.6, 1.0, 1.4)),
    "saturation": (colour.adjust_saturation, TF2.adjust_saturation, (0.0, 0.8, 1.0, 1.2)),
    "hue": (colour.adjust_hue, TF2.adjust_hue, (-0.5, -0.1, 0.03, 0.1, 0.5)),
}


def images(n, channels=3, side=24):
    """Real-like pictures, random pixels, black, white, grey and pixels with two equal channels."""
    batch = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(n))
    batch[0] = torch.from_numpy(picture(0, side, side).copy()).permute(2, 0, 1) / 255
    batch[1, :, :4] = torch.tensor([0.0, 1.0, 0.5, 0.25]).view(1, 4, 1)
    batch[1, 1, 4:8] = batch[1, 0, 4:8]
    batch[1, 2, 8:12] = batch[1, 1, 8:12]
    batch[1, 2, 12:16] = batch[1, 0, 12:16]
    batch[1] = (batch[1] * 255).round() / 255
    return batch[:, :channels].clone()


@pytest.mark.parametrize("name", PAIRS)
def test_jitter_operation_is_torchvisions(name):
    ours, theirs, values = PAIRS[name]
    batch = images(len(values))
    expected = torch.stack([theirs(image, value) for image, value in zip(batch, values, strict=True)])
    torch.testing.assert_close(ours(batch.clone(), torch.tensor(values)), expected, atol=TOLERANCE, rtol=0)


def test_grey_is_torchvisions():
    batch = images(4)
    torch.testing.assert_close(colour.grey(batch), TF2.rgb_to_grayscale(batch, 3), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", [5, 24])
def test_blur_is_torchvisions(side):
    batch = torch.cat((images(4), torch.zeros(1, 3, 24, 24)))[..., :side, :side]
    batch[4, :, 2, 2] = 1.0
    sigmas = torch.tensor([0.1, 0.35, 1.0, 2.0, 0.1])
    expected = torch.stack([TF.gaussian_blur(x, [9, 9], [float(s)] * 2) for x, s in zip(batch, sigmas, strict=True)])
    torch.testing.assert_close(colour.gaussian_blur(batch, sigmas, 9), expected, atol=TOLERANCE, rtol=0)


def test_solarize_is_torchvisions():
    batch = (images(4) * 255).round() / 255
    assert (batch == 128 / 255).any(), "the threshold itself must occur"
    assert torch.equal(colour.solarize(batch, 128 / 255), TF2.solarize(batch, 128 / 255))


def test_jitter_takes_each_image_through_its_own_order():
    n = 24
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(k)) for k in range(n)])
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(n, 4, generator=generator) * 0.8 + 0.6
    factors[:, 3] = torch.rand(n, generator=generator) * 0.2 - 0.1
    factors[3] = torch.tensor([1.0, 1.0, 1.0, 0.0])  # not drawn
    factors[4, 1] = 1.0
    batch = images(n)
    expected = []
    for image, row, values in zip(batch, order.tolist(), factors.tolist(), strict=True):
        for operation in row:
            image = list(PAIRS.values())[operation][1](image, values[operation])
        expected.append(image)
    out = colour.jitter(batch, order, factors)
    torch.testing.assert_close(out, torch.stack(expected), atol=5e-6, rtol=0)
    assert torch.equal(out[3], batch[3])
    reversed_order = colour.jitter(batch, order.flip(1), factors)
    assert (reversed_order - out).abs().max() > 0.01, "the order must matter for this test to hold anything"


@pytest.mark.parametrize("channels", [1, 2])
def test_images_that_are_not_rgb_take_brightness_and_contrast(channels):
    batch = images(3, channels)
    order = torch.tensor([[3, 0, 2, 1]] * 3)
    factors = torch.tensor([[1.2, 0.7, 0.5, 0.1]] * 3)
    lit = (batch * 1.2).clamp(0, 1)
    mean = lit.mean((1, 2, 3), keepdim=True)
    out = colour.jitter(batch, order, factors)
    torch.testing.assert_close(out, (lit * 0.7 + mean * 0.3).clamp(0, 1), atol=TOLERANCE, rtol=0)


def test_only_the_chosen_images_change():
    batch = images(4)
    before = batch.clone()
    chosen = torch.tensor([False, True, False, True])
    colour.on_chosen(batch, chosen, lambda x, value: x * value.view(-1, 1, 1, 1), torch.tensor([9.0, 0.5, 9.0, 0.25]))
    assert torch.equal(batch[[0, 2]], before[[0, 2]])
    assert torch.equal(batch[1], before[1] * 0.5) and torch.equal(batch[3], before[3] * 0.25)
