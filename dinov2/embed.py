"""Features of every image below a folder: a table with a row per image, its path first.

    python -m dinov2.embed WEIGHTS DIR --output features.parquet
    names, values = dinov2.embed("runs/nct", "DIR")

WEIGHTS: a run, one of its checkpoints, or weights without a run: a .pth of this project or of Meta (DINOv2, DINOv3), a
folder or .safetensors of Hugging Face or timm. DIR: images at any depth, as they are: no noise is added, no classes are
needed. A killed call goes on where it was when it is given once more.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from dinov2 import CommandModule
from dinov2.config import config_hash
from dinov2.data.dataset import ImageDataset, dataset_from_config
from dinov2.data.eval_transforms import CentreCrop, Preprocess
from dinov2.data.loader import make_eval_loader
from dinov2.eval.features import check_finite
from dinov2.keys import check_choice
from dinov2.models import pretrained
from dinov2.models.vision_transformer import VisionTransformer
from utils import cli, distributed
from utils.feature_map import MOST, thumbnail, write_map
from utils.feature_table import PartialRows, check_table, names_path, write_table
from utils.images import ImageError
from utils.locks import sweep
from utils.precision import DTYPES, autocast
from utils.progress import Progress
from utils.sampler import spread_evenly
from utils.text import count_of

TOKENS = {  # name → of a backbone's output the features of each image
    "cls": lambda out: out["x_norm_clstoken"],  # [B, D]
    "mean": lambda out: out["x_norm_patchtokens"].mean(dim=1),  # [B, D]
    "cls+mean": lambda out: torch.cat((TOKENS["cls"](out), TOKENS["mean"](out)), dim=1),  # [B, 2 D]
    "patches": lambda out: out["x_norm_patchtokens"],  # [B, N, D]
}


def load_backbone(path: Path | str, epoch: int | None = None) -> VisionTransformer:
    """A trained backbone, ready for features, on the CPU and in eval mode.

    path: a run's folder (its last kept epoch, or `epoch`), one of its checkpoint folders, or a teacher_checkpoint.pth
    inside a run. Any other file of weights (see dinov2.models.weights) is read with a run's config.yaml above it or,
    where there is none, with the architecture and sizes that follow from the file itself.

        backbone = load_backbone("runs/nct")
        features = backbone(backbone.transform("image.png"))["x_norm_clstoken"]    # [1, D]

    transform: files, Pillow images or arrays to the batch [B, C, H, W] that the run is evaluated on, normalised.
    settings: the configuration that belongs to the weights.
    """
    model, cfg = pretrained.read_backbone(path, epoch)
    model.settings, model.transform = cfg, Preprocess(cfg)
    return model


def embed(
    weights: Path | str | VisionTransformer,
    folder: Path | str,
    output: Path | str | None = None,
    *,
    tokens: str = "cls",
    size: int | None = None,
    crop: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
    skip_bad: bool = False,
    map: Path | str | None = None,
) -> tuple[list[str], np.ndarray]:
    """Features of all images below `folder`: their relative paths, and float32 [N, F] or, of patches, [N, P, D].

    weights: as load_backbone() takes them, or what it gave. output: a .parquet, .npy or .csv to write; a killed call
    goes on from a hidden file beside it. tokens: cls | mean | cls+mean | patches, after the last norm. size, crop:
    pixels of the shorter side and of the central crop, batch_size, workers: as the config's evaluation by default.
    precision: fp32 | bf16 | fp16; by default fp32 on a CPU and, on a GPU, as the run was trained. skip_bad: files that
    cannot be read are named on stderr and left out; else the first of them is a ValueError. map: a .png to draw, by the
    first principal components, with a .json of the places beside it (utils/feature_map.py).
    """
    if map is not None and (tokens == "patches" or Path(map).suffix != ".png"):
        raise ValueError(f"map={map}: name a .png, and tokens that give one row per image, not patches")
    if map is not None:
        _refuse_image_inside(Path(map), Path(folder))
    check_choice("tokens", tokens, TOKENS)
    backbone = weights if isinstance(weights, VisionTransformer) else load_backbone(weights)
    device = _find_device(device or distributed.device())
    cfg = _settings_for(backbone, folder, {"resize": size, "crop": crop, "batch_size": batch_size}, workers)
    precision = precision or (cfg.train.precision if device.type == "cuda" else "fp32")
    check_choice("precision", precision, DTYPES)
    shape = _row_shape(backbone, cfg, tokens)
    dataset, output = _list_images(cfg), None if output is None else _check_output(Path(output), Path(folder), shape)
    key = "" if output is None else _hash_what_decides(backbone, cfg, dataset, f"{tokens} {precision} {device.type}")
    for written in filter(None, (output, map)):
        sweep(Path(written).parent)
    partial = PartialRows(output, shape, key)
    _compute_rows(partial, backbone.to(device).eval(), cfg, dataset, tokens, device, precision, skip_bad)
    names, values = [name for name in dataset.relatives if name not in partial.bad], partial.values()
    for name, reason in partial.bad.items():
        print(f"left out: {name} ({reason})", file=sys.stderr)
    if map is not None:
        _draw_map(Path(map), dataset, names, values)
    if output is not None:  # last, as a call that finds the table is refused
        write_table(output, names, values)
        partial.remove()
    return names, values


def _draw_map(path: Path, dataset: ImageDataset, names: list[str], values: np.ndarray) -> None:
    shown, kind = spread_evenly(len(names), MOST).tolist(), dataset.choose(0)
    place = {name: number for number, name in enumerate(dataset.relatives)}
    tiles = [thumbnail(dataset.read(place[names[i]], kind)[0]) for i in shown]
    write_map(path, [names[i] for i in shown], values[shown], tiles, [None] * len(shown), "pca")


def _find_device(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device} can't be used: {str(error).splitlines()[0]}") from None


def _settings_for(backbone: VisionTransformer, folder: Path | str, changes: dict, workers: int | None) -> DictConfig:
    """The backbone's settings for a folder of images as they are, with the caller's changes to the evaluation."""
    given = {key: value for key, value in changes.items() if value is not None}
    data = {"root": str(folder), "storage": "on_the_fly"} | ({} if workers is None else {"workers": workers})
    cfg = OmegaConf.merge(backbone.settings, {"noise": "none", "data": data, "eval": given})
    for key, least in (("eval.batch_size", 1), ("eval.crop", 1), ("data.workers", 0)):
        if OmegaConf.select(cfg, key) < least:
            raise ValueError(f"{key.partition('.')[2]}={OmegaConf.select(cfg, key)} must be at least {least}")
    patch, over = backbone.patch_size, cfg.eval.crop % backbone.patch_size
    if over:
        near = max(patch, cfg.eval.crop - over)
        raise ValueError(f"crop={cfg.eval.crop} is no multiple of the backbone's patch size {patch}: take {near}")
    return cfg


def _list_images(cfg: DictConfig) -> ImageDataset:
    dataset = dataset_from_config(cfg, None)
    for name in dataset.relatives:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{cfg.data.root}/{name!a} has a name that is no UTF-8: rename it") from None
    return dataset


@torch.inference_mode()
def _row_shape(backbone: VisionTransformer, cfg: DictConfig, tokens: str) -> tuple[int, ...]:
    parameter = next(backbone.parameters())
    images = parameter.new_zeros(1, cfg.data.in_chans, cfg.eval.crop, cfg.eval.crop)
    return tuple(TOKENS[tokens](backbone(images)).shape[1:])


def _check_output(output: Path, folder: Path, shape: tuple[int, ...]) -> Path:
    check_table(output, shape)
    if output.suffix == ".npy":
        _refuse_image_inside(output, folder)
    return output


def _refuse_image_inside(file: Path, folder: Path) -> None:
    if folder.resolve() in file.resolve().parents:
        raise ValueError(f"{file} would be taken for an image of {folder}: name a file outside it")


def _hash_what_decides(backbone: VisionTransformer, cfg: DictConfig, dataset: ImageDataset, options: str) -> str:
    """Sixteen hex digits of all that decides the rows: weights, settings, names of the images, options."""
    digest = hashlib.sha256(f"{config_hash(cfg)} {options}".encode())
    for name, value in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().data)
    for name in dataset.relatives:
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()[:16]


@torch.inference_mode()
def _compute_rows(
    partial: PartialRows, backbone, cfg, dataset, tokens: str, device, precision: str, skip_bad: bool
) -> None:
    """Computes the rows that `partial` lacks."""
    transform = CentreCrop(cfg.eval.resize, cfg.eval.crop, cfg.data.mean, cfg.data.std)
    more = {"workers": cfg.data.workers, "device": device, "start": partial.next, "skip_bad": skip_bad}
    names, loader = dataset.relatives, make_eval_loader(dataset, cfg.eval.batch_size, **more)
    with (
        Progress(len(names), f"features of {dataset.root}", "image", initial=partial.next) as bar,
        autocast(device, precision),
    ):
        try:
            for batch in loader:
                rows = torch.empty(0, *partial.shape)
                if len(batch.indices):
                    rows = TOKENS[tokens](backbone(transform(batch.canvases[0], batch.sizes))).float().cpu()
                check_finite(rows.flatten(1), [names[i] for i in batch.indices])
                partial.append(rows.numpy(), {names[i]: reason for i, reason in batch.bad.items()})
                bar.update(len(batch.indices) + len(batch.bad))
        except ImageError as error:
            raise ValueError(f"{error} (--skip-bad leaves out what cannot be read)") from None
        except FloatingPointError as error:
            raise ValueError(str(error)) from None
    if len(partial.bad) == len(names):
        name, reason = next(iter(partial.bad.items()))
        raise ValueError(f"{dataset.root}: none of {count_of(len(names), 'image')} can be read, the first: {reason}")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", metavar="WEIGHTS")
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--output", required=True, help=".parquet (needs pyarrow) | .npy (names beside it) | .csv")
    parser.add_argument("--tokens", choices=TOKENS, default="cls", help="which of each image (default: cls)")
    parser.add_argument("--size", type=int, metavar="PX", help="of the shorter side (default: the run's eval.resize)")
    parser.add_argument("--crop", type=int, metavar="PX", help="of the central crop (default: the run's eval.crop)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images (default: the run's eval.batch_size)")
    parser.add_argument("--workers", type=int, metavar="N", help="that decode (default: the run's data.workers)")
    parser.add_argument("--device", help="cpu | cuda | cuda:1 (default: the GPU, where there is one)")
    parser.add_argument("--precision", choices=DTYPES, help="default: fp32 on a CPU, the run's on a GPU")
    parser.add_argument("--skip-bad", action="store_true", help="leave out, and name, the files that cannot be read")
    parser.add_argument("--map", metavar="FILE.png", help="draw the images by the first two principal components")
    given = vars(parser.parse_args(argv))
    names, values = embed(**given)
    output = Path(given["output"])
    beside = f", names in {names_path(output)}" if output.suffix == ".npy" else ""
    print(f"{output}: {count_of(len(names), 'image')}, {' x '.join(map(str, values.shape[1:]))} values each{beside}")


sys.modules[__name__].__class__ = CommandModule  # dinov2.embed(...) is embed(...)

if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
