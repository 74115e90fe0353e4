"""Images beyond 8 bits and three channels: .npy and TIFF files, what is refused, what is written."""

import struct

import numpy as np
import pytest
import tifffile
from PIL import Image

from utils import images
from utils.images import ImageError, image_size, read_image, visible, write_image

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (12, 9, 5), dtype=np.uint16)
PIXELS = {"photometric": "minisblack", "planarconfig": "contig"}


def values(array: np.ndarray) -> np.ndarray:
    """What an integer or float array stands for, in [0, 1]."""
    return array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max) if array.dtype.kind == "u" else array


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "float16", "float32", ">f4", "float64"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_npy_of_any_depth_and_channels(tmp_path, dtype, channels):
    whole = RNG.integers(0, 256, (12, 9, channels)) if np.dtype(dtype).kind == "u" else RNG.random((12, 9, channels))
    array = np.asfortranarray(whole.astype(dtype))
    np.save(tmp_path / "x.NPY", array)
    (tmp_path / "x.NPY.npy").rename(tmp_path / "x.NPY")
    image = read_image(tmp_path / "x.NPY", channels, "native")
    assert type(image) is np.ndarray and image.flags.writeable and image.flags.c_contiguous
    assert image.dtype == (np.uint8 if dtype == "uint8" else np.float32)
    expected = array if dtype == "uint8" else values(array.astype(array.dtype.newbyteorder("="))).astype(np.float32)
    assert np.array_equal(image, expected) and image_size(tmp_path / "x.NPY") == (12, 9)
    rounded = read_image(tmp_path / "x.NPY", channels)
    assert rounded.dtype == np.uint8 and np.abs(rounded / 255 - values(image)).max() <= 0.5001 / 255


def test_grey_becomes_rgb_and_rgb_grey_at_any_depth(tmp_path):
    np.save(tmp_path / "grey.npy", DEEP[:, :, 0])
    grey = read_image(tmp_path / "grey.npy", 3, "native")
    assert grey.shape == (12, 9, 3) and np.array_equal(grey[:, :, 2], values(DEEP[:, :, 0]))
    colour = RNG.integers(0, 256, (12, 9, 3), dtype=np.uint8)
    np.save(tmp_path / "colour.npy", colour)
    np.save(tmp_path / "deep.npy", colour.astype(np.uint16) * 257)
    expected = np.asarray(Image.fromarray(colour).convert("L"))
    assert np.array_equal(read_image(tmp_path / "colour.npy", 1)[:, :, 0], expected)
    assert np.abs(read_image(tmp_path / "deep.npy", 1, "native")[:, :, 0] * 255 - expected).max() < 0.51


@pytest.mark.parametrize("layout", [
    {}, {"metadata": None}, {"imagej": True, "metadata": {"axes": "CYX"}}, {"ome": True, "metadata": {"axes": "CYX"}},
    {"photometric": "minisblack", "planarconfig": "separate"}, {"compression": "zlib"}, PIXELS,
    PIXELS | {"compression": "zlib", "tile": (16, 16)},
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiff_by_its_own_axes(tmp_path, layout, dtype):
    array = (DEEP >> 8).astype(dtype) if dtype != "float32" else values(DEEP)
    pixels = layout.get("planarconfig") == "contig"
    tifffile.imwrite(tmp_path / "x.tif", array if pixels else array.transpose(2, 0, 1), **layout)
    image = read_image(tmp_path / "x.tif", 5, "native")
    assert image.flags.c_contiguous and image.dtype == (np.uint8 if dtype == "uint8" else np.float32)
    assert np.array_equal(image, array if dtype == "uint8" else values(array))
    assert image_size(tmp_path / "x.tif") == (12, 9)
    for channels in (1, 3, 4, 6):
        with pytest.raises(ImageError, match=f"x.tif has 5 channels .* not {channels}; set data.in_chans .* to 5"):
            read_image(tmp_path / "x.tif", channels)


def test_tiffs_of_few_channels(tmp_path):
    """Deep colour keeps its bits, alpha is dropped unless four channels are asked for, thumbnails are passed over."""
    for name, array in (("rgb", DEEP[:, :, :3]), ("rgba", DEEP[:, :, :4])):
        tifffile.imwrite(tmp_path / f"{name}.tif", array, photometric="rgb")
        assert np.array_equal(read_image(tmp_path / f"{name}.tif", 3, "native"), values(DEEP[:, :, :3]))
    assert np.array_equal(read_image(tmp_path / "rgba.tif", 4, "native"), values(DEEP[:, :, :4]))
    tifffile.imwrite(tmp_path / "one_header.tif", DEEP[:, :, :3].transpose(2, 0, 1), truncate=True)
    assert np.array_equal(read_image(tmp_path / "one_header.tif", 3, "native"), values(DEEP[:, :, :3]))
    eight = (DEEP >> 8).astype(np.uint8)
    tifffile.imwrite(tmp_path / "two.tif", eight[:, :, :2], **PIXELS)
    assert np.array_equal(read_image(tmp_path / "two.tif", 2), eight[:, :, :2])
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        file.write(eight[:, :, :3], photometric="rgb")
        file.write(eight[::2, ::2, :3].copy(), photometric="rgb")
    assert np.array_equal(read_image(tmp_path / "pyramid.tif"), eight[:, :, :3])
    for number, grey in enumerate((DEEP[:, :, 0], values(DEEP[:, :, 0]), values(DEEP[:, :, 0]).astype(np.float16))):
        tifffile.imwrite(tmp_path / f"{number}.tif", grey)
        assert np.array_equal(read_image(tmp_path / f"{number}.tif", 3, "native")[:, :, 1], values(grey))
    rgba = Image.fromarray(np.ascontiguousarray(eight[:, :, :4]))
    rgba.save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png", 4), eight[:, :, :4])


def test_bad_npy_files_are_named(tmp_path):
    np.save(tmp_path / "good.npy", DEEP)
    whole = (tmp_path / "good.npy").read_bytes()
    for name, content in {"empty": b"", "text": b"hello", "cut": whole[:-1], "header": whole[:60], "long": whole + b"x",
                          "huge": whole.replace(b"(12, 9, 5), ", b"(12, 10**9,)")}.items():  # fmt: skip
        (tmp_path / f"{name}.npy").write_bytes(content)
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name, array in {"flat": DEEP[0, 0], "four": DEEP[None], "none": DEEP[:0], "signed": DEEP.astype(np.int32),
                        "nan": np.full((4, 4, 5), np.nan), "above": np.full((4, 4, 5), 1.5, np.float32),
                        "below": np.full((4, 4, 5), -0.1), "complex": DEEP.astype(complex)}.items():  # fmt: skip
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "good.npy").unlink()
    names = images.list_images(tmp_path)
    assert len(names) == 15
    for name in names:
        with pytest.raises(ImageError, match=name) as caught:
            read_image(tmp_path / name, 5)
        assert "\n" not in str(caught.value)
    for name, reason in (("nan", r"outside \[0, 1\]"), ("pickled", "objects"), ("cut", "greater than file size"),
                         ("flat", r"shape is \(5,\)"), ("signed", "int32"), ("text", "no whole .npy")):  # fmt: skip
        with pytest.raises(ImageError, match=reason):
            read_image(tmp_path / f"{name}.npy", 5)
    for name in ("cut", "text", "four", "missing"):
        with pytest.raises(ImageError, match=name):
            image_size(tmp_path / f"{name}.npy")


def test_damaged_npy_headers_raise_nothing_else(tmp_path):
    np.save(tmp_path / "x.npy", DEEP)
    whole, refused = (tmp_path / "x.npy").read_bytes(), 0
    for place in range(128):
        for byte in b"(9'\xff\0":
            (tmp_path / "x.npy").write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            for read in (lambda path: read_image(path, 5), image_size):
                try:
                    read(tmp_path / "x.npy")
                except ImageError:
                    refused += 1
    assert refused > 300


@pytest.mark.parametrize("layout", [{}, {"compression": "zlib"}, {"metadata": None}, PIXELS])
def test_bad_tiffs_are_named(tmp_path, layout, capfd):
    """A file cut anywhere never passes for one of fewer channels."""
    array = RNG.integers(0, 65536, (5, 40, 40), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", array.transpose(1, 2, 0) if layout is PIXELS else array, **layout)
    whole = (tmp_path / "x.tif").read_bytes()
    for share in (0.0005, 0.01, 0.2, 0.4, 0.6, 0.8, 0.95):
        (tmp_path / "x.tif").write_bytes(whole[: int(share * len(whole))])
        for channels in (1, 3, 5):
            with pytest.raises(ImageError, match="x.tif"):
                read_image(tmp_path / "x.tif", channels)
    assert capfd.readouterr().err == ""


def test_stacks_are_no_channels(tmp_path):
    array = DEEP.transpose(2, 0, 1)
    for axes in ("ZYX", "TYX"):
        tifffile.imwrite(tmp_path / "stack.tif", array, imagej=True, metadata={"axes": axes})
        with pytest.raises(ImageError, match=f"stack.tif.*axes {axes}.*no planes of channels"):
            read_image(tmp_path / "stack.tif", 5)
    tifffile.imwrite(tmp_path / "float.tif", array.astype(np.float32))
    with pytest.raises(ImageError, match=r"float.tif.*outside \[0, 1\]"):
        read_image(tmp_path / "float.tif", 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_npy_is_written_as_it_is(tmp_path, dtype):
    array = (RNG.random((7, 6, 4)) * (255 if dtype is np.uint8 else 1)).astype(dtype)
    size = write_image(tmp_path / "a/x.npy", array.transpose(1, 0, 2), "npy")
    assert size == (tmp_path / "a/x.npy").stat().st_size
    back = read_image(tmp_path / "a/x.npy", 4, "native")
    assert back.dtype == dtype and np.array_equal(back, array.transpose(1, 0, 2))


def test_what_is_shown_of_many_channels():
    assert np.array_equal(visible(DEEP[:, :, :5] / np.float32(65535)), np.rint(DEEP[:, :, :3] / 257))
    assert visible(np.zeros((3, 4, 2), np.uint8)).shape == (3, 4, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("array", [DEEP[:, :, 0], DEEP[:, :, :3], np.uint8(DEEP[:, :, 0]), np.uint8(DEEP[:, :, :3])])
def test_a_turned_tiff_is_read_upright_at_any_depth_and_its_size_is_what_is_read(tmp_path, orientation, array):
    photometric = "minisblack" if array.ndim == 2 else "rgb"
    tag = (274, "H", 1, orientation, True)
    tifffile.imwrite(tmp_path / "x.tif", array, photometric=photometric, extratags=[tag])
    upright = array.swapaxes(0, 1) if orientation > 4 else array
    # Where the first row and the first column of the file are to be seen (TIFF 6.0, Orientation).
    turns = {2: np.s_[:, ::-1], 3: np.s_[::-1, ::-1], 4: np.s_[::-1], 6: np.s_[:, ::-1], 7: np.s_[::-1, ::-1]}
    upright = upright[turns.get(orientation, np.s_[::-1] if orientation == 8 else np.s_[:])]
    image = read_image(tmp_path / "x.tif", 1 if array.ndim == 2 else 3, "native")
    assert image_size(tmp_path / "x.tif") == image.shape[:2]
    assert np.array_equal(image.squeeze(), values(upright) if array.dtype == np.uint16 else upright)


@pytest.mark.parametrize("tag", [256, 257])
def test_a_tiff_without_height_or_width_is_named(tmp_path, tag):
    Image.fromarray(np.uint8(DEEP[:, :, :3])).save(tmp_path / "x.tif")
    content = bytearray((tmp_path / "x.tif").read_bytes())
    at = content.index(struct.pack("<HH", tag, 4)) if struct.pack("<HH", tag, 4) in content else 0
    at = at or content.index(struct.pack("<HH", tag, 3))
    content[at + 8 : at + 12] = bytes(4)
    (tmp_path / "x.tif").write_bytes(content)
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="x.tif"):
            read(tmp_path / "x.tif")
