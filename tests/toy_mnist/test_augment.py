"""The batched augmentation against torchvision's, image by image, and its parameters against torchvision's."""

import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomAffine, RandomResizedCrop
from torchvision.transforms import functional as tv

from toy_mnist.augment import Augmentation, affine_grid, augment, crop_weights, sample_augmentation


def torchvision_augment(image: torch.Tensor, parameters: Augmentation, i: int) -> torch.Tensor:
    top, left, height, width = (int(v) for v in parameters.crop[i])
    image = tv.resized_crop(image[None], top, left, height, width, [28, 28], antialias=True)
    translate = [int(v) for v in parameters.translate[i]]
    angle, scale, shear = (float(v[i]) for v in (parameters.angle, parameters.scale, parameters.shear))
    return tv.affine(image, angle, translate, scale, [shear, 0.0])[0]


def test_agrees_with_torchvision_but_for_rounding_ties():
    n = 1000
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 28, 28, generator=generator)  # noise: a wrong neighbour shows
    parameters = sample_augmentation(n, 28, generator)
    ours = augment(images, parameters)
    theirs = torch.stack([torchvision_augment(images[i], parameters, i) for i in range(n)])
    wrong = (ours - theirs).abs() > 1e-5
    assert wrong.sum() <= 8  # of 784,000 pixels; 1 in 2,352,000 was measured
    source = ((affine_grid(parameters, 28) + 1) * 28 - 1) / 2  # pixels
    to_tie = ((source - source.floor()) - 0.5).abs().amin(-1)  # the nearer of x and y
    assert (to_tie[wrong] < 1e-4).all()


def test_crop_alone_is_torchvisions_resized_crop():
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(28, 28, generator=generator)
    for top, left, height, width in [(0, 0, 28, 28), (3, 1, 24, 27), (6, 0, 22, 28), (0, 5, 28, 23)]:
        start, length = torch.tensor([[top, left], [height, width]]).float()
        ours = crop_weights(start[:1], length[:1], 28)[0] @ image @ crop_weights(start[1:], length[1:], 28)[0].T
        theirs = tv.resized_crop(image[None], top, left, height, width, [28, 28], antialias=True)[0]
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_no_change_without_augmentation_and_images_do_not_mix():
    images = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(2))
    crop = torch.tensor([[0.0, 0, 28, 28]]).repeat(3, 1)
    zero = torch.zeros(3)
    still = Augmentation(crop, zero, torch.zeros(3, 2), torch.ones(3), zero)
    torch.testing.assert_close(augment(images, still), images, atol=1e-6, rtol=0)
    moved = Augmentation(crop, zero, torch.tensor([[0.0, 0], [2, -1], [0, 0]]), torch.ones(3), zero)
    out = augment(images, moved)
    torch.testing.assert_close(out[[0, 2]], images[[0, 2]], atol=1e-6, rtol=0)
    torch.testing.assert_close(out[1, :27, 2:], images[1, 1:, :26], atol=1e-6, rtol=0)  # right by 2, up by 1
    assert out[1, 27].eq(0).all() and out[1, :, :2].eq(0).all()  # black where nothing comes from


def test_parameters_have_torchvisions_distributions():
    n = 4000
    ours = sample_augmentation(n, 28, torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    image = torch.zeros(1, 28, 28)
    crops = torch.tensor([RandomResizedCrop.get_params(image, [0.8, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    maps = [RandomAffine.get_params([-15.0, 15.0], [0.1, 0.1], [0.95, 1.05], [-10.0, 10.0], [28, 28]) for _ in range(n)]
    pairs = {name: (ours.crop[:, i], crops[:, i]) for i, name in enumerate(("top", "left", "height", "width"))}
    pairs["height * width"] = ours.crop[:, 2:].prod(1), crops[:, 2:].prod(1)
    pairs["angle"] = ours.angle, torch.tensor([m[0] for m in maps])
    pairs["right"] = ours.translate[:, 0], torch.tensor([m[1][0] for m in maps])
    pairs["down"] = ours.translate[:, 1], torch.tensor([m[1][1] for m in maps])
    pairs["scale"] = ours.scale, torch.tensor([m[2] for m in maps])
    pairs["shear"] = ours.shear, torch.tensor([m[3][0] for m in maps])
    for name, (a, b) in pairs.items():
        assert ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-3, name
    assert all(m[3][1] == 0 for m in maps)  # shear=10 leaves y alone, which sample_augmentation relies on
    corner, size = ours.crop[:, :2], ours.crop[:, 2:]
    assert (corner >= 0).all() and (corner + size <= 28).all() and (ours.crop == ours.crop.round()).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_same_seed_same_parameters(seed):
    draws = [sample_augmentation(5, 28, torch.Generator().manual_seed(s)) for s in (seed, seed, seed + 1)]
    assert torch.equal(draws[0].crop, draws[1].crop) and torch.equal(draws[0].shear, draws[1].shear)
    assert not torch.equal(draws[0].angle, draws[2].angle)
