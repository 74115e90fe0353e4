"""Evaluation transforms against torchvision's on Pillow images."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision import transforms

from dinov2.data.eval_transforms import CentreCrop, RandomCrop
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


def test_random_crop_cuts_flips_and_normalises():
    image = picture(0, 60, 80)
    sizes = torch.tensor([(60, 80)] * 400)
    canvas = canvas_of([image]).expand(400, 3, 60, 80)
    transform = RandomCrop(8, (0.0,) * 3, (1.0,) * 3)
    out = transform(canvas, sizes, torch.Generator().manual_seed(0))
    assert out.shape == (400, 3, 8, 8)
    part = transform(canvas[:5], sizes[:5], torch.Generator().manual_seed(0), start=100, total=400)
    assert torch.equal(part, out[100:105])
    ramp = np.broadcast_to(np.linspace(0, 255, 80, dtype=np.uint8)[None, :, None], (60, 80, 3))
    slopes = transform(canvas_of([ramp]).expand(400, 3, 60, 80), sizes, torch.Generator().manual_seed(0))
    rising = (slopes[:, 0, 4, -1] > slopes[:, 0, 4, 0]).float().mean()
    assert 0.4 < rising < 0.6, "half of the crops are flipped"


def test_a_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(ValueError, match="eval.crop=64"):
        CentreCrop(56, 64, MEAN, STD)
