"""Small whole image files of every format and kind that the project reads: what the fuzzer breaks."""

from __future__ import annotations

import io

import numpy as np
import tifffile
from PIL import Image

HEIGHT, WIDTH = 20, 26


def image_files() -> dict[str, bytes]:
    """{name with extension: content}."""
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    deep = rng.integers(0, 65536, (HEIGHT, WIDTH, 5), dtype=np.uint16)
    rgb, grey = Image.fromarray(colour), Image.fromarray(colour[:, :, 0])
    exif = Image.Exif()
    exif[274] = 6
    files = {
        "rgb.png": _saved(rgb, "png"),
        "grey.png": _saved(grey, "png"),
        "palette.png": _saved(rgb.quantize(16), "png"),
        "rgba.png": _saved(rgb.convert("RGBA"), "png"),
        "bilevel.png": _saved(grey.convert("1"), "png"),
        "deep.png": _saved(Image.fromarray(deep[:, :, 0]), "png"),
        "rgb.jpg": _saved(rgb, "jpeg", exif=exif),
        "progressive.jpeg": _saved(rgb, "jpeg", progressive=True),
        "grey.jpg": _saved(grey, "jpeg"),
        "cmyk.jpg": _saved(rgb.convert("CMYK"), "jpeg"),
        "lossy.webp": _saved(rgb, "webp"),
        "lossless.webp": _saved(rgb, "webp", lossless=True),
        "rgb.bmp": _saved(rgb, "bmp"),
        "palette.bmp": _saved(rgb.quantize(16), "bmp"),
        "rgb.ppm": _saved(rgb, "ppm"),
        "grey.pgm": _saved(grey, "ppm"),
    }
    return files | _tiffs(rgb, colour, deep) | _arrays(colour, deep)


def _tiffs(rgb: Image.Image, colour: np.ndarray, deep: np.ndarray) -> dict[str, bytes]:
    orientation = [(274, "H", 1, 6, True)]
    minisblack = {"photometric": "minisblack"}
    return {
        "pillow.tif": _saved(rgb, "tiff"),
        "packed.tif": _saved(rgb, "tiff", compression="tiff_adobe_deflate"),
        "lzw.tiff": _saved(rgb, "tiff", compression="tiff_lzw"),
        "turned.tif": _tiff(colour, photometric="rgb", extratags=orientation),
        "deep.tif": _tiff(deep[:, :, 0], extratags=orientation),
        "deep_rgb.tif": _tiff(deep[:, :, :3], photometric="rgb", extratags=orientation),
        "channels.tif": _tiff(deep, planarconfig="contig", **minisblack),
        "planes.tiff": _tiff(np.moveaxis(deep, 2, 0), planarconfig="separate", **minisblack),
        "pages.tif": _tiff(np.moveaxis(deep, 2, 0), metadata={"axes": "CYX"}, **minisblack),
        "float.tif": _tiff(deep[:, :, 0].astype(np.float32) / 65535),
        "big.tif": _tiff(deep[:, :, :3], bigtiff=True, photometric="rgb"),
        "tiled.tif": _tiff(deep[:, :, :3], tile=(16, 16), photometric="rgb", compression="zlib", predictor=True),
    }


def _arrays(colour: np.ndarray, deep: np.ndarray) -> dict[str, bytes]:
    arrays = {
        "rgb.npy": colour,
        "deep.npy": deep,
        "grey.npy": deep[:, :, 0],
        "float.npy": deep.astype(np.float32) / 65535,
        "half.npy": (deep[:, :, :3] / 65536).astype(np.float16),
        "columns.npy": np.asfortranarray(colour),
    }
    files = {}
    for name, array in arrays.items():
        np.save(buffer := io.BytesIO(), array)
        files[name] = buffer.getvalue()
    return files


def _saved(image: Image.Image, format: str, **options) -> bytes:
    image.save(buffer := io.BytesIO(), format=format, **options)
    return buffer.getvalue()


def _tiff(array: np.ndarray, **options) -> bytes:
    tifffile.imwrite(buffer := io.BytesIO(), array, **options)
    return buffer.getvalue()
