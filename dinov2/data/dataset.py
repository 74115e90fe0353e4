"""Images of a data folder in one view or several: noisy, denoised, clean, or a mix that moves over the training.

The views of an image have one size and show the same pixels, so that the same crop can be cut out of each. The noisy
view carries the image's one fixed realisation of the noise, added while loading or read from the noisy tree, with the
same bytes.
"""

import hashlib
import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F

from dinov2.data.index import as_it_lies, build_index, check_classes
from dinov2.data.splits import Layout
from utils.images import MAX_PIXELS, denoised_root, describe_files, noisy_root, read_image, read_manifest, twin
from utils.noise import NoiseSpec, keyed_noise, noise_key
from utils.values import ESTIMATED, FULL, Values, is_consistent, resolve, rule_for_reading

VIEWS = ("noisy", "denoised", "clean", "mix")


@dataclass(frozen=True)
class Mix:
    """The view "mix": denoised with a probability that moves linearly from start to end over `iterations`, else noisy.

    The choice is a pure function of (seed, iteration, image).
    """

    start: float
    end: float
    iterations: int
    seed: int

    def kind(self, iteration: int, index: int) -> str:
        """ "denoised" or "noisy", for an image at an iteration."""
        fraction = self.start + (self.end - self.start) * min(iteration / self.iterations, 1.0)
        digest = hashlib.blake2b(f"{self.seed} {iteration} {index}".encode(), digest_size=8).digest()
        return "denoised" if int.from_bytes(digest, "little") < fraction * 2**64 else "noisy"


class ImageDataset(torch.utils.data.Dataset):
    """dataset[i] -> (images, label): an array [H, W, C] for each view, all of one size, and the class number.

    split: a folder of root, or a part of it by `layout`; None: all images below root, without labels. Arrays are uint8,
    or float32 in [0, 1] if the file has more than 8 bits or `values` scale it. Images with a side above max_side pixels
    are reduced (antialiased) after the noise; files of more than max_pixels or of other channels are refused. storage:
    where the noisy view comes from, "on_the_fly" or "disk" (the tree noisy_root).
    ValueError names missing denoised (noisy) images before anything is read, and later an image that cannot be decoded
    or whose views differ in size.
    """

    def __init__(
        self,
        root: Path | str,
        split: str | None,
        views: tuple[str, ...] = ("noisy",),
        noise: NoiseSpec | None = None,
        noise_seed: int = 0,
        storage: str = "on_the_fly",
        noisy: Path | str | None = None,
        denoised: Path | str | None = None,
        channels: int = 3,
        max_side: int | None = None,
        mix: Mix | None = None,
        index_cache: Path | str | None = None,
        values: Values = FULL,
        layout: Layout | None = None,
        max_pixels: int = MAX_PIXELS,
    ):
        unknown = [view for view in views if view not in VIEWS]
        if unknown:
            raise ValueError(f"view {unknown[0]!r} is unknown: give one of {', '.join(VIEWS)}.")
        if "mix" in views and mix is None:
            raise ValueError("view 'mix' needs the fractions of denoised images at the start and the end (mix).")
        if storage not in ("on_the_fly", "disk"):
            raise ValueError(f"data.storage={storage!r} is unknown: give on_the_fly or disk.")
        self.root, self.split, self.views, self.mix = Path(root), split, tuple(views), mix
        self.noise, self.noise_seed = noise or NoiseSpec.parse("none"), noise_seed
        self.channels, self.max_side, self.values, self.max_pixels = channels, max_side, values, max_pixels
        self.scale = rule_for_reading(values, root)
        self._digests: dict[str | None, str] = {}
        index = build_index(root, split, index_cache, layout)
        self.relatives, self.labels, self.classes = index.relatives, index.labels, index.classes
        # Roots of the kinds of image that are read from twins of the files.
        self.twins: dict[str, Path] = {}
        if "denoised" in self.kinds:
            self.twins["denoised"] = Path(denoised or denoised_root(root, self.noise))
        if "noisy" in self.kinds and storage == "disk" and self.noise.kind != "none":
            self.twins["noisy"] = Path(noisy or noisy_root(root, self.noise))
        self.suffixes = {kind: self._check_twins(kind, folder) for kind, folder in self.twins.items()}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of image that make up the views; "mix" consists of noisy and denoised ones."""
        parts = [("noisy", "denoised") if view == "mix" else (view,) for view in self.views]
        return tuple(dict.fromkeys(kind for part in parts for kind in part))

    def __len__(self) -> int:
        return len(self.relatives)

    def __getitem__(self, index: int) -> tuple[list[np.ndarray], int]:
        return self.read(index, self.choose(index)), int(self.labels[index])

    def choose(self, index: int, iteration: int = 0) -> list[str]:
        """The kind of image of each view, at an iteration of the training."""
        return [self.mix.kind(iteration, index) if view == "mix" else view for view in self.views]

    def read(self, index: int, kinds: list[str]) -> list[np.ndarray]:
        """Image `index` as each of these kinds."""
        relative, source, images = self.relatives[index], None, []
        for kind in kinds:
            if kind in self.twins:
                image = self._read(self.path(relative, kind), FULL)
            else:
                source = self._read(self.root / relative, self.scale) if source is None else source
                image = source
                if kind == "noisy":
                    image = keyed_noise(source, self.noise, self.noise_seed, noise_key(relative))
            images.append(image)
        shapes = {image.shape[:2]: kind for image, kind in zip(images, kinds, strict=True)}
        if len(shapes) > 1:
            found = ", ".join(f"{kind} {h} x {w}" for (h, w), kind in shapes.items())
            raise ValueError(f"{self.root / relative}: its views differ in size ({found}): write its twins anew.")
        return [reduce_sides(image, self.max_side) for image in images]

    def keep(self, places) -> "ImageDataset":
        """The data set itself, reduced to the images with these numbers."""
        self.relatives, self.labels, self._digests = [self.relatives[i] for i in places], self.labels[places], {}
        return self

    def digest(self, kind: str | None = None) -> str:
        """Number of images and hash of their names and sizes, of the source or of the twins of a kind; read once."""
        if kind not in self._digests:
            root, names = self.root, self.relatives
            if kind is not None:
                root, names = self.twins[kind], [os.path.splitext(n)[0] + self.suffixes[kind] for n in names]
            self._digests[kind] = describe_files(root, names)
        return self._digests[kind]

    def path(self, relative: str, kind: str) -> Path:
        """The file that this kind of an image is read from."""
        twins = self.twins.get(kind)
        return self.root / relative if twins is None else twin(twins, relative, self.suffixes[kind])

    def _read(self, path: Path, values: Values) -> np.ndarray:
        return read_image(path, self.channels, "native", values, self.max_pixels)

    def _check_twins(self, kind: str, folder: Path) -> str:
        """Extension of the twins below folder. ValueError unless each image has one, made with this noise and seed."""
        made = read_manifest(folder) or {}
        wanted = {"kind": kind, "noise": str(self.noise), "values": str(self.values)}
        made = {"values": "full"} | made if made else made
        if self.noise.kind != "none":
            wanted["noise_seed"] = self.noise_seed
        for key, value in wanted.items():
            if made.get(key, value) != value:
                raise ValueError(
                    f"{folder} was made with {key} {made[key]}, but {value} is configured: name another tree."
                )
        suffix = "." + made.get("format", "png")
        missing = []
        for parent, group in groupby(self.relatives, key=os.path.dirname):
            present = set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
            missing += [path for path in group if PurePosixPath(path).stem + suffix not in present]
        if missing:
            tool = "Neighbor2Neighbor.denoise" if kind == "denoised" else "utils.generate_noise"
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(self)} {kind} images, the first for {', '.join(missing[:3])}: "
                f"write them with python -m {tool}."
            )
        return suffix


def dataset_from_config(
    cfg, split: str | None, views: tuple[str, ...] = ("noisy",), mix: Mix | None = None
) -> ImageDataset:
    """The data set of a run's configuration (keys noise and data.*), for training and evaluation.

    ValueError also if train and val have different classes.
    """
    data = cfg.data
    layout = layout_of(cfg)
    if split is not None and as_it_lies(data.root, layout):
        check_classes(data.root)
    values, _ = resolve_values(cfg, split and "train")
    return ImageDataset(
        data.root,
        split,
        views,
        noise=NoiseSpec.parse(cfg.noise),
        noise_seed=data.noise_seed,
        storage=data.storage,
        noisy=data.noisy_root,
        denoised=data.denoised_root,
        channels=data.in_chans,
        max_side=data.max_side,
        mix=mix,
        index_cache=data.index_cache,
        values=values,
        layout=layout,
        max_pixels=data.max_pixels,
    )


def layout_of(cfg) -> Layout:
    """How the configuration splits its data folder into train and val."""
    data = cfg.data
    only = data.in_chans if data.mixed == "keep" else None
    return Layout(data.val, data.group, data.labels, data.split_seed, data.stack, only)


def resolve_values(cfg, split: str | None = "train") -> tuple[Values, str]:
    """The rule of data.values and a sentence with the reason. An estimated rule is that of the denoised copy, if there
    is one, as both must agree; otherwise it is estimated over the training images."""
    data = cfg.data
    if data["values"] not in ESTIMATED:
        return resolve(data["values"], data.root, [], data.in_chans)
    tree = Path(data.denoised_root or denoised_root(data.root, NoiseSpec.parse(cfg.noise)))
    if made := read_manifest(tree):
        values = Values.parse(made.get("values", "full"))
        if is_consistent(data["values"], values):
            return values, f"values: {values}, as {tree} was made with"
    relatives = build_index(data.root, split, data.index_cache, layout_of(cfg)).relatives
    return resolve(data["values"], data.root, relatives, data.in_chans, data.max_pixels)


def reduce_sides(image: np.ndarray, max_side: int | None) -> np.ndarray:
    """The image with its longer side reduced to max_side (antialiased bicubic), if it is longer."""
    longer = max(image.shape[:2])
    if max_side is None or longer <= max_side:
        return image
    size = [max(1, round(side * max_side / longer)) for side in image.shape[:2]]
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0)
    reduced = F.interpolate(tensor, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    return reduced if reduced.dtype == np.uint8 else reduced.clip(0, 1)
