"""What the training reads: noisy images alone, in an order that is a function of the seed and the iteration."""

import numpy as np
import pytest
import torch

from Neighbor2Neighbor.data import Crops, choose_crop, make_loader, read_noisy, training_images
from utils import generate_noise
from utils.images import list_images, read_image, write_image
from utils.noise import ALL_NOISES, NoiseSpec
from utils.sampler import IterationSampler

GAUSS = NoiseSpec.parse("gauss50")


def make_tree(root, shapes=((40, 50), (64, 32), (33, 47)), splits=("train", "val")):
    rng = np.random.default_rng(2)
    for split in splits:
        for i, shape in enumerate(shapes):
            write_image(root / split / f"n{i % 2}" / f"x{i}.png", rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    return root


@pytest.mark.parametrize("name", ALL_NOISES)
def test_noise_added_while_loading_is_that_of_the_tree(tmp_path, name):
    root = make_tree(tmp_path / "set")
    generate_noise.main(["--source", str(root), "--noise", name, "--seed", "5", "--workers", "0"])
    tree, spec = tmp_path / f"noisy_set-{name}", NoiseSpec.parse(name)
    for relative in list_images(root):
        on_disk = read_noisy(tree, relative, NoiseSpec.parse("none"), 0)
        assert np.array_equal(read_noisy(root, relative, spec, 5), on_disk)
        assert not np.array_equal(on_disk, read_image(root / relative))


def test_training_images_are_those_of_the_train_folder(tmp_path):
    root = make_tree(tmp_path / "set")
    assert training_images(root, None, None, 0) == ["train/n0/x0.png", "train/n0/x2.png", "train/n1/x1.png"]
    flat = make_tree(tmp_path / "flat", splits=("jpg",))
    assert len(training_images(flat, None, None, 0)) == 3
    assert training_images(root, None, (33, 50), 0) == ["train/n0/x0.png", "train/n0/x2.png"]
    chosen = {tuple(training_images(root, 2, None, seed)) for seed in range(9)}
    assert len(chosen) == 3 and all(len(names) == 2 for names in chosen)
    assert training_images(root, 2, None, 4) == training_images(root, 2, None, 4)
    with pytest.raises(ValueError, match="3 images for training, fewer than --subset 4"):
        training_images(root, 4, None, 0)
    with pytest.raises(ValueError, match="widen --sides"):
        training_images(root, None, (256, 512), 0)


def test_crop_sizes_suit_the_images_and_the_depth(tmp_path):
    root = make_tree(tmp_path / "set", shapes=((100, 90),) * 3)
    relatives = list_images(root)
    assert [choose_crop(root, relatives, 256, depth) for depth in (1, 3, 4, 5, 6)] == [88, 80, 64, 64, 128]
    assert choose_crop(root, relatives, 64, 4) == 64
    with pytest.raises(ValueError, match="--crop 32 is too small for --depth 5.*--crop 64 or --depth 4"):
        choose_crop(root, relatives, 32, 5)


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (28, 28), (64, 20), (65, 200)])
def test_small_images_are_padded_by_reflection(tmp_path, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    write_image(tmp_path / "x.png", image)
    crop = Crops(tmp_path, ["x.png"], NoiseSpec.parse("none"), 0, 64, 3)[0, 7].numpy().transpose(1, 2, 0)
    assert crop.shape == (64, 64, 3)
    if max(shape) <= 64:
        assert np.array_equal(crop[: shape[0], : shape[1]], image)
        assert np.array_equal(crop, np.pad(image, ((0, 64 - shape[0]), (0, 64 - shape[1]), (0, 0)), "reflect"))


def test_crops_are_parts_of_the_noisy_image_at_all_places(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (18, 19, 3), dtype=np.uint8)
    write_image(tmp_path / "x.png", image)
    noisy = read_noisy(tmp_path, "x.png", GAUSS, 3)
    parts = {noisy[y : y + 16, x : x + 16].tobytes(): (y, x) for y in range(3) for x in range(4)}
    crops = Crops(tmp_path, ["x.png"], GAUSS, 3, 16, 3)
    seen = {parts[crops[0, seed].numpy().transpose(1, 2, 0).tobytes()] for seed in range(200)}
    assert len(seen) == 12


def items(start: int, stop: int, seed: int = 1, rank: int = 0, world: int = 1) -> list[list[tuple[int, int]]]:
    """What the loader asks of ten images in batches of four: (index, seed of the crop)."""
    order = IterationSampler(10, 4, seed, rank, world, start, stop, option="--batch-size ")
    return list(make_loader(range(10), order, 0, False).batch_sampler)


def test_crops_are_a_function_of_the_iteration_and_shared_by_ranks():
    whole = items(0, 10)
    assert items(3, 10) == whole[3:]
    halves = [items(0, 10, rank=rank, world=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    flat = [item for batch in whole for item in batch]
    for epoch in range(4):
        assert sorted(index for index, _ in flat[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert len({seed for _, seed in flat}) == 40
    assert whole != items(0, 10, seed=2)
    with pytest.raises(ValueError, match="--batch-size 4 is not a multiple of the 3 ranks"):
        items(0, 10, world=3)


def test_batches_are_the_same_for_any_number_of_workers(tmp_path):
    root = make_tree(tmp_path / "set")
    crops = Crops(root, list_images(root), GAUSS, 0, 32, 3)
    runs = [
        list(make_loader(crops, IterationSampler(6, 2, start_iteration=1, stop_iteration=5), workers, False))
        for workers in (0, 2)
    ]
    assert len(runs[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_unreadable_image_is_named(tmp_path):
    root = make_tree(tmp_path / "set")
    (root / "train/n0/bad.png").write_bytes(b"\x89PNG")
    crops = Crops(root, ["train/n0/bad.png", "train/n0/x0.png"], GAUSS, 0, 32, 3)
    (message,) = make_loader(crops, IterationSampler(2, 2, stop_iteration=1), 0, False)
    assert "bad.png" in message
