"""Trees of images: listing, naming of noisy and denoised twins, safe decoding, atomic writing, manifests.

A tree is a folder of images of any depth, DIR/{train,val}/<class>/<image> as a rule. Its twins lie beside it with the
same relative paths: noisy_DIR-<noise>/ and noisy_DIR-<noise>-denoised/. A tool that has finished a tree writes
manifest.json into it, last of all: a tree without one is not finished.
"""

import hashlib
import io
import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from utils import array_files, readers
from utils.files import atomic_path
from utils.noise import NoiseSpec
from utils.text import count_of, one_line

IMAGE_EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".npy", *readers.FIELD_EXTENSIONS
)  # fmt: skip
_CONVERTED = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm")  # by Pillow, to grey or RGB
MIXED = ("refuse", "keep")  # what to do with images of other channels than asked for
FORMATS = ("png", "webp", "npy")  # that images are written in
MANIFEST = "manifest.json"
BEGUN = ".manifest.json"  # of a tree in work, see utils.trees
_TURNS = dict(enumerate((  # of an image stored with EXIF's orientation 2 to 8
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
), 2))  # fmt: skip
_QUARTER_TURNS = (5, 6, 7, 8)
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I")
# Pillow goes by content, not by name: left to itself it would also take formats whose readers start other programs.
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")
MAX_PIXELS = 2**26  # 8192 x 8192: 0.2 GB decoded, 0.8 GB with noise; a file of some kB can claim a hundred times that
MAX_PIXELS_HELP = f"a file that claims more is refused (default {MAX_PIXELS})"
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, which no key could raise; _decode() holds to ours before it decodes


class ImageError(ValueError):
    """An image that cannot be read; the message names the file and the reason."""


# --- trees ----------------------------------------------------------------------------------------------------------
def list_images(root: Path | str, stack: str = "refuse", times: dict[str, int] | None = None) -> list[str]:
    """Relative posix paths of all images below root, sorted; dot files and temporary files are left out.

    stack: "pages" names each page of a file of several, "max" their maximum (utils/readers.py); "refuse" the file,
    which is then refused when read. Links to folders are followed. times takes the modification time (ns) of every
    folder read, empty ones too, by its relative path ("" of root). ValueError where root is missing, is no folder or
    holds no image, and where something with the name of an image is no file.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is {'not a folder' if root.exists() else 'missing'}; name a folder of images")
    found = sorted(_walk(root, "", {os.path.realpath(root)}, {} if times is None else times))
    if not found:
        raise ValueError(f"{root} holds no images ({', '.join(IMAGE_EXTENSIONS)})")
    return [name for relative in found for name in readers.pages_of(root, relative, stack)]


def _walk(folder: Path, prefix: str, above: set[str], times: dict[str, int]) -> Iterator[str]:
    """Relative image paths below folder. above: real paths of the folders on the way down, against looping links."""
    times[prefix.rstrip("/")] = os.stat(folder).st_mtime_ns  # before it is listed: a later change is then seen as one
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or ".tmp-" in entry.name:
                continue
            if is_folder(entry):
                real = os.path.realpath(entry.path)
                if real not in above:
                    yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {real}, times)
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                if not entry.is_file(follow_symlinks=False):
                    with suppress(OSError):  # a broken link is named when it is read
                        check_file(entry.path)
                yield prefix + entry.name


def is_folder(entry: os.DirEntry) -> bool:
    """Whether entry is a folder or a link to one; a link to itself is none, and a Zarr store is an image."""
    try:
        return entry.is_dir() and not entry.name.lower().endswith(".zarr")
    except OSError:
        return False


def check_file(path: Path | str) -> os.stat_result:
    """What the system says of a file. ImageError where it is none: a pipe or a device would keep its reader waiting."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode) and str(path).lower().endswith(".zarr"):
        return status
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path} cannot be read: it is no file but a folder, pipe, device or socket; remove it")
    return status


def check_collisions(relatives: list[str]) -> None:
    """ValueError naming the images that would share one twin, as a.jpg and a.png in one folder."""
    seen: dict[str, str] = {}
    for relative in relatives:
        stem = str(PurePosixPath(relative).with_suffix(""))
        if stem in seen:
            raise ValueError(f"{seen[stem]} and {relative} differ in their extension alone; rename one of them")
        seen[stem] = relative


def noisy_root(root: Path | str, spec: NoiseSpec) -> Path:
    """Folder of the noisy twin: noisy_<name>-<noise> beside root; root itself for noise "none"."""
    if spec.kind == "none":
        return Path(root)
    root = _resolve_nameless(root)
    return root.parent / f"noisy_{root.name}-{spec}"


def denoised_root(root: Path | str, spec: NoiseSpec) -> Path:
    """Folder of the denoised twin of the clean tree root: noisy_<name>-<noise>-denoised, or <name>-denoised."""
    root = _resolve_nameless(noisy_root(root, spec))
    return root.parent / f"{root.name}-denoised"


def _resolve_nameless(root: Path | str) -> Path:
    """root with a name of its own: "." and ".." have none."""
    root = Path(root)
    return root if root.name not in ("", "..") else root.resolve()


def twin(root: Path | str, relative: str, suffix: str = ".png") -> Path:
    """Path of the image's twin below another root, its extension replaced. ValueError for a path that leaves root."""
    path = PurePosixPath(relative)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{relative} leaves its folder; paths below the tree must not contain '..'")
    return Path(root, path.with_suffix(suffix))


# --- reading --------------------------------------------------------------------------------------------------------
def read_image(
    path: Path | str, channels: int = 3, dtype: str = "uint8", scale: array_files.Scale = array_files.in_range,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:  # fmt: skip
    """The image as [H, W, channels]: as many channels as the file has, or 3 (RGB) of a grey file, or 1 (grey) of RGB.

    scale: utils.values.Values, which turn the stored values into uint8 or float32 in [0, 1]; by default 16-bit
    images are scaled (not cut) and float images must lie in [0, 1]. dtype: "native" as they then are, or "uint8".
    Palette and CMYK images are converted; alpha is dropped, as in the release. ImageError names a file that is
    missing, empty, truncated, no image, of other channels, or of more than max_pixels pixels (of up to four channels;
    of more, fewer).
    """
    assert channels >= 1 and dtype in ("uint8", "native"), (channels, dtype)
    image = _decode(path, channels, scale, max_pixels)
    found = image.shape[2]
    if found == 1 and channels == 3:
        image = np.repeat(image, 3, axis=2)
    elif found == 3 and channels == 1:
        image = _to_grey(image)
    elif found != channels:
        height, width = image.shape[:2]
        raise ImageError(
            f"{path} has {count_of(found, 'channel')} of {height} x {width} px, not {channels}; set data.in_chans of a "
            f"run and --channels of a tool to {found}, or save the channels last"
        )
    return image if dtype == "native" else eight_bit(image)


def image_size(path: Path | str) -> tuple[int, int]:
    """(height, width), from the header alone where Pillow or NumPy know the file. ImageError as read_image()."""
    try:
        if check_file(path).st_size and str(path).lower().endswith(".npy"):
            return array_files.open_npy(path).shape[:2]
        with _open_pillow(path) as image:
            _check_shape(max(MAX_PIXELS, image.height * image.width), image.height, image.width, 1)
            turned = _exif_orientation(image) in _QUARTER_TURNS
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # as in _decode(), which also says what is wrong with it
        return stored_values(path, 0).shape[:2]


def own_shape(path: Path | str) -> tuple[int, int, int]:
    """(height, width, channels) of a file: 1 channel for grey, 3 for colours and palettes, alpha not counted; as many
    as it holds for a file that Pillow does not convert. ImageError as read_image()."""
    if str(path).lower().endswith(_CONVERTED):
        height, width = image_size(path)
        with _open_pillow(path) as image:
            return height, width, 1 if image.mode in (*_SIXTEEN_BIT, "1", "L", "LA", "F") else 3
    return stored_values(path, 0).shape


def stored_values(path: Path | str, channels: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """[H, W, C] as the file holds them, in their own units and of any type of number. ImageError as read_image()."""
    return _decode(path, channels, np.asarray, max_pixels)


def of_channels(root: Path | str, relatives: list[str], channels: int) -> tuple[list[str], str]:
    """The images that can be read with so many channels, and a sentence that counts and names the others, if any.

    ValueError where none is left. Files that cannot be read are kept: they are named when they are read.
    """
    found: dict[int, list[str]] = {}
    for relative in relatives:
        found.setdefault(_readable_channels(Path(root, relative), channels), []).append(relative)
    kept = found.get(channels, [])
    found.pop(channels, None)
    others = [f"{len(names)} of {count} (such as {names[0]})" for count, names in sorted(found.items())]
    having = f"{len(kept)} of {len(relatives)} images have {count_of(channels, 'channel')}"
    left_out = f"{root}: {having}; left out: {', '.join(others)}"
    if not kept:
        raise ValueError(f"{left_out}. Ask for another number of channels")
    return kept, left_out if others else ""


def _readable_channels(path: Path, channels: int) -> int:
    """The channels asked for, where read_image() gives them; else those that the file has."""
    if channels in (1, 3) and path.name.lower().endswith(_CONVERTED):
        return channels
    try:
        found = stored_values(path, channels).shape[2]
    except ImageError:
        return channels
    return channels if {found, channels} == {1, 3} else found


def eight_bit(image: np.ndarray) -> np.ndarray:
    """A uint8 image as it is, a float32 one in [0, 1] rounded to uint8."""
    return image if image.dtype == np.uint8 else np.rint(image * 255).astype(np.uint8)


def grey_levels(image: np.ndarray) -> np.ndarray:
    """Values 0..255 of an image of any depth, not rounded: what powers and PSNR are measured in."""
    return image if image.dtype == np.uint8 else image * np.float32(255)


def visible(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3 or 1] to look at: the first three channels as red, green, blue; of two channels the first."""
    return eight_bit(image[..., :3] if image.shape[-1] >= 3 else image[..., :1])


def _decode(path: Path | str, channels: int, scale: array_files.Scale, max_pixels: int) -> np.ndarray:
    """The scaled image of a file: [H, W, channels] where Pillow converts, else of as many as the file has."""
    try:
        if check_file(readers.place_of(path)).st_size == 0:
            raise ImageError(f"{path} is empty (0 bytes); replace or remove it")
        array = _read_stored(path, channels, partial(_check_shape, max_pixels))
        if array.dtype.kind not in "buif":
            raise ImageError(f"{path} holds {array.dtype}, no real numbers; save its amplitude or intensity instead")
        return scale(array)
    except ImageError:
        raise
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{path} is no image; replace or remove it") from error
    except Exception as error:  # on damaged files the readers fail in every way there is
        raise ImageError(f"{path} cannot be read: {one_line(error)}; replace or remove it") from error


def _read_stored(path: Path | str, channels: int, check: array_files.Check) -> np.ndarray:
    """[H, W, C] of a file by the reader that its name or content asks for, not yet scaled."""
    name = str(path).lower()
    if (array := readers.read(path, check)) is not None:
        return array
    if name.endswith(".npy"):
        array = np.atleast_3d(array_files.open_npy(path))
        check(*array.shape)
        return array
    try:
        with _open_pillow(path) as image:
            check(image.height, image.width, len(image.getbands()))
            array = _read_more_than_pillow(path, image, channels, check) if isinstance(image, TiffImageFile) else None
            return _read_pillow_image(image, channels) if array is None else array
    except Image.UnidentifiedImageError:
        if not name.endswith((".tif", ".tiff")):
            raise
        array = array_files.read_tiff(path, channels, check)
        assert array is not None, "Pillow has read it"
        return array


def _check_shape(max_pixels: int, height: int, width: int, channels: int) -> None:
    """ValueError for what a header claims: no pixel, or more than a reader is to hold."""
    if min(height, width, channels) < 1:
        raise ValueError(f"its size is {height} x {width} px")
    if height * width * max(channels, 4) > 4 * max_pixels:
        raise ValueError(
            f"its {height} x {width} px of {count_of(channels, 'channel')} are more than the limit of {max_pixels} px; "
            "if that is no mistake, raise data.max_pixels of a run and --max-pixels of a tool"
        )


@contextmanager
def _open_pillow(path: Path | str) -> Iterator[Image.Image]:
    # Opened here: given a path, Pillow maps some files, and scrambles those whose orientation swaps height and width.
    with open(path, "rb") as file, Image.open(file, formats=_PILLOW_FORMATS) as image:
        yield image


def _read_more_than_pillow(
    path: Path | str, image: TiffImageFile, channels: int, check: array_files.Check
) -> np.ndarray | None:
    """A TIFF that holds more than Pillow reads of it: several pages, more samples, or more than 8 bits; else None."""
    bands, samples, bits = len(image.getbands()), image.tag_v2.get(277, 1), max(image.tag_v2.get(258, (1,)))
    if samples == bands and bits <= 8 and image.n_frames == 1:
        return None
    return array_files.read_tiff(path, channels, check, bands)


def _read_pillow_image(image: Image.Image, channels: int) -> np.ndarray:
    """[H, W, C] upright, as stored."""
    if (orientation := _exif_orientation(image)) > 1:
        image = image.transpose(_TURNS[orientation])
    return pillow_values(image, channels)


def pillow_values(image: Image.Image, channels: int) -> np.ndarray:
    """[H, W, C] as stored but that 16 bits which Pillow holds in 32 are uint16 again, where they fit; of 8 bits grey or
    RGB as asked for. Pillow itself would cut what is above 255."""
    if image.mode in _SIXTEEN_BIT:
        array = np.asarray(image)[:, :, None]
        return array.astype(np.uint16) if array.min() >= 0 and array.max() <= 65535 else array
    if image.mode == "F":
        return np.asarray(image)[:, :, None]
    array = np.array(image.convert({3: "RGB", 1: "L"}.get(channels, image.mode)))
    return np.atleast_3d(array)


def _exif_orientation(image: Image.Image) -> int:
    """The orientation that EXIF gives, 1 to 8, which every reader honours; of TIFFs Pillow does so itself.

    Looked up before the pixels are loaded, so that image_size() and _decode() find the same.
    """
    if image.format == "TIFF" or "exif" not in image.info:
        return 1
    with suppress(Exception):  # Pillow fails in many ways on damaged EXIF, which says nothing then
        found = image.getexif().get(274)
        return found if found in _TURNS else 1
    return 1


def _to_grey(image: np.ndarray) -> np.ndarray:
    """[H, W, 1] of RGB [H, W, 3], as Pillow weighs it."""
    if image.dtype == np.uint8:
        return np.array(Image.fromarray(image).convert("L"))[:, :, None]
    red, green, blue = np.split(image, 3, axis=2)
    return np.clip(red * np.float32(0.299) + green * np.float32(0.587) + blue * np.float32(0.114), 0, 1)


# --- writing --------------------------------------------------------------------------------------------------------
def check_format(format: str, channels: int) -> None:
    """ValueError where files of --format cannot hold so many channels."""
    if format != "npy" and channels not in (1, 3):
        raise ValueError(f"--format {format} holds 1 or 3 channels, not {channels}; use --format npy")


def write_image(path: Path | str, array: np.ndarray, format: str = "png") -> int:
    """Write an image losslessly and atomically; makes the folder. Returns the bytes written.

    "png" and "webp" hold uint8 [H, W, 3], [H, W, 1] or [H, W]; "npy" holds uint8 and float32 of any channels.
    """
    content = encode_image(array, format)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return len(content)


def encode_image(array: np.ndarray, format: str = "png") -> bytes:
    """The file of an image, as write_image() takes it: the same bytes on every machine with the same libraries."""
    buffer = io.BytesIO()
    if format == "npy":
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        return buffer.getvalue()
    assert array.dtype == np.uint8 and array.size and format in ("png", "webp"), (array.dtype, array.shape, format)
    array = np.atleast_3d(array)
    if format == "png":
        return _encode_png(array)
    image = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    image.save(buffer, format="webp", lossless=True, quality=0, method=0)
    return buffer.getvalue()


def _encode_png(array: np.ndarray) -> bytes:
    """PNG of uint8 [H, W, 1 or 3], on noise 2.6 times as fast as Pillow's quickest and as small.

    Noise has no repeats to search for: it is Huffman-coded with runs only, and one row filter serves the whole image,
    none (noise) or the difference to the row above (denoised images), whichever has the lower entropy.
    """
    height, width, channels = array.shape
    rows = np.ascontiguousarray(array).reshape(height, width * channels)
    upward = rows.copy()
    upward[1:] -= rows[:-1]
    plain = _entropy(rows[::8]) <= _entropy(upward[::8])
    filtered = np.empty((height, width * channels + 1), np.uint8)
    filtered[:, 0] = 0 if plain else 2  # filter types of the PNG specification, section 9.2
    filtered[:, 1:] = rows if plain else upward
    packer = zlib.compressobj(level=1, memLevel=9, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", packer.compress(filtered) + packer.flush()), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _entropy(array: np.ndarray) -> float:
    """Bits per byte that an order-0 code needs for a uint8 array."""
    p = np.bincount(array.reshape(-1), minlength=256) / array.size
    return float(-(p * np.log2(np.maximum(p, 1e-300))).sum())


# --- what a tree is, by its manifest --------------------------------------------------------------------------------
def describe_source(root: Path | str, spec: NoiseSpec, seed: int) -> dict:
    """Which images these are, for manifests and checkpoints: source (name of the clean tree), noise, noise_seed.

    A noisy tree of ours, read with noise "none", is the same as its clean source read with the noise that it holds.
    ValueError for a tree that is not finished, for noise on a noisy tree, and for a denoised tree.
    """
    if read_manifest(root, BEGUN):
        raise ValueError(f"{root} is not finished; run the command that writes it once more")
    made = read_manifest(root) or {}
    if made.get("kind") == "denoised" or (made.get("kind") == "noisy" and spec.kind != "none"):
        raise ValueError(
            f"{root} holds {made['kind']} images ({made.get('noise')}) already; name the clean tree, "
            "or use --noise none on a noisy one"
        )
    given = {"source": Path(root).resolve().name, "noise": str(spec), "noise_seed": seed if spec.kind != "none" else 0}
    return {name: made.get(name, value) for name, value in given.items()}


def describe_files(root: Path | str, relatives: list[str]) -> str:
    """How many files these are, and a hash of their names and sizes: what tells a list of images from another."""
    digest = hashlib.blake2b(digest_size=6)
    for relative in sorted(relatives):
        line = f"{relative}\0{_file_bytes(f'{root}/{relative}')}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))  # names may be of another encoding
    return f"{len(relatives)} images {digest.hexdigest()}"


def _file_bytes(path: str) -> int:
    """Bytes of a file; of a page those of the file that it is in."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return os.stat(readers.file_of(path)).st_size


def source_files(root: Path | str, relatives: list[str]) -> dict[str, str]:
    """describe_files() under a key of its own for clean trees and for noisy copies: the same images in either form."""
    return {"noisy_images" if read_manifest(root) else "images": describe_files(root, relatives)}


def check_unchanged(root: Path | str, files: dict[str, str]) -> None:
    """ValueError where the finished tree at root was made from other files than source_files() now finds."""
    made = read_manifest(root) or {}
    for key, now in files.items():
        if made.get(key, now) != now:
            raise ValueError(f"{root} was made from {made[key]}, its source now has {now}; remove it to make it anew")


def changed_folders(root: Path | str, relatives: list[str], since: float) -> list[Path]:
    """Folders of these images in which a file was added, removed or renamed after `since` (a modification time, s)."""
    folders = sorted({Path(root, relative).parent for relative in relatives})
    return [folder for folder in folders if folder.stat().st_mtime > since]


def existing_images(root: Path | str) -> set[str]:
    """Relative paths of the images that a tree in work already holds."""
    return set(_walk(Path(root), "", {os.path.realpath(root)}, {})) if Path(root).is_dir() else set()


def read_manifest(root: Path | str, name: str = MANIFEST) -> dict | None:
    """The manifest of the tree at root, or None where it is not finished. ValueError for a broken one."""
    path = Path(root, name)
    try:
        fields = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no manifest of a finished tree; remove it to make the tree anew")
    return fields
