"""Evaluation transforms against torchvision's on Pillow images."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from omegaconf import OmegaConf
from PIL import Image
from torchvision import transforms

from dinov2.config import load_defaults
from dinov2.data.eval_transforms import (
    CROP_DRAWS,
    FIRST_BOX,
    CentreCrop,
    Preprocess,
    RandomCrop,
    draw_crops,
    spread_crops,
)
from tests.dinov2.data.test_resample import assert_pillows, canvas_of
from tests.dinov2.data.trees import picture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("resize, crop", [(64, 56), (40, 40)])
def test_centre_crop_is_torchvisions(resize, crop):
    images = [picture(k, h, w) for k, (h, w) in enumerate([(75, 100), (101, 60), (30, 33), (48, 48), (20, 200)])]
    sizes = torch.tensor([image.shape[:2] for image in images])
    out = CentreCrop(resize, crop, MEAN, STD)(canvas_of(images), sizes)
    for image, crop_of_ours in zip(images, out, strict=True):
        width, height = transforms.Resize(resize)(Image.fromarray(image)).size
        # One pass after the other: Pillow 13 may reverse them.
        resized = (
            Image.fromarray(image).resize((width, len(image)), Image.BICUBIC).resize((width, height), Image.BICUBIC)
        )
        expected = TF.to_tensor(TF.center_crop(resized, [crop, crop]))
        restored = crop_of_ours * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        assert_pillows(restored, expected, dense=False)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_pillow_image_is_prepared_as_its_file_is(tmp_path, channels, dtype):
    array = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (20, 24)).astype(dtype)
    Image.fromarray(array).save(tmp_path / "grey.png")
    data = {"in_chans": channels, "mean": [0.5] * channels, "std": [0.2] * channels, "values": "full"}
    prepare = Preprocess(OmegaConf.merge(load_defaults(), {"data": data, "eval": {"resize": 16, "crop": 16}}))
    with Image.open(tmp_path / "grey.png") as image:
        torch.testing.assert_close(prepare(image), prepare(tmp_path / "grey.png"), atol=0, rtol=0)


def test_random_crop_cuts_flips_and_normalises():
    image = picture(0, 60, 80)
    sizes = torch.tensor([(60, 80)] * 400)
    canvas = canvas_of([image]).expand(400, 3, 60, 80)
    transform = RandomCrop(8, (0.0,) * 3, (1.0,) * 3)
    drawn = draw_crops(400, torch.Generator().manual_seed(0))
    out = transform(canvas, sizes, drawn)
    assert out.shape == (400, 3, 8, 8)
    assert torch.equal(transform(canvas[:5], sizes[:5], drawn[100:105]), out[100:105])
    ramp = np.broadcast_to(np.linspace(0, 255, 80, dtype=np.uint8)[None, :, None], (60, 80, 3))
    slopes = transform(canvas_of([ramp]).expand(400, 3, 60, 80), sizes, drawn)
    rising = (slopes[:, 0, 4, -1] > slopes[:, 0, 4, 0]).float().mean()
    assert 0.4 < rising < 0.6, "half of the crops are flipped"


def test_spread_crops_are_even_over_an_images_views_and_uniform_each():
    images, crops = 500, 8
    drawn = spread_crops(images, crops, torch.Generator().manual_seed(0))
    assert drawn.shape == (crops, images, CROP_DRAWS) and drawn.min() >= 0 and drawn.max() < 1
    flipped = (drawn[..., 0] < 0.5).sum(dim=0)
    assert flipped.eq(crops // 2).all(), "exactly half of every image's crops"
    eighths = (drawn[..., FIRST_BOX[1:]] * crops).sort(dim=0).values.diff(dim=0)
    torch.testing.assert_close(eighths, torch.ones_like(eighths))  # a crop in every eighth of each number's range
    # One crop by itself: uniform, and independent between images (Kolmogorov-Smirnov at 0.1 %, lag-1 correlation).
    for numbers in drawn[3].T:
        gaps = numbers.sort().values - torch.arange(images) / images
        assert gaps.abs().max() < 1.95 / images**0.5
        assert torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1].abs() < 0.2
    assert not torch.equal(drawn[0], spread_crops(images, crops, torch.Generator().manual_seed(1))[0])


def test_a_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(ValueError, match="eval.crop=64"):
        CentreCrop(56, 64, MEAN, STD)
