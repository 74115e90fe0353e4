"""Instance recognition on Revisited Oxford and Paris: find the images of a landmark by their CLS tokens.

    python -m dinov2.eval.instance_recog run=runs/nct-gauss255 checkpoints=best eval.retrieval.root=datasets
    python -m dinov2.eval.instance_recog run=runs/n2n-gauss255 eval.retrieval.sets=[roxford5k]

    datasets/roxford5k/{jpg/, gnd_roxford5k.pkl}    datasets/rparis6k/{jpg/, gnd_rparis6k.pkl}

Database and queries carry the run's noise, one fixed realisation per image, with separate seeds. A run that is
evaluated on denoised images reads those of python -m Neighbor2Neighbor.denoise --data datasets/roxford5k/jpg. Images
are resized and centre-cropped as everywhere; before that queries are cut to their box, as the revisited protocol
demands, or left whole, as in the code of the paper (eval.retrieval.crop_queries=false); each row says which. The
rankings of a few queries go to <run>/retrieval/ for the report.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn

from dinov2.data.eval_transforms import CentreCrop
from dinov2.data.loader import make_eval_loader
from dinov2.eval import common, revisited
from dinov2.eval.features import autocast, check_finite, cls_tokens, eval_view
from utils import distributed
from utils.files import write_text
from utils.images import (
    IMAGE_EXTENSIONS,
    MAX_PIXELS,
    denoised_root,
    list_images,
    read_image,
    twin,
    visible,
    write_image,
)
from utils.noise import NoiseSpec, keyed_noise, noise_key
from utils.progress import progress
from utils.sampler import spread_evenly

THUMBNAIL = 104  # pixels


class Landmarks:
    """A list of images for the loader: `files` below `root` with noise, cut to `boxes`.

    noise "none" for clean or denoised images. A box is (left, top, right, bottom) in pixels.
    """

    def __init__(
        self, root: Path, files: list[str], noise: NoiseSpec, seed: int, channels: int, boxes: list | None = None,
        max_pixels: int = MAX_PIXELS,
    ):  # fmt: skip
        self.root, self.files, self.noise, self.seed, self.channels = root, files, noise, seed, channels
        self.max_pixels = max_pixels
        self.boxes = boxes or [None] * len(files)
        self.labels = np.full(len(files), -1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def choose(self, index: int, iteration: int = 0) -> tuple[str]:
        return ("noisy",)

    def read(self, index: int, kinds: tuple[str, ...]) -> list[np.ndarray]:
        """The noise is added to the whole image before it is cut, so that the box does not change it."""
        image = read_image(self.root / self.files[index], self.channels, "native", max_pixels=self.max_pixels)
        return [cut_box(keyed_noise(image, self.noise, self.seed, noise_key(self.files[index])), self.boxes[index])]


def cut_box(image: np.ndarray, box: tuple | None) -> np.ndarray:
    """The part of [H, W, C] inside the box, at least one pixel; fractions are rounded outwards."""
    if box is None:
        return image
    height, width = image.shape[:2]
    left, top = min(max(int(box[0]), 0), width - 1), min(max(int(box[1]), 0), height - 1)
    right, bottom = max(int(np.ceil(box[2])), left + 1), max(int(np.ceil(box[3])), top + 1)
    return image[top:bottom, left:right]


def find_files(root: Path, names: list[str]) -> list[str]:
    """File of each name below `root`, with any extension. ValueError names the first missing one and their number."""
    by_name = {noise_key(relative): relative for relative in list_images(root)}
    missing = [name for name in names if name not in by_name]
    if missing:
        first = f"the first {missing[0]} ({', '.join(IMAGE_EXTENSIONS)})"
        raise ValueError(f"{root} lacks {len(missing)} of the {len(names)} images of the ground truth, {first}")
    return [by_name[name] for name in names]


def image_root(cfg: DictConfig, name: str) -> tuple[Path, NoiseSpec]:
    """Folder of a set's images and the noise to add to them, for the run's view. ValueError: no denoised images."""
    retrieval, spec, view = cfg.eval.retrieval, NoiseSpec.parse(cfg.noise), eval_view(cfg)
    root = Path(retrieval.root) / name / "jpg"
    if view != "denoised":
        return root, spec if view == "noisy" else NoiseSpec.parse("none")
    named = retrieval.denoised_root
    folder = Path(named.replace("{set}", name)) if named else denoised_root(root, spec)
    if not folder.is_dir():
        way = "python -m Neighbor2Neighbor.denoise --data <set>/jpg, or name them with eval.retrieval.denoised_root"
        raise ValueError(f"{folder} is missing: this run reads denoised images; write them with {way}")
    return folder, NoiseSpec.parse("none")


@torch.inference_mode()
def descriptors(backbone: nn.Module, cfg: DictConfig, images: Landmarks, desc: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields this rank's (indices [B], L2-normalised CLS tokens [B, D]), for several scales their normalised mean."""
    patch, scales = cfg.model.patch_size, list(cfg.eval.retrieval.scales)
    transforms = []
    for scale in scales:
        crop = max(patch, round(cfg.eval.crop * scale / patch) * patch)
        transforms.append(CentreCrop(max(crop, round(cfg.eval.resize * scale)), crop, cfg.data.mean, cfg.data.std))
    rank, ranks = distributed.rank(), distributed.world_size()
    size = max(1, cfg.eval.batch_size // ranks)
    loader = make_eval_loader(images, size, rank, ranks, cfg.data.workers, distributed.device())
    for batch in progress(loader, total=-(-len(images) // (size * ranks)), desc=desc, unit="batch"):
        total = 0
        for transform in transforms:
            with autocast(cfg):
                tokens = cls_tokens(backbone, transform(batch.canvases[0], batch.sizes))
            total = total + nn.functional.normalize(tokens, dim=1)
        features = nn.functional.normalize(total, dim=1)
        check_finite(features, [images.files[i] for i in batch.indices.tolist()])
        yield batch.indices, features


def all_descriptors(backbone: nn.Module, cfg: DictConfig, images: Landmarks, desc: str) -> Tensor:
    """[N, D] on the CPU, the same on every rank."""
    whole = torch.zeros(len(images), backbone.embed_dim, device=distributed.device())
    for indices, features in descriptors(backbone, cfg, images, desc):
        whole[indices.to(whole.device)] = features
    return distributed.all_reduce_sum(whole).cpu()


def one_per_set(cfg: DictConfig) -> list[DictConfig]:
    """The settings of each of eval.retrieval.sets. Raises ValueError for a name that is not a plain folder name."""
    variants = []
    for name in cfg.eval.retrieval.sets:
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"eval.retrieval.sets={name}: give names of folders below eval.retrieval.root")
        variant = deepcopy(cfg)
        variant.eval.retrieval.sets = [name]
        variants.append(variant)
    return variants


def evaluate(backbone: nn.Module, cfg: DictConfig, job: common.Job) -> Iterator[common.Result]:
    """Yields map_easy, map_medium and map_hard (percent) of the first of eval.retrieval.sets; details have mP@1, 5, 10.

    Levels at which no query has an image to find have no row. Raises ValueError, before anything is computed, if images
    of the ground truth are missing.
    """
    retrieval, name = cfg.eval.retrieval, cfg.eval.retrieval.sets[0]
    truth = revisited.load_ground_truth(Path(retrieval.root) / name / f"gnd_{name}.pkl")
    root, spec = image_root(cfg, name)
    files = find_files(root, truth.images + truth.queries)
    landmarks = partial(Landmarks, channels=cfg.data.in_chans, max_pixels=cfg.data.max_pixels)
    database = landmarks(root, files[: len(truth.images)], spec, retrieval.database_seed)
    boxes = truth.boxes if retrieval.crop_queries else None
    queries = landmarks(root, files[len(truth.images) :], spec, retrieval.query_seed, boxes=boxes)
    distractors = None
    if retrieval.distractors is not None:
        others = Path(retrieval.distractors)
        distractors = landmarks(others, list_images(others), spec, retrieval.database_seed)

    x = all_descriptors(backbone, cfg, database, f"{name} database")  # [N, D]
    q = all_descriptors(backbone, cfg, queries, f"{name} queries")  # [Q, D]
    similarity = (x @ q.T).numpy()
    ranks, ahead = revisited.rank(similarity), None
    if distractors is not None:
        chunks = (features for _, features in descriptors(backbone, cfg, distractors, "distractors"))
        counts = torch.from_numpy(revisited.count_ahead(similarity, chunks, q)).to(distributed.device())
        ahead = distributed.all_reduce_sum(counts).cpu().numpy()  # each rank counted its own part of them
    if distributed.is_main() and retrieval.pictures > 0:
        write_rankings(job.run / "retrieval", cfg, truth, database, queries, ranks)
    shared = {
        "dataset": name,
        "protocol": "queries cut to their box" if retrieval.crop_queries else "whole queries",
        "scales": list(retrieval.scales),
        "distractors": 0 if distractors is None else len(distractors),
    }
    for level, score in revisited.score(ranks, truth.relevance, ahead=ahead).items():
        if not np.isnan(score.mean_ap):
            precisions = {str(k): 100 * value for k, value in score.precision_at.items()}
            counted = sum(not np.isnan(ap) for ap in score.average_precisions)
            yield f"map_{level}", 100 * score.mean_ap, shared | {"mean_precision_at": precisions, "queries": counted}


def write_rankings(
    folder: Path,
    cfg: DictConfig,
    truth: revisited.GroundTruth,
    database: Landmarks,
    queries: Landmarks,
    ranks: np.ndarray,
) -> None:
    """Writes thumbnails and <set>.json for the top of a few queries' rankings, without junk.

    {"dataset", "rankings": [{"query": entry, "found": [entry, ...]}]}, entry {"name", "kind": query | easy | hard |
    wrong, "picture": path below the folder}. The pictures show what the backbone sees, with noise and box.
    """
    name, retrieval = cfg.eval.retrieval.sets[0], cfg.eval.retrieval
    rankings = []
    for q in spread_evenly(len(queries), retrieval.pictures).tolist():
        kinds = {int(i): kind for kind in ("easy", "hard", "junk") for i in truth.relevance[q][kind]}
        shown = [int(i) for i in ranks[:, q] if kinds.get(int(i)) != "junk"][: retrieval.picture_ranks]
        entries = [_write_entry(folder, name, f"{q}", "query", queries, q, truth.queries[q])]
        for place, i in enumerate(shown):
            kind = kinds.get(i, "wrong")
            entries.append(_write_entry(folder, name, f"{q}-{place}", kind, database, i, truth.images[i]))
        rankings.append({"query": entries[0], "found": entries[1:]})
    write_text(folder / f"{name}.json", json.dumps({"dataset": name, "rankings": rankings}))


def _write_entry(folder: Path, name: str, stem: str, kind: str, images: Landmarks, index: int, title: str) -> dict:
    picture = Image.fromarray(visible(images.read(index, ("noisy",))[0]).squeeze())
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    relative = f"{name}/{stem}.png"
    write_image(twin(folder, relative), np.asarray(picture))
    return {"name": title, "kind": kind, "picture": relative}


if __name__ == "__main__":
    common.main("instance_recog", evaluate, __doc__, one_per_set)
