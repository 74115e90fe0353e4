"""Trees of images: what is listed, read, refused and written."""

import errno
import io
import os
import resource
import signal

import numpy as np
import pytest
from PIL import Image

from utils import images
from utils.images import ImageError, read_image, twin, write_image
from utils.noise import NoiseSpec, keyed_noise

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)


def test_listing_is_sorted_recursive_and_leaves_out_what_is_no_image(tmp_path):
    for name in ("train/b/2.JPEG", "train/a/1.png", "x.webp", ".hidden.png", "train/.cache/3.png", "notes.txt",
                 "train/a/.9.png.tmp-7", "manifest.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "train/a/loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "train/b")
    assert images.list_images(tmp_path) == ["linked/2.JPEG", "train/a/1.png", "train/b/2.JPEG", "x.webp"]


def test_missing_empty_and_file_as_root_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, reason in (("nowhere", "missing"), ("empty", "no images"), ("file", "not a folder")):
        with pytest.raises(ValueError, match=f"{name}.*{reason}"):
            images.list_images(tmp_path / name)


def test_names_of_another_encoding_are_listed_and_described(tmp_path):
    (tmp_path / os.fsdecode("grün.png".encode("cp1252"))).write_bytes(b"x")
    names = images.list_images(tmp_path)
    assert images.describe_files(tmp_path, names).startswith("1 images ")


def test_collisions_are_named():
    images.check_collisions(["a/x.jpg", "b/x.png", "a/x.y.png"])
    with pytest.raises(ValueError, match="a/x.jpg and a/x.png"):
        images.check_collisions(["a/x.jpg", "a/x.png"])


def test_names_of_twins(tmp_path, monkeypatch):
    spec = NoiseSpec.parse("speckle1.0")
    assert str(images.noisy_root("d/mini-imagenet/", spec)) == "d/noisy_mini-imagenet-speckle1.0"
    assert str(images.denoised_root("d/mini-imagenet", spec)) == "d/noisy_mini-imagenet-speckle1.0-denoised"
    assert str(images.denoised_root("d/mstar", NoiseSpec.parse("none"))) == "d/mstar-denoised"
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path / "set")
    assert images.noisy_root(".", spec) == tmp_path / "noisy_set-speckle1.0"
    assert str(twin("root", "train/a/x.v1.JPEG")) == "root/train/a/x.v1.png"
    for relative in ("../x.png", "a/../../x.png", "/etc/x.png"):
        with pytest.raises(ValueError, match="leaves"):
            twin("root", relative)


# --- reading --------------------------------------------------------------------------------------------------------
def _save(path, mode: str) -> None:
    Image.fromarray(COLOUR).convert(mode).save(path)


@pytest.mark.parametrize("mode,extension", [("RGB", "png"), ("L", "png"), ("1", "png"), ("P", "png"), ("RGBA", "png"),
                                            ("LA", "png"), ("CMYK", "jpg"), ("L", "jpg"), ("RGB", "webp"),
                                            ("RGB", "bmp"), ("RGBA", "webp"), ("CMYK", "tif")])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_read_as_asked(tmp_path, mode, extension, channels):
    path = tmp_path / f"x.{extension}"
    _save(path, mode)
    image = read_image(path, channels)
    assert image.shape == (9, 7, channels) and image.dtype == np.uint8 and image.flags.writeable
    with Image.open(path) as opened:
        expected = np.asarray(opened.convert("RGB" if channels == 3 else "L")).reshape(9, 7, channels)
    assert np.array_equal(image, expected)
    assert read_image(path, channels, "native").dtype == np.uint8


def test_sixteen_bits_are_scaled_and_kept_when_asked(tmp_path):
    deep = np.linspace(0, 65535, 63).astype(np.uint16).reshape(9, 7)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png")[:, :, 2], np.rint(deep / 257))
    native = read_image(tmp_path / "deep.png", 1, "native")
    assert native.dtype == np.float32 and np.array_equal(np.rint(native[:, :, 0] * 65535), deep)
    Image.fromarray((deep / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    assert np.abs(read_image(tmp_path / "float.tif", 1, "native") - native).max() < 1e-6
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "large.tif")
    with pytest.raises(ImageError, match="large.tif.*outside"):
        read_image(tmp_path / "large.tif")


def test_broken_files_are_named(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.tile(COLOUR, (20, 20, 1))).save(buffer, "PNG")
    whole = buffer.getvalue()
    contents = {
        "empty.png": b"", "text.png": b"hello", "cut.png": whole[: len(whole) // 2], "head.png": whole[:20],
        "header.png": whole[:40],
    }  # fmt: skip
    Image.fromarray(np.tile(COLOUR, (20, 20, 1))).save(buffer := io.BytesIO(), "JPEG")
    contents["cut.jpg"] = buffer.getvalue()[: buffer.tell() // 2]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name) as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    for name in ("missing.png", "."):
        with pytest.raises(ImageError, match="cannot be read"):
            read_image(tmp_path / name)


# --- writing --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("format", ["png", "webp"])
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1), (8, 5, 1), (5, 8, 3), (64, 33, 3), (200, 3, 3)])
def test_writing_is_lossless(tmp_path, shape, format):
    height, width = shape[:2]
    smooth = (np.add.outer(np.arange(height), np.arange(width)) % 256).astype(np.uint8)
    smooth = smooth if len(shape) == 2 else np.repeat(smooth[:, :, None], shape[2], axis=2)
    for array in (RNG.integers(0, 256, shape, dtype=np.uint8), smooth, np.zeros(shape, np.uint8)):
        size = write_image(tmp_path / "a/b/x", array, format)
        with Image.open(tmp_path / "a/b/x") as image:
            assert image.format == format.upper()
            image.verify()
        channels = shape[2] if len(shape) == 3 else 1
        assert np.array_equal(read_image(tmp_path / "a/b/x", channels), array.reshape(height, width, channels))
        assert size == (tmp_path / "a/b/x").stat().st_size


def test_png_is_not_larger_than_pillows_quickest_on_noise():
    noisy = keyed_noise(np.full((200, 300, 3), 90, np.uint8), NoiseSpec.parse("gauss100"), 0, "k")
    Image.fromarray(noisy).save(buffer := io.BytesIO(), "PNG", compress_level=1)
    assert len(images.encode_image(noisy)) <= buffer.tell()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    write_image(path, COLOUR)
    before = path.read_bytes()

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_image(path, COLOUR[::-1])
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.png"]


# --- files that lie, and what is no file --------------------------------------------------------------------------
def test_pipes_sockets_and_links_to_themselves_are_named_and_never_opened(tmp_path):
    """A reader of a pipe would wait for ever: an alarm ends this test if one is opened."""
    signal.alarm(20)
    write_image(tmp_path / "tree/good.png", COLOUR)
    (tmp_path / "tree/self").symlink_to("self")
    assert images.list_images(tmp_path / "tree") == ["good.png"]
    os.mkfifo(tmp_path / "tree/pipe.png")
    (tmp_path / "tree/self.png").symlink_to("self.png")
    for read in (read_image, images.image_size):
        for name, reason in (
            ("pipe.png", "it is no file"),
            ("self.png", "cannot be read"),
            ("../tree", "it is no file"),
        ):
            with pytest.raises(ImageError, match=f"{name}.*{reason}"):
                read(tmp_path / "tree" / name)
        with pytest.raises(ImageError, match="/dev/zero.*it is no file"):
            read("/dev/zero")
    with pytest.raises(ImageError, match="pipe.png.*it is no file"):
        images.list_images(tmp_path / "tree")
    signal.alarm(0)


def test_a_small_file_that_claims_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    bomb = tmp_path / "bomb.png"
    Image.new("L", (9000, 9000)).save(bomb)
    assert bomb.stat().st_size < 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="bomb.png.*9000 x 9000 px.*limit of 67108864 px.*data.max_pixels"):
        read_image(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "it was decoded"  # KiB
    assert read_image(bomb, 1, max_pixels=81_000_000).shape == (9000, 9000, 1)
    np.save(tmp_path / "deep.npy", np.zeros((10, 10, 8), np.uint8))
    with pytest.raises(ImageError, match="deep.npy.*limit of 199 px"):  # eight channels weigh as much as 200 pixels
        read_image(tmp_path / "deep.npy", 8, max_pixels=199)
    assert read_image(tmp_path / "deep.npy", 8, max_pixels=200).shape == (10, 10, 8)


def test_pillow_opens_the_listed_formats_alone(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n")
    with pytest.raises(ImageError, match="x.png is no image"):
        read_image(tmp_path / "x.png")
