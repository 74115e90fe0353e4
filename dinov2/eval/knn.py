"""k nearest neighbours on CLS tokens: the quality of the features without training anything on them.

    python -m dinov2.eval.knn run=runs/nct-gauss255 checkpoints=all
    python -m dinov2.eval.knn run=runs/nct-gauss255 eval.knn.n_per_class=[1,5] eval.knn.tries=5

Cosine similarity to every training image; the k most similar vote for their class with weight exp(similarity /
temperature).
"""

from collections.abc import Iterator

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from dinov2.eval import common
from dinov2.eval.features import Features, extract, gather_hits
from utils import distributed

CHUNK = 1024  # test images at a time
GALLERY_CHUNK = 65536  # training images at a time: 1024 x 65536 similarities are 256 MiB


def nearest(gallery: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar rows of `gallery` [N, D] for each of `queries` [B, D], both L2-normalised.

    Returns similarities [B, k], in falling order, and indices [B, k]. Memory depends on GALLERY_CHUNK, not on N.
    """
    best = queries.new_zeros(len(queries), 0)
    where = torch.zeros(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(gallery), GALLERY_CHUNK):
        similarity = queries @ gallery[start : start + GALLERY_CHUNK].T  # [B, chunk]
        top, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
        best, order = torch.cat([best, top], dim=1).sort(dim=1, descending=True, stable=True)
        where = torch.cat([where, index + start], dim=1).gather(1, order)
        best, where = best[:, :k], where[:, :k]
    return best, where


def vote(similarity: Tensor, labels: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Summed votes of the k nearest: `similarity` and `labels` [B, >= k] ordered nearest first → [B, classes]."""
    # Relative to the nearest neighbour: the same ranking of classes without overflow.
    weights = ((similarity[:, :k] - similarity[:, :1]) / temperature).exp()
    return similarity.new_zeros(len(similarity), classes).scatter_add_(1, labels[:, :k], weights)


def accuracies(train: Features, test: Features, ks: list[int], temperature: float) -> dict[int, dict]:
    """For every k top-1 and top-5 in percent, and which images are right, bool [N]: {k: {"top1", "top5", "hits"}}.

    The ranks share the test images. Raises ValueError if a k is larger than the training set.
    """
    if max(ks) > len(train.labels):
        images = f"the training set of {len(train.labels)} images"
        raise ValueError(f"eval.knn.k={max(ks)} is larger than {images}: give smaller numbers")
    gallery = torch.nn.functional.normalize(train.values, dim=1)
    queries = torch.nn.functional.normalize(test.values, dim=1)[distributed.rank() :: distributed.world_size()]
    truth = test.labels[distributed.rank() :: distributed.world_size()]
    right = torch.zeros(len(ks), 2, len(queries), dtype=torch.bool, device=gallery.device)  # top-1, top-5
    top = min(5, len(train.classes))
    for start in range(0, len(queries), CHUNK):
        similarity, index = nearest(gallery, queries[start : start + CHUNK], max(ks))
        labels, expected = train.labels[index], truth[start : start + CHUNK, None]
        for i, k in enumerate(ks):
            order = vote(similarity, labels, k, temperature, len(train.classes)).topk(top, dim=1).indices
            hit = order == expected  # [B, top]
            right[i, :, start : start + CHUNK] = torch.stack([hit[:, 0], hit.any(dim=1)])
    right = gather_hits(right, len(test.labels))
    top1, top5 = (right.sum(dim=2).cpu().double() * 100 / len(test.labels)).T.tolist()
    return {k: {"top1": top1[i], "top5": top5[i], "hits": right[i, 0]} for i, k in enumerate(ks)}


def evaluate(backbone: torch.nn.Module, cfg: DictConfig, job: common.Job) -> Iterator[common.Result]:
    """Yields knn<k>_top1 (percent); with eval.knn.n_per_class also knn<k>_top1_<n>_per_class, the mean of the tries."""
    train, test = extract(backbone, cfg, "train"), extract(backbone, cfg, "val")
    knn = cfg.eval.knn
    ks = limit_neighbours(list(knn.k), len(train.labels))
    for k, accuracy in accuracies(train, test, ks, knn.temperature).items():
        details = common.accuracy_details(accuracy["hits"], test, backbone, cfg)
        yield f"knn{k}_top1", accuracy["top1"], {"top5": accuracy["top5"]} | details
    for n in knn.n_per_class:
        ks = sorted({k for k in knn.k if k < n} | {n})  # at most n neighbours are of one class
        tries = [accuracies(train.split_per_class(n, s)[0], test, ks, knn.temperature) for s in range(knn.tries)]
        for k in ks:
            yield f"knn{k}_top1_{n}_per_class", *summarise([one[k]["top1"] for one in tries])


def limit_neighbours(ks: list[int], images: int) -> list[int]:
    """Those of `ks` that a training set of so many images allows, at least one; prints what was changed."""
    kept = [k for k in ks if k <= images] or [images]
    if kept != ks:
        distributed.print_on_main(f"knn: eval.knn.k={ks} becomes {kept}, as there are {images} training images")
    return kept


def summarise(values: list[float]) -> tuple[float, dict]:
    """Mean of the tries, and details of a few-shot row: seeds, values and their standard deviation."""
    return float(np.mean(values)), {"seeds": list(range(len(values))), "values": values, "std": float(np.std(values))}


if __name__ == "__main__":
    common.main("knn", evaluate, __doc__)
