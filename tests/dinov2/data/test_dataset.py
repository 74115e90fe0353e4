"""Views of an image: the noise of the tree on disk, denoised twins, mixes, sizes, files of every kind."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from dinov2.data.dataset import ImageDataset, Mix, dataset_from_config
from tests.dinov2.data.trees import make_tree, picture, write_twins
from utils.images import ImageError
from utils.noise import NoiseSpec, keyed_noise, noise_key

GAUSS = NoiseSpec.parse("gauss255")


def noisy_tree(root, target, seed=0):
    write_twins(root, target, lambda image, relative: keyed_noise(image, GAUSS, seed, noise_key(relative)))


@pytest.fixture
def data(tmp_path):
    """A tree with its noisy and denoised twins beside it."""
    root = make_tree(tmp_path / "data", suffix=".jpg")
    noisy_tree(root, tmp_path / "noisy_data-gauss255")
    write_twins(root, tmp_path / "noisy_data-gauss255-denoised", lambda image, _: 255 - image)
    return root


def test_noise_added_while_loading_has_the_bytes_of_the_noisy_tree(data):
    loaded = ImageDataset(data, "train", ("noisy",), GAUSS)
    stored = ImageDataset(data, "train", ("noisy",), GAUSS, storage="disk")
    clean = ImageDataset(data, "train", ("clean",), GAUSS)
    assert len(loaded) == len(stored) == 6
    for k in range(len(loaded)):
        (first,), label = loaded[k]
        (second,), other_label = stored[k]
        assert np.array_equal(first, second) and label == other_label == k // 3
        assert (first != clean[k][0][0]).mean() > 0.5
    assert np.array_equal(loaded[2][0][0], loaded[2][0][0]), "one fixed realisation"
    reseeded = ImageDataset(data, "train", ("noisy",), GAUSS, noise_seed=1)
    assert not np.array_equal(loaded[0][0][0], reseeded[0][0][0])
    assert not np.array_equal(loaded[0][0][0][:20], ImageDataset(data, "val", ("noisy",), GAUSS)[0][0][0][:20])


def test_views_of_one_image(data):
    dataset = ImageDataset(data, "train", ("noisy", "denoised", "clean"), GAUSS)
    (noisy, denoised, clean), _ = dataset[4]
    assert np.array_equal(clean, np.asarray(Image.open(data / "train" / "bee" / "1.jpg").convert("RGB")))
    assert np.array_equal(denoised, 255 - clean)
    assert np.array_equal(noisy, keyed_noise(clean, GAUSS, 0, "train/bee/1"))


def test_the_sizes_of_files_are_asked_for_once(data, monkeypatch):
    dataset = ImageDataset(data, "train", ("denoised",), GAUSS)
    first = dataset.digest(), dataset.digest("denoised")
    with monkeypatch.context() as patched:
        patched.setattr("dinov2.data.dataset.describe_files", None)
        assert (dataset.digest(), dataset.digest("denoised")) == first and first[0] != first[1]
    assert dataset.keep([0]).digest().startswith("1 images ")


def test_noise_none_is_the_image_itself(data):
    dataset = ImageDataset(data, "train", ("noisy", "clean"), storage="disk")
    noisy, clean = dataset[0][0]
    assert np.array_equal(noisy, clean)


def test_missing_twins_are_counted_and_named_before_training(data, tmp_path):
    tree = tmp_path / "noisy_data-gauss255-denoised" / "train"
    (tree / "ant" / "1.png").unlink()
    (tree / "bee" / "0.png").unlink()
    with pytest.raises(ValueError, match="lacks 2 of 6 denoised images.*train/ant/1.jpg, train/bee/0.jpg.*denoise"):
        ImageDataset(data, "train", ("denoised",), GAUSS)
    ImageDataset(data, "val", ("denoised",), GAUSS)
    with pytest.raises(ValueError, match="lacks 6 of 6 noisy images.*generate_noise"):
        ImageDataset(data, "train", ("noisy",), GAUSS, storage="disk", noisy=tmp_path / "nowhere")


@pytest.mark.parametrize("key, value", [("noise", "gauss50"), ("noise_seed", 7), ("kind", "noisy")])
def test_twins_made_otherwise_are_refused(data, tmp_path, key, value):
    tree = tmp_path / "noisy_data-gauss255-denoised"
    made = {"kind": "denoised", "noise": "gauss255", "noise_seed": 0, "format": "png"}
    (tree / "manifest.json").write_text(json.dumps(made))
    ImageDataset(data, "train", ("denoised",), GAUSS)
    (tree / "manifest.json").write_text(json.dumps(made | {key: value}))
    with pytest.raises(ValueError, match=f"{key} {value}"):
        ImageDataset(data, "train", ("denoised",), GAUSS)


def test_twins_of_another_format(data, tmp_path):
    tree = tmp_path / "noisy_data-gauss255-denoised"
    for path in list(tree.rglob("*.png")):
        Image.open(path).save(path.with_suffix(".webp"), lossless=True)
        path.unlink()
    (tree / "manifest.json").write_text(json.dumps({"format": "webp"}))
    denoised, clean = ImageDataset(data, "train", ("denoised", "clean"), GAUSS)[0][0]
    assert np.array_equal(denoised, 255 - clean)


def test_views_of_different_sizes_name_the_file(data, tmp_path):
    Image.fromarray(picture(0, 9, 9)).save(tmp_path / "noisy_data-gauss255-denoised" / "train" / "ant" / "0.png")
    dataset = ImageDataset(data, "train", ("noisy", "denoised"), GAUSS)
    dataset[1]
    with pytest.raises(ValueError, match="train/ant/0.jpg.*denoised 9 x 9"):
        dataset[0]


def test_mix_moves_from_denoised_to_noisy(data):
    mix = Mix(start=1.0, end=0.0, iterations=100, seed=3)
    dataset = ImageDataset(data, "train", ("mix",), GAUSS, mix=mix)
    assert dataset.kinds == ("noisy", "denoised")
    share = [
        np.mean([mix.kind(iteration, k) == "denoised" for k in range(2000)]) for iteration in (0, 25, 75, 100, 200)
    ]
    np.testing.assert_allclose(share, [1.0, 0.75, 0.25, 0.0, 0.0], atol=0.04)
    half = [mix.kind(50, k) for k in range(200)]
    assert half == [mix.kind(50, k) for k in range(200)] != [mix.kind(51, k) for k in range(200)]
    assert half != [Mix(1.0, 0.0, 100, seed=4).kind(50, k) for k in range(200)]
    assert dataset.choose(0, 0) == ["denoised"] and dataset.choose(0, 100) == ["noisy"]
    (clean,), _ = ImageDataset(data, "train", ("clean",), GAUSS)[0]
    assert np.array_equal(dataset[0][0][0], 255 - clean)


def test_large_images_are_reduced_after_the_noise(data, tmp_path):
    whole = ImageDataset(data, "train", ("noisy", "denoised"), GAUSS)[1][0]
    noisy, denoised = ImageDataset(data, "train", ("noisy", "denoised"), GAUSS, max_side=16)[1][0]
    assert whole[0].shape == (26, 32, 3) and noisy.shape == denoised.shape == (13, 16, 3)
    expected = Image.fromarray(whole[0]).resize((16, 26), Image.BICUBIC).resize((16, 13), Image.BICUBIC)
    assert np.abs(noisy.astype(int) - np.asarray(expected)).max() <= 2
    assert ImageDataset(data, "train", ("clean",), max_side=32)[1][0][0].shape == (26, 32, 3)
    deep = tmp_path / "deep" / "train"
    deep.mkdir(parents=True)
    Image.fromarray((np.eye(40) * 65535).astype(np.uint16)).save(deep / "eye.png")
    image = ImageDataset(tmp_path / "deep", "train", ("clean",), max_side=20)[0][0][0]
    assert image.shape == (20, 20, 3) and image.dtype == np.float32 and 0 <= image.min() and image.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_16_bits_keep_them(tmp_path, channels):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    values = np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) + 30000
    Image.fromarray(values).save(folder / "deep.png")
    clean, noisy = ImageDataset(tmp_path / "data", "train", ("clean", "noisy"), GAUSS, channels=channels)[0][0]
    assert clean.shape == (20, 30, channels) and clean.dtype == noisy.dtype == np.float32
    np.testing.assert_allclose(clean[..., 0], values / 65535, atol=1e-7)
    assert len(np.unique(clean)) == 600, "an 8-bit round trip would leave three values"
    assert noisy.min() >= 0 and noisy.max() <= 1 and np.abs(noisy - clean).mean() > 0.1


def test_images_of_every_kind_become_rgb(tmp_path):
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    image = Image.fromarray(picture(0, 20, 30))
    image.convert("L").save(folder / "grey.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(picture(1, 1, 1)).save(folder / "one.png")
    dataset = ImageDataset(tmp_path / "data", "train", ("noisy",), GAUSS)
    shapes = {path.split("/")[1]: dataset[k][0][0].shape for k, path in enumerate(dataset.relatives)}
    assert shapes.pop("one.png") == (1, 1, 3)
    assert set(shapes.values()) == {(20, 30, 3)} and len(shapes) == 4
    assert all(dataset[k][0][0].dtype == np.uint8 for k in range(5))


def test_unreadable_images_are_named_when_read(data):
    path = data / "train" / "ant" / "0.jpg"
    path.write_bytes(path.read_bytes()[:200])
    (data / "train" / "ant" / "1.jpg").write_bytes(b"")
    (data / "train" / "ant" / "2.jpg").write_text("no image")
    dataset = ImageDataset(data, "train", ("clean",))
    for k in range(3):
        with pytest.raises(ImageError, match=f"train/ant/{k}.jpg"):
            dataset[k]
    dataset[3]


def config(root, **changes):
    data = {
        "root": str(root), "storage": "on_the_fly", "noisy_root": None, "denoised_root": None, "noise_seed": 0,
        "in_chans": 3, "max_side": 1024, "max_pixels": 10_000, "index_cache": None, "values": "auto",
        "val": None, "group": None, "labels": None, "split_seed": 0, "stack": "refuse", "mixed": "refuse",
    }  # fmt: skip
    return OmegaConf.create({"noise": "gauss255", "data": data | changes})


def test_the_data_set_of_a_config(data, tmp_path):
    dataset = dataset_from_config(config(data), "val", ("noisy", "denoised"))
    assert dataset.classes == ["ant", "bee"] and dataset.split == "val" and len(dataset) == 6
    (noisy, denoised), label = dataset[5]
    assert label == 1 and np.array_equal(noisy, keyed_noise(255 - denoised, GAUSS, 0, "val/bee/2"))
    (tmp_path / "noisy_data-gauss255-denoised").rename(tmp_path / "elsewhere")
    moved = config(data, denoised_root=str(tmp_path / "elsewhere"), in_chans=1)
    assert dataset_from_config(moved, "train", ("denoised",))[0][0][0].shape == (24, 32, 1)


def test_impossible_settings_name_the_key(data):
    with pytest.raises(ValueError, match="data.storage='cloud'"):
        dataset_from_config(config(data, storage="cloud"), "train")
    with pytest.raises(ImageError, match=r"0.jpg has 3 channels of 24 x 32 px, not 4; set data\.in_chans.*--channels"):
        dataset_from_config(config(data, in_chans=4), "train", ("clean",))[0]
    with pytest.raises(ImageError, match=r"0.jpg.*24 x 32 px.*limit of 767 px.*data\.max_pixels"):
        dataset_from_config(config(data, max_pixels=767), "train", ("clean",))[0]
    with pytest.raises(ValueError, match="view 'pretty'"):
        dataset_from_config(config(data), "train", ("pretty",))
    with pytest.raises(ValueError, match="mix"):
        dataset_from_config(config(data), "train", ("mix",))
    (data / "val" / "bee").rename(data / "val" / "cow")
    with pytest.raises(ValueError, match="only in val: cow"):
        dataset_from_config(config(data), "train")
