"""Quality of features without labels: their rank, and how robust they are to the noise.

    python -m dinov2.eval.label_free run=runs/nct checkpoints=all

Uses eval.label_free.images training images in the run's evaluation view. Two versions of each image are compared: two
realisations of the noise, if it is synthetic and the view noisy, else two random crops. docs/without_labels.md says
what each figure tells, and how checkpoints=best uses them.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dinov2.data.dataset import ImageDataset, dataset_from_config
from dinov2.data.eval_transforms import RandomCrop, draw_crops
from dinov2.eval import common
from dinov2.eval.features import eval_view, features_of
from dinov2.eval.knn import CHUNK, nearest
from utils import distributed
from utils.images import denoised_root
from utils.noise import NoiseSpec
from utils.results import is_number, read_json_lines
from utils.sampler import spread_evenly
from utils.spectrum import effective_rank

EPSILON = 1e-7  # as published
INFORMATION = ("information_cls_share", "information_cls_ratio")  # columns of the log; the first one until 0.2.0


def rankme(values: Tensor) -> float:
    """Effective rank of features [N, D], not centred.

    Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by
    Their Rank", ICML 2023.
    """
    return effective_rank(values.cpu().double(), EPSILON)


def neighbours(values: Tensor, k: int) -> Tensor:
    """The k most similar other images of each image, by cosine: int64 [N, k].  # [N, D]"""
    rows = nn.functional.normalize(values, dim=1)
    own = torch.arange(len(rows), device=rows.device)
    found = torch.cat([nearest(rows, rows[start : start + CHUNK], k + 1)[1] for start in range(0, len(rows), CHUNK)])
    others = found != own[:, None]
    others[others.all(dim=1), -1] = False  # an identical image took the image's own place: drop the last
    return found[others].view(len(rows), k)


def neighbour_agreement(first: Tensor, second: Tensor, k: int) -> float:
    """Percentage of an image's k neighbours in the first version that are its neighbours in the second too.

    By chance 100 k / (N - 1).  # [N, D], [N, D]
    """
    a, b = neighbours(first, k), neighbours(second, k)
    return float((a[:, :, None] == b[:, None, :]).any(dim=2).float().mean() * 100)


def chosen_images(cfg: DictConfig, view: str) -> ImageDataset:
    """eval.label_free.images training images, spread evenly over the list, with labels or without."""
    dataset = dataset_from_config(cfg, "train", views=(view,))
    return dataset.keep(spread_evenly(len(dataset), cfg.eval.label_free.images))


def two_versions(
    backbone: nn.Module, cfg: DictConfig, view: str, dataset: ImageDataset, values: Tensor
) -> tuple[str, Tensor, Tensor]:
    """Features of two versions of the images; `values`: under the run's noise. ("noises" | "crops", [N, D], [N, D])"""
    if view == "noisy" and cfg.noise != "none":
        other = OmegaConf.merge(cfg, {"data": {"noise_seed": cfg.data.noise_seed + 1, "storage": "on_the_fly"}})
        return "noises", values, features_of(backbone, cfg, chosen_images(other, view))
    crop = RandomCrop(cfg.eval.crop, cfg.data.mean, cfg.data.std, tuple(cfg.crops.global_scale))
    drawn = torch.stack([draw_crops(len(dataset), torch.Generator().manual_seed(version)) for version in range(2)])
    drawn[..., 0] = 1  # no flips, which some data forbid
    of = partial(features_of, backbone, cfg, dataset)
    first, second = (of(crops=lambda b, d=d: crop(b.canvases[0], b.sizes, d[b.indices])) for d in drawn)
    return "crops", first, second


def denoised_version(backbone: nn.Module, cfg: DictConfig) -> Tensor | None:
    """Features of the denoised copies of the noisy images, if there are any: [N, D]."""
    folder = Path(cfg.data.denoised_root or denoised_root(cfg.data.root, NoiseSpec.parse(cfg.noise)))
    if not folder.is_dir():
        return None
    try:
        copies = chosen_images(cfg, "denoised")
    except ValueError as error:  # of another noise, or incomplete
        distributed.print_on_main(f"label_free: the denoised copies are left out: {error}")
        return None
    return features_of(backbone, cfg, copies)


def centred_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine of an image's two versions, the mean of all images taken away.  # [N, D], [N, D]"""
    first, second = first - first.mean(dim=0), second - second.mean(dim=0)
    return float(nn.functional.cosine_similarity(first, second, dim=1).mean())


def read_information(job: common.Job) -> float | None:
    """Mutual information of image and target when the checkpoint was made, in percent of its maximum."""
    rows = read_json_lines(job.run / "metrics.jsonl")
    found = [(row["iteration"], row[column]) for row in rows for column in INFORMATION if is_number(row.get(column))]
    ratios = [ratio for iteration, ratio in found if iteration <= job.iteration]
    return 100 * ratios[-1] if ratios else None


def evaluate(backbone: nn.Module, cfg: DictConfig, job: common.Job) -> Iterator[common.Result]:
    """Yields rankme and effective_rank of the CLS tokens and neighbour_agreement (percent) of two versions of the
    images; for noisy images with denoised copies also denoised_agreement (percent) and cosine_to_denoised (cosine); and
    information (percent), if the run's log has it.
    """
    view = eval_view(cfg)
    dataset = chosen_images(cfg, view)
    if len(dataset) < 2:
        raise ValueError(f"{cfg.data.root} has a single training image: these figures compare images")
    k = min(cfg.eval.label_free.k, max(1, (len(dataset) - 1) // 2))
    if k < cfg.eval.label_free.k:
        distributed.print_on_main(f"label_free: eval.label_free.k becomes {k}, as there are {len(dataset)} images")
    values = features_of(backbone, cfg, dataset)
    details = {"images": len(dataset), "split": "train"}
    yield "rankme", rankme(values), details
    yield "effective_rank", rankme(values - values.mean(dim=0)), details  # a mean that all share tells nothing apart
    details = details | {"k": k, "by_chance": 100 * k / (len(dataset) - 1)}
    between, first, second = two_versions(backbone, cfg, view, dataset, values)
    yield "neighbour_agreement", neighbour_agreement(first, second, k), details | {"between": between}
    denoised = denoised_version(backbone, cfg) if view == "noisy" else None
    if denoised is not None:
        yield "denoised_agreement", neighbour_agreement(values, denoised, k), details
        yield "cosine_to_denoised", centred_cosine(values, denoised), {"images": len(dataset)}
    if (percent := read_information(job)) is not None:
        yield "information", percent, {}


if __name__ == "__main__":
    common.main("label_free", evaluate, __doc__)
