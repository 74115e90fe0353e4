"""The augmentation as a whole: against torchvision's functions in a row, over splits of a batch, and over two views."""

import pytest
import torch
import torchvision.transforms.functional as TF
import torchvision.transforms.v2.functional as TF2
from omegaconf import OmegaConf

from dinov2.data import augment as module
from dinov2.data.augment import Augment, CropParameters
from dinov2.data.resample import cut
from tests.dinov2.data.test_resample import assert_pillows, canvas_of, pillow
from tests.dinov2.data.trees import picture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def crops_config(**changes):
    config = {
        "global_size": 32,
        "global_scale": [0.32, 1.0],
        "local_size": 16,
        "local_number": 3,
        "local_scale": [0.05, 0.32],
        "flip": 0.5,
        "jitter": {"probability": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
        "grey": 0.2,
        "blur": {"global1": 0.0, "global2": 0.9, "local": 0.5, "kernel": 9, "sigma": [0.1, 2.0]},
        "solarize": {"probability": 0.2, "threshold": 128},
    }
    return OmegaConf.create(config | changes)


def batch(n=6):
    images = [picture(k, 50 + 3 * k, 70 - 2 * k) for k in range(n)]
    return canvas_of(images), torch.tensor([image.shape[:2] for image in images]), images


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def reference(image, parameters, k, b):
    """One crop through torchvision's functions, from the crop image in [0, 1]."""
    operations = (TF2.adjust_brightness, TF2.adjust_contrast, TF2.adjust_saturation, TF2.adjust_hue)
    for operation in parameters.order[k, b].tolist():
        image = operations[operation](image, float(parameters.factors[k, b, operation]))
    if parameters.grey[k, b]:
        image = TF2.rgb_to_grayscale(image, 3)
    if parameters.blur[k, b]:
        image = TF.gaussian_blur(image, [9, 9], [float(parameters.sigma[k, b])] * 2)
    if parameters.solarize[k, b]:
        image = TF2.solarize(image, 128 / 255)
    return TF.normalize(image, MEAN, STD)


def test_crops_are_those_of_torchvisions_functions():
    augment = Augment(crops_config(), MEAN, STD)
    canvas, sizes, images = batch(20)  # more than a CPU takes at once
    before = canvas.clone()
    parameters = augment.sample(sizes, generator())
    for apply, part, n, size in (
        (augment.apply_global, parameters.global_crops, 2, 32),
        (augment.apply_local, parameters.local_crops, 3, 16),
    ):
        out = apply(canvas, sizes, parameters)
        assert out.shape == (n * 20, 3, size, size) and out.dtype == torch.float32
        cuts = cut(canvas, part.boxes, size, part.flip)
        for k in range(n):
            for b in range(20):
                place = k * 20 + b  # crop-major
                expected = reference(cuts[place], part, k, b)
                # Solarising jumps at its threshold, so a rounding error there may invert a value.
                far = ((out[place] - expected).abs() > 1e-4).float().mean()
                assert far <= (0.002 if part.solarize[k, b] else 0), (k, b)
                box = pillow(images[b], part.boxes[k, b].tolist(), size, part.flip[k, b])
                assert_pillows(cuts[place], box, dense=False)
    assert torch.equal(canvas, before), "the canvas is shared by all crops"


def test_equal_pixels_give_equal_crops_in_every_view():
    augment = Augment(crops_config(), MEAN, STD)
    canvas, sizes, _ = batch()
    other = canvas.clone()
    other[3:] = 255 - other[3:]
    parameters = augment.sample(sizes, generator())
    first, second = (augment.apply_global(view, sizes, parameters).unflatten(0, (2, 6)) for view in (canvas, other))
    assert torch.equal(first[:, :3], second[:, :3])
    assert (first[:, 3:] - second[:, 3:]).abs().amax((2, 3, 4)).min() > 0.1


def test_padding_does_not_show():
    augment = Augment(crops_config(), MEAN, STD)
    canvas, sizes, _ = batch()
    padded = torch.full((6, 3, 128, 200), 77, dtype=torch.uint8)
    for k, (h, w) in enumerate(sizes.tolist()):
        padded[k, :, :h, :w] = canvas[k, :, :h, :w]
    parameters = augment.sample(sizes, generator())
    for apply in (augment.apply_global, augment.apply_local):
        assert torch.equal(apply(canvas, sizes, parameters), apply(padded, sizes, parameters))


def test_a_split_batch_gets_the_crops_of_the_whole():
    augment = Augment(crops_config(), MEAN, STD)
    canvas, sizes, _ = batch()
    whole = augment.sample(sizes, generator(5))
    crops = augment.apply_local(canvas, sizes, whole).unflatten(0, (3, 6))
    for start, stop in ((0, 2), (2, 6), (5, 6)):
        part = augment.sample(sizes[start:stop], generator(5), start, 6)
        sliced = whole.slice(start, stop)
        for name in CropParameters.__dataclass_fields__:
            assert torch.equal(getattr(part.global_crops, name), getattr(sliced.global_crops, name)), name
        split = augment.apply_local(canvas[start:stop], sizes[start:stop], part).unflatten(0, (3, stop - start))
        torch.testing.assert_close(split, crops[:, start:stop], atol=1e-6, rtol=0)


def test_two_steps_draw_differently():
    augment = Augment(crops_config(), MEAN, STD)
    sizes = torch.tensor([(60, 80)] * 4)
    stream = generator()
    first, second = augment.sample(sizes, stream), augment.sample(sizes, stream)
    assert not torch.equal(first.global_crops.boxes, second.global_crops.boxes)
    again = augment.sample(sizes, generator())
    assert torch.equal(first.local_crops.factors, again.local_crops.factors)


def share(drawn, probability):
    n = drawn.numel()
    assert abs(drawn.float().mean().item() - probability) <= 4.5 * (probability * (1 - probability) / n) ** 0.5


def test_probabilities_and_ranges_are_those_of_the_config():
    augment = Augment(crops_config(), MEAN, STD)
    n = 6000
    parameters = augment.sample(torch.tensor([(90, 120)] * n), generator(1))
    first_blur, second_blur = parameters.global_crops.blur
    share(first_blur, 0.0)
    share(second_blur, 0.9)
    share(parameters.local_crops.blur, 0.5)
    share(parameters.global_crops.solarize[0], 0.0)
    share(parameters.global_crops.solarize[1], 0.2)
    share(parameters.local_crops.solarize, 0.0)
    for part, scale in ((parameters.global_crops, (0.32, 1.0)), (parameters.local_crops, (0.05, 0.32))):
        share(part.flip, 0.5)
        share(part.grey, 0.2)
        drawn = part.factors[..., 3] != 0
        share(drawn, 0.8)
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
        assert (part.factors[~drawn] == neutral).all(), "jitter is drawn for all four operations or none"
        reach = (part.factors[drawn] - neutral).abs().amax(0)
        torch.testing.assert_close(reach, torch.tensor([0.4, 0.4, 0.2, 0.1]), rtol=0.01, atol=0)
        assert part.sigma.min() >= 0.1 and part.sigma.max() <= 2.0 and abs(part.sigma.mean() - 1.05) < 0.03
        codes = (part.order * torch.tensor([64, 16, 4, 1])).sum(-1).flatten()
        values, counts = codes.unique(return_counts=True)
        assert len(values) == 24 and counts.min() > 0.8 * len(codes) / 24, "all orders, equally often"
        areas = (part.boxes[..., 2] * part.boxes[..., 3]) / (90 * 120)
        assert scale[0] - 0.01 < areas.min() and areas.max() < scale[1] + 0.01
    assert not torch.equal(parameters.global_crops.boxes[0], parameters.global_crops.boxes[1])


def test_strengths_of_zero_switch_operations_off():
    jitter = {"probability": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    config = crops_config(jitter=jitter, grey=0.0, solarize={"probability": 0.0, "threshold": 128})
    config.blur.local = 0.0
    augment = Augment(config, MEAN, STD)
    canvas, sizes, _ = batch()
    parameters = augment.sample(sizes, generator())
    plain = cut(canvas, parameters.local_crops.boxes, 16, parameters.local_crops.flip)
    torch.testing.assert_close(
        augment.apply_local(canvas, sizes, parameters), TF.normalize(plain, MEAN, STD), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_with_other_numbers_of_channels(channels):
    augment = Augment(crops_config(), [0.5] * channels, [0.25] * channels)
    canvas = torch.rand(4, channels, 40, 50, generator=generator())
    sizes = torch.tensor([(40, 50)] * 4)
    out = augment.apply_global(canvas, sizes, augment.sample(sizes, generator()))
    assert out.shape == (8, channels, 32, 32) and out.isfinite().all()
    assert out.min() >= -2 - 1e-5 and out.max() <= 2 + 1e-5
    with pytest.raises(ValueError, match="data.in_chans"):
        Augment(crops_config(), MEAN, STD).apply_global(canvas, sizes, augment.sample(sizes, generator()))


def test_one_pixel_images():
    augment = Augment(crops_config(), MEAN, STD)
    canvas, sizes = torch.full((2, 3, 1, 1), 100, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.long)
    out = augment.apply_local(canvas, sizes, augment.sample(sizes, generator()))
    assert out.shape == (6, 3, 16, 16) and out.flatten(2).std(-1).max() < 1e-5


def test_the_size_of_the_parts_on_a_cpu_does_not_show(monkeypatch):
    augment = Augment(crops_config(), MEAN, STD)
    canvas, sizes, _ = batch(11)
    parameters = augment.sample(sizes, generator())
    whole = augment.apply_global(canvas, sizes, parameters)
    monkeypatch.setattr(module, "CPU_PIXELS", 3 * 2 * augment.crops.global_size**2)  # 3 images
    torch.testing.assert_close(augment.apply_global(canvas, sizes, parameters), whole, atol=1e-6, rtol=0)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="data.mean"):
        Augment(crops_config(), MEAN, STD[:2])
    with pytest.raises(ValueError, match="crops.blur.kernel"):
        Augment(crops_config(blur={"global1": 0, "global2": 0, "local": 0, "kernel": 8, "sigma": [1, 2]}), MEAN, STD)
