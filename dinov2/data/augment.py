"""DINOv2's augmentation in two steps: sample the random parameters of a batch, then apply them to one view or more.

    augment = Augment(cfg.crops, cfg.data.mean, cfg.data.std)
    parameters = augment.sample(sizes, generator)
    crops = augment.apply_global(canvas, sizes, parameters)          # [2 * B, C, S, S]
    anchored = augment.apply_global(other_view, sizes, parameters)   # the same boxes and colours

Crop, flip -> colour jitter -> grey -> blur -> solarise -> normalise, as in the public DINOv2; probabilities and
strengths come from the config. Blur has the probabilities that DINOv2 really runs with (it inverts those it names).
Images that are not RGB only take brightness, contrast, blur and solarise.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import islice

import torch
from torch import Tensor

from dinov2.data import colour
from dinov2.data.resample import ATTEMPTS, cut, random_boxes
from utils.fused import fused
from utils.memory import keep_freed_memory

CPU_PIXELS = 800_000  # of a part's crops; a CPU takes the batch in parts that stay in its cache: 8 images at 2 x 224 px


@dataclass(frozen=True)
class CropParameters:
    """Parameters of n crops of each of B images, drawn on the CPU."""

    boxes: Tensor  # int64 [n, B, 4] top, left, height, width in pixels
    flip: Tensor  # bool [n, B]
    order: Tensor  # int64 [n, B, 4] operation of the jitter at each position
    factors: Tensor  # float32 [n, B, 4] brightness, contrast, saturation, hue; neutral where no jitter is drawn
    grey: Tensor  # bool [n, B]
    blur: Tensor  # bool [n, B]
    sigma: Tensor  # float32 [n, B] pixels
    solarize: Tensor  # bool [n, B]

    def slice(self, start: int, stop: int) -> "CropParameters":
        """Those of images start to stop."""
        return CropParameters(*(tensor[:, start:stop] for tensor in self.tensors()))

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


@dataclass(frozen=True)
class AugmentParameters:
    """Parameters of all crops of a batch."""

    global_crops: CropParameters
    local_crops: CropParameters

    def slice(self, start: int, stop: int) -> "AugmentParameters":
        """Those of images start to stop of the batch."""
        return AugmentParameters(self.global_crops.slice(start, stop), self.local_crops.slice(start, stop))

    def tensors(self) -> list[Tensor]:
        """All tensors in a list, from which `of` restores the parameters."""
        return self.global_crops.tensors() + self.local_crops.tensors()

    @classmethod
    def of(cls, tensors: Iterator[Tensor]) -> "AugmentParameters":
        """The parameters made of the next tensors."""
        number = len(fields(CropParameters))
        return cls(*(CropParameters(*islice(tensors, number)) for _ in range(2)))


class Augment:
    """The augmentation of a config's `crops` section, for images with `len(mean)` channels."""

    def __init__(self, crops, mean, std):
        if len(mean) != len(std):
            raise ValueError(f"data.mean has {len(mean)} values and data.std {len(std)}: give one per channel to each.")
        if crops.blur.kernel % 2 == 0 or crops.blur.kernel // 2 >= min(crops.global_size, crops.local_size):
            raise ValueError(f"crops.blur.kernel={crops.blur.kernel}: give an odd number below twice the crop size.")
        keep_freed_memory()
        self.crops = crops
        self.normalize = Normalize(mean, std)

    def sample(self, sizes: Tensor, generator: torch.Generator, start: int = 0, total: int | None = None):
        """Draw AugmentParameters for the images of sizes int [B, 2] (height, width); generator on the CPU.

        If the B images are those from `start` on of a batch of `total` (other ranks or micro-batches hold the rest),
        numbers are drawn for all `total` and B of them kept, so that an image gets the same crops however the batch is
        split.
        """
        crops, total = self.crops, len(sizes) if total is None else total
        assert 0 <= start and start + len(sizes) <= total, "the images must lie within the whole batch"
        sizes = sizes.cpu()
        # Two global crops, which differ in blur and solarise, then the local ones.
        blur = [crops.blur.global1, crops.blur.global2]
        solarize = [0.0, crops.solarize.probability]
        drawn = _uniforms(2, total, generator)[:, start : start + len(sizes)]
        global_crops = self._crop_parameters(drawn, sizes, crops.global_scale, blur, solarize)
        n = crops.local_number
        drawn = _uniforms(n, total, generator)[:, start : start + len(sizes)]
        local_crops = self._crop_parameters(drawn, sizes, crops.local_scale, [crops.blur.local] * n, [0.0] * n)
        return AugmentParameters(global_crops, local_crops)

    def apply_global(self, canvas: Tensor, sizes: Tensor, parameters: AugmentParameters) -> Tensor:
        """The two global crops: float32 [2 * B, C, S, S], normalised, crop-major (all first crops, then all second).

        canvas: uint8 or float32 [B, C, H, W] on the device that computes; sizes: int [B, 2] of the images in it.
        """
        return self._apply(canvas, sizes, parameters.global_crops, self.crops.global_size)

    def apply_local(self, canvas: Tensor, sizes: Tensor, parameters: AugmentParameters) -> Tensor:
        """The local crops: float32 [local_number * B, C, s, s], normalised, crop-major."""
        return self._apply(canvas, sizes, parameters.local_crops, self.crops.local_size)

    def _crop_parameters(self, drawn, sizes, scale, blur, solarize):
        """CropParameters from uniform numbers drawn [n, B, DRAWS]; blur and solarize: a probability per crop."""
        crops, n_box = self.crops, 2 * ATTEMPTS + 2
        flip, jittered, grey, blurred, sigma, solarized = drawn[..., n_box : n_box + 6].unbind(-1)
        strength = torch.tensor([crops.jitter[name] for name in ("brightness", "contrast", "saturation", "hue")])
        centre = torch.tensor([1.0, 1.0, 1.0, 0.0])
        low = torch.where(centre == 1, (centre - strength).clamp(min=0), -strength)
        factors = torch.lerp(low, centre + strength, drawn[..., n_box + 6 : n_box + 10].float())
        jittered = (jittered < crops.jitter.probability).unsqueeze(-1)
        sigma_low, sigma_high = crops.blur.sigma
        return CropParameters(
            boxes=random_boxes(drawn[..., :n_box], sizes, scale),
            flip=flip < crops.flip,
            order=drawn[..., n_box + 10 :].argsort(-1),  # sorting uniform numbers gives each order equally often
            factors=torch.where(jittered, factors, centre),
            grey=grey < crops.grey,
            blur=blurred < torch.tensor(blur).unsqueeze(1),
            sigma=(sigma_low + (sigma_high - sigma_low) * sigma).float(),
            solarize=solarized < torch.tensor(solarize).unsqueeze(1),
        )

    def _apply(self, canvas, sizes, parameters, size):
        n, batch = parameters.boxes.shape[:2]
        assert batch == len(canvas) == len(sizes), "parameters, canvas and sizes must be of one batch"
        if n == 0:  # no local crops
            return torch.empty(0, canvas.shape[1], size, size, device=canvas.device)
        if canvas.device.type != "cpu":
            drawn = [tensor.to(canvas.device, non_blocking=True) for tensor in parameters.tensors()]
            kernel, threshold = self.crops.blur.kernel, self.crops.solarize.threshold / 255
            return _crops_without_choices(canvas, drawn, size, kernel, threshold, *self.normalize.on(canvas))
        ends = parameters.boxes[..., :2] + parameters.boxes[..., 2:]
        assert bool((ends <= sizes).all()), "parameters drawn for other image sizes"
        out = torch.empty(n, batch, canvas.shape[1], size, size)
        images = max(1, CPU_PIXELS // (n * size**2))
        for start in range(0, batch, images):
            part = slice(start, start + images)
            drawn = parameters.slice(start, start + images)
            out[:, part] = self._crops(canvas[part], drawn, size).unflatten(0, (n, -1))
        return out.flatten(0, 1)

    def _crops(self, canvas, parameters, size):
        """On a CPU: each operation runs only on the images that it was drawn for."""
        images = cut(canvas, parameters.boxes, size, parameters.flip)  # [n * B, C, size, size] in [0, 1]
        images = colour.jitter(images, parameters.order.flatten(0, 1), parameters.factors.flatten(0, 1))
        if images.shape[1] == 3:
            colour.on_chosen(images, parameters.grey.flatten(), colour.grey)
        kernel, threshold = self.crops.blur.kernel, self.crops.solarize.threshold / 255
        sigma = parameters.sigma.flatten()
        colour.on_chosen(images, parameters.blur.flatten(), lambda x, s: colour.gaussian_blur(x, s, kernel), sigma)
        colour.on_chosen(images, parameters.solarize.flatten(), lambda x: colour.solarize(x, threshold))
        return self.normalize(images)


@fused
def _crops_without_choices(canvas, drawn, size, kernel, threshold, scale, shift):
    """On a GPU: the same on all images at once, so that the host need not know which images an operation has; the
    compiler fuses it into few kernels. drawn: tensors of CropParameters, on the canvas's device."""
    boxes, flip, order, factors, grey, blur, sigma, solarize = drawn
    images = cut(canvas, boxes, size, flip)
    images = colour.jitter_without_choices(images, order.flatten(0, 1), factors.flatten(0, 1))
    grey, blur, solarize = (chosen.flatten().view(-1, 1, 1, 1) for chosen in (grey, blur, solarize))
    if images.shape[1] == 3:
        images = torch.where(grey, colour.grey(images), images)
    images = torch.where(blur, colour.gaussian_blur(images, sigma.flatten(), kernel), images)
    images = torch.where(solarize, colour.solarize(images, threshold), images)
    return torch.addcmul(shift, images, scale)


class Normalize:
    """(images - mean) / std for each channel, in place; images float [B, C, S, S] in [0, 1]."""

    def __init__(self, mean, std):
        self.scale = 1 / torch.tensor(list(std), dtype=torch.float32).view(1, -1, 1, 1)
        self.shift = -torch.tensor(list(mean), dtype=torch.float32).view(1, -1, 1, 1) * self.scale

    def __call__(self, images: Tensor) -> Tensor:
        scale, shift = self.on(images)
        return images.mul_(scale).add_(shift)

    def on(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift on the device of these images, copied there once."""
        if images.shape[1] != self.scale.shape[1]:
            raise ValueError(
                f"Images of {images.shape[1]} channels, but data.mean and data.std are for "
                f"{self.scale.shape[1]}: set data.in_chans, data.mean and data.std alike."
            )
        self.scale, self.shift = (value.to(images.device, non_blocking=True) for value in (self.scale, self.shift))
        return self.scale, self.shift


def _uniforms(n, total, generator):
    """Uniform numbers for n crops of `total` images: box, six single draws, four factors, four for the order."""
    return torch.rand(n, total, 2 * ATTEMPTS + 2 + 6 + 4 + 4, generator=generator, dtype=torch.float64)
