"""Batches: padding, order, workers, resident sets, errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data.dataset import ImageDataset, Mix
from dinov2.data.loader import ImageBatch, ResidentImages, make_eval_loader, make_loader
from tests.dinov2.data.trees import make_tree, write_twins
from utils.images import ImageError
from utils.noise import NoiseSpec
from utils.sampler import IterationSampler

GAUSS = NoiseSpec.parse("gauss100")


@pytest.fixture
def dataset(tmp_path):
    root = make_tree(tmp_path / "data", classes=("ant", "bee", "cow"), count=4)
    write_twins(root, tmp_path / "noisy_data-gauss100-denoised", lambda image, _: 255 - image)
    mix = Mix(start=1.0, end=0.0, iterations=6, seed=0)
    return ImageDataset(root, "train", ("noisy", "mix"), GAUSS, mix=mix)


def assert_equal(first: ImageBatch, second: ImageBatch, padding_too=True):
    assert first.iteration == second.iteration and len(first.canvases) == len(second.canvases)
    for name in ("sizes", "labels", "indices"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    for one, other in zip(first.canvases, second.canvases, strict=True):
        assert one.dtype == other.dtype
        if padding_too:
            assert torch.equal(one, other)
        for k, (h, w) in enumerate(first.sizes.tolist()):
            assert torch.equal(one[k, :, :h, :w], other[k, :, :h, :w])
            assert not one[k, :, h:].any() and not one[k, :, :, w:].any()
            assert not other[k, :, h:].any() and not other[k, :, :, w:].any()


def test_batches_hold_the_images_of_the_sampler(dataset):
    batches = list(make_loader(dataset, 5, seed=2, stop_iteration=6))
    for batch, (iteration, indices) in zip(batches, IterationSampler(12, 5, seed=2, stop_iteration=6), strict=True):
        assert batch.iteration == iteration and batch.indices.tolist() == indices
        assert batch.labels.tolist() == [index // 4 for index in indices]
        assert all(canvas.dtype == torch.uint8 and canvas.shape[:2] == (5, 3) for canvas in batch.canvases)
        for k, index in enumerate(indices):
            images = dataset.read(index, dataset.choose(index, iteration))
            height, width = batch.sizes[k].tolist()
            for canvas, image in zip(batch.canvases, images, strict=True):
                assert image.shape == (height, width, 3)
                assert np.array_equal(canvas[k, :, :height, :width].permute(1, 2, 0).numpy(), image)
    mixed = torch.cat([(batch.canvases[0] != batch.canvases[1]).flatten(1).any(1) for batch in batches[1:-1]])
    assert mixed.any() and not mixed.all(), "the mix takes denoised images for some, noisy for others"


def test_workers_and_resuming_change_nothing(dataset):
    state = torch.random.get_rng_state()
    alone = list(make_loader(dataset, 4, stop_iteration=7))
    for first, second in zip(alone, make_loader(dataset, 4, stop_iteration=7, workers=2), strict=True):
        assert_equal(first, second)
    for first, second in zip(alone[3:], make_loader(dataset, 4, start_iteration=3, stop_iteration=7), strict=True):
        assert_equal(first, second)
    ranks = [list(make_loader(dataset, 4, stop_iteration=7, rank=rank, world_size=2)) for rank in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
    assert torch.equal(torch.random.get_rng_state(), state), "loading must not draw from the training's random stream"


def test_a_resident_set_serves_the_same_batches(dataset):
    resident = ResidentImages(dataset)
    assert set(resident.canvases) == {"noisy", "denoised"}
    served = make_loader(dataset, 5, seed=1, stop_iteration=8, resident=resident)
    for first, second in zip(make_loader(dataset, 5, seed=1, stop_iteration=8), served, strict=True):
        assert_equal(first, second, padding_too=False)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_one_ordered_pass_over_the_images(dataset, world_size):
    seen = []
    for rank in range(world_size):
        batches = list(make_eval_loader(dataset, 5, rank, world_size))
        sizes = [len(batch.indices) for batch in batches]
        assert all(size == 5 for size in sizes[:-1]) and 1 <= sizes[-1] <= 5
        indices = torch.cat([batch.indices for batch in batches]).tolist()
        assert indices == list(range(rank, 12, world_size))
        seen += indices
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_short_error(dataset, workers):
    (dataset.root / "train" / "bee" / "2.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ImageError) as caught:
        list(make_eval_loader(dataset, 4, workers=workers))
    message = str(caught.value)
    assert "train/bee/2.png" in message and "\n" not in message and len(message) < 300
    assert caught.value.__cause__ is None
    with pytest.raises(ImageError, match="bee/2.png"):
        ResidentImages(dataset, workers)


def test_images_above_8_bits_make_float_canvases(tmp_path):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    Image.fromarray(np.full((10, 12), 30001, np.uint16)).save(folder / "a.png")
    Image.fromarray(np.full((14, 8), 51, np.uint8)).save(folder / "b.png")
    Image.fromarray(np.full((4, 4), 51, np.uint8)).save(folder / "c.png")
    dataset = ImageDataset(tmp_path / "data", "train", ("clean",))
    mixed, eight_bit = make_eval_loader(dataset, 2)
    assert mixed.canvases[0].dtype == torch.float32 and mixed.canvases[0].shape == (2, 3, 14, 12)
    assert mixed.sizes.tolist() == [[10, 12], [14, 8]] and mixed.labels.tolist() == [-1, -1]
    torch.testing.assert_close(mixed.canvases[0][0, 0, 9, 11].item(), 30001 / 65535)
    torch.testing.assert_close(mixed.canvases[0][1, 0, 13, 7].item(), 0.2)
    assert eight_bit.canvases[0].dtype == torch.uint8
    resident = ResidentImages(dataset).batch(0, [2, 0]).canvases[0]
    assert resident.dtype == torch.float32 and resident.shape == (2, 3, 14, 12)
    torch.testing.assert_close(resident[0, 0, 3, 3].item(), 0.2)
