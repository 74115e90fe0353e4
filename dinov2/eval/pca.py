"""Patch tokens of the same image, clean and noisy, as colours: their first three principal components.

    python -m dinov2.eval.pca run=runs/nct-gauss255

Writes <run>/pca.npz, which the report reads, and <run>/pca.png; the row is the mean cosine similarity of patch tokens
at the same place of the clean and the noisy (or denoised) view. Without a noise there is one view and no row: for
images noisy by nature, and for the oracle unless it is given a noise (noise=gauss255). The images are from val or, if
there is none, from train.
"""

from collections.abc import Iterator

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn

from dinov2.data.eval_transforms import CentreCrop
from dinov2.data.loader import ImageBatch, make_eval_loader
from dinov2.eval import common
from dinov2.eval.features import autocast, check_finite, eval_view, shown_dataset
from utils import distributed
from utils.files import atomic_path
from utils.sampler import spread_evenly


def components(tokens: Tensor) -> np.ndarray:
    """Patch tokens [V, h, w, D] of one image's views → colours uint8 [V, h, w, 3], on one basis for all views.

    Each component is stretched between its 1st and 99th percentile. Each axis is turned so that its largest weight is
    positive.
    """
    rows = tokens.cpu().double().flatten(0, 2)
    rows = rows - rows.mean(dim=0)
    axes = torch.linalg.svd(rows, full_matrices=False).Vh[:3]  # [3, D]
    axes = axes * axes.gather(1, axes.abs().argmax(dim=1, keepdim=True)).sign()
    projected = rows @ axes.T  # [V * h * w, 3]
    low, high = projected.quantile(0.01, dim=0), projected.quantile(0.99, dim=0)
    stretched = ((projected - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return (stretched * 255).round().byte().reshape(*tokens.shape[:3], 3).cpu().numpy()


def spread_over_classes(labels: np.ndarray, count: int) -> list[int]:
    """Indices of the first images of `count` classes spread over all; with fewer classes, of evenly spread images."""
    classes = np.unique(labels)
    if len(classes) < count:
        return spread_evenly(len(labels), count).tolist()
    return [int(np.flatnonzero(labels == classes[i])[0]) for i in spread_evenly(len(classes), count)]


@torch.inference_mode()
def patch_views(backbone: nn.Module, cfg: DictConfig, batch: ImageBatch, names: list[str]) -> tuple[np.ndarray, Tensor]:
    """Cropped pictures uint8 [n, V, S, S, 3] and patch tokens [n, V, h, w, D] of a batch with V views.

    The pictures show the first three channels as red, green and blue, or the first as grey where there are fewer.
    """
    transform = CentreCrop(cfg.eval.resize, cfg.eval.crop, cfg.data.mean, cfg.data.std)
    mean, std = (torch.tensor(list(cfg.data[key])).view(-1, 1, 1) for key in ("mean", "std"))
    pictures, tokens = [], []
    for canvas in batch.canvases:
        images = transform(canvas, batch.sizes)
        with autocast(cfg):
            patches = backbone.get_intermediate_layers(images, n=1, reshape=True)[0].float()  # [n, D, h, w]
        check_finite(patches.flatten(1), names)
        tokens.append(patches.permute(0, 2, 3, 1))
        shown = ((images.cpu() * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
        pictures.append(shown[..., : 3 if shown.shape[-1] >= 3 else 1].expand(-1, -1, -1, 3).numpy())
    return np.stack(pictures, axis=1), torch.stack(tokens, dim=1)


def evaluate(backbone: nn.Module, cfg: DictConfig, job: common.Job) -> Iterator[common.Result]:
    """Yields patch_similarity_<view> for each view besides the clean one, a cosine in [-1, 1]; writes the pictures."""
    own = eval_view(cfg)
    views = (own,) if cfg.noise == "none" else ("clean", "noisy", *(["denoised"] if own == "denoised" else []))
    dataset = shown_dataset(cfg, views)
    chosen = spread_over_classes(dataset.labels, cfg.eval.pca.images)
    dataset.keep(chosen)
    batch = next(iter(make_eval_loader(dataset, len(chosen), device=distributed.device())))
    pictures, tokens = patch_views(backbone, cfg, batch, dataset.relatives)
    colours = np.stack([components(one) for one in tokens])  # [n, V, h, w, 3]
    if distributed.is_main():
        write(job, dataset.relatives, views, pictures, colours)
    for v, view in enumerate(views):
        if views[0] == "clean" and v > 0:
            similarity = torch.nn.functional.cosine_similarity(tokens[:, 0], tokens[:, v], dim=-1)
            yield f"patch_similarity_{view}", float(similarity.mean()), {"view": view, "names": list(dataset.relatives)}


def write(job: common.Job, names: list[str], views: tuple[str, ...], pictures: np.ndarray, colours: np.ndarray) -> None:
    """pca.npz (names [n], views [V], images [n, V, S, S, 3], components [n, V, h, w, 3]) and pca.png."""
    with atomic_path(job.run / "pca.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, names=np.array(names), views=np.array(views), images=pictures, components=colours)
    side = pictures.shape[2]
    rows = []
    for shown, coloured in zip(pictures, colours, strict=True):
        enlarged = [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.NEAREST)) for one in coloured]
        rows.append(np.concatenate([part for pair in zip(shown, enlarged, strict=True) for part in pair], axis=1))
    with atomic_path(job.run / "pca.png") as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, format="PNG")


if __name__ == "__main__":
    common.main("pca", evaluate, __doc__)
