"""Revisited Oxford and Paris: ground truth and scores (Radenovic et al., CVPR 2018, "Revisiting Oxford and Paris").

For each query the images of the database are easy, hard, junk or wrong. What the three levels count and leave out:

    easy    finds easy          leaves out junk and hard
    medium  finds easy and hard leaves out junk
    hard    finds hard          leaves out junk and easy

Images that are left out are removed from the ranking before positions are counted. A query without a positive image at
a level is skipped.
"""

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch

KAPPAS = (1, 5, 10)
LEVELS = {  # level: (names that are found, names that are left out)
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


@dataclass(frozen=True)
class GroundTruth:
    """Names have no folder and extension; `relevance[q]` maps easy, hard and junk to indices into `images`."""

    images: list[str]
    queries: list[str]
    boxes: list[tuple[float, float, float, float]]  # pixels: left, top, right, bottom; one per query
    relevance: list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class Score:
    """Figures of one level, in [0, 1]; NaN where no query has a positive image."""

    mean_ap: float
    precision_at: dict[int, float]
    average_precisions: list[float]  # [Q], NaN for a skipped query


class _PlainUnpickler(pickle.Unpickler):
    """Loads only lists, dicts, strings and numbers. A pickle that names a class or function is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it names the class {module}.{name}")


def load_ground_truth(path: str | Path) -> GroundTruth:
    """Reads a gnd_<name>.pkl of the official site: {"imlist", "qimlist", "gnd": [{"bbx", "easy", "hard", "junk"}]}.

    Raises ValueError, naming the file, if it holds anything but plain containers, or indices outside its own lists.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no ground truth {path}: put the file of the official Revisited Oxford/Paris site there")
    try:
        with open(path, "rb") as file:
            content = _PlainUnpickler(file).load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is not a ground truth of plain lists and numbers: {error}") from error
    try:
        images, queries = list(content["imlist"]), list(content["qimlist"])
        boxes = [tuple(float(edge) for edge in entry["bbx"]) for entry in content["gnd"]]
        relevance = [
            {kind: np.asarray(entry[kind], dtype=np.int64).reshape(-1) for kind in ("easy", "hard", "junk")}
            for entry in content["gnd"]
        ]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ValueError(f"{path} is not a Revisited Oxford/Paris ground truth: {error!r}") from error
    if len(queries) != len(relevance) or any(len(box) != 4 or not np.isfinite(box).all() for box in boxes):
        raise ValueError(
            f"{path}: {len(queries)} queries, but {len(relevance)} ground truths, or a box without 4 finite edges"
        )
    for name in images + queries:
        if not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path} names an image outside of its folder: {name!r}")
    for query, kinds in zip(queries, relevance, strict=True):
        indices = np.concatenate(list(kinds.values()))
        if len(indices) and (indices.min() < 0 or indices.max() >= len(images)):
            raise ValueError(f"{path}: query {query} refers to an image outside of the {len(images)} listed ones")
    return GroundTruth(images, queries, boxes, relevance)


def average_precision(positions: np.ndarray, positives: int) -> float:
    """Area under the precision-recall curve by trapezoids, as the protocol defines it.

    `positions`: ascending 0-based positions of the found images in a ranking without the left-out ones; `positives`:
    number of images to find.
    """
    found = np.arange(len(positions))
    before = np.where(positions == 0, 1.0, found / np.maximum(positions, 1))  # precision just above each found image
    return float(((before + (found + 1) / (positions + 1)) / 2).sum() / positives)


def score(
    ranks: np.ndarray, relevance: list[dict], kappas: tuple[int, ...] = KAPPAS, ahead: np.ndarray | None = None
) -> dict[str, Score]:
    """mAP and mean precision at `kappas` for the three levels.

    `ranks` [N, Q]: column q lists the database from best to worst for query q. `ahead` [N images, Q]: how many
    distractors lie before each image of the database (see `count_ahead`); None for none.
    """
    return {level: _score_level(ranks, relevance, level, kappas, ahead) for level in LEVELS}


def _score_level(ranks, relevance, level, kappas, ahead) -> Score:
    finds, leaves_out = LEVELS[level]
    aps, precisions = np.full(len(relevance), np.nan), np.full((len(relevance), len(kappas)), np.nan)
    for q, kinds in enumerate(relevance):
        positive = np.concatenate([np.asarray(kinds[kind], dtype=np.int64) for kind in finds])
        if len(positive) == 0:
            continue
        junk = np.concatenate([np.asarray(kinds[kind], dtype=np.int64) for kind in leaves_out])
        is_positive, is_junk = np.isin(ranks[:, q], positive), np.isin(ranks[:, q], junk)
        positions = np.flatnonzero(is_positive) - np.cumsum(is_junk)[is_positive]
        if ahead is not None:
            positions = positions + ahead[ranks[is_positive, q], q]
        aps[q] = average_precision(positions, len(positive))
        for i, kappa in enumerate(kappas):
            # The protocol stops at the last positive image: finding all 3 of 3 counts as 1, not as 3/10.
            k = min(int(positions.max(initial=0)) + 1, kappa)
            precisions[q, i] = (positions < k).sum() / k
    counted = ~np.isnan(aps)
    if not counted.any():
        return Score(float("nan"), dict.fromkeys(kappas, float("nan")), aps.tolist())
    means = precisions[counted].mean(axis=0)
    return Score(float(aps[counted].mean()), {k: float(m) for k, m in zip(kappas, means, strict=True)}, aps.tolist())


def rank(similarity: np.ndarray) -> np.ndarray:
    """Similarities [N, Q] → ranks [N, Q], best first; equal images keep the order of the list."""
    return np.argsort(-similarity, axis=0, kind="stable")


def count_ahead(similarity: np.ndarray, distractors: Iterable[torch.Tensor], queries: torch.Tensor) -> np.ndarray:
    """How many distractors are more similar to a query than each image of the database: [N, Q].

    `similarity` [N, Q] of the database; `distractors` yields chunks [M, D] of L2-normalised features; `queries` [Q, D].
    Positions need only these counts, so any number of distractors takes the memory of one chunk. Scores are exact.
    """
    order = np.argsort(similarity, axis=0, kind="stable")
    thresholds = torch.from_numpy(np.take_along_axis(similarity, order, axis=0)).float().T.contiguous()  # [Q, N] rising
    n = thresholds.shape[1]
    beaten = torch.zeros(len(queries), n + 1, dtype=torch.int64)  # [q, i]: distractors that beat exactly i images
    for chunk in distractors:
        similar = (queries.cpu().float() @ chunk.cpu().float().T).contiguous()  # [Q, M]
        found = torch.searchsorted(thresholds, similar)
        beaten.scatter_add_(1, found, torch.ones_like(found))
    at_least = beaten.flip(1).cumsum(1).flip(1)[:, 1:]  # [Q, N]: distractors that beat the i-th lowest image
    ahead = np.empty(similarity.shape, dtype=np.int64)
    np.put_along_axis(ahead, order, at_least.T.numpy(), axis=0)
    return ahead
