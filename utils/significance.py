"""Whether two accuracies differ: their difference and its standard error, from the rows of results.

Over seeds where both sides have at least three in common; else over the validation images, paired, where the rows say
which of them were right; else (older rows) as two binomial counts that know nothing of each other.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np

ERRORS = 2.0  # standard errors that a difference must exceed
SEEDS = 3  # fewer say nothing about their spread


@dataclass(frozen=True)
class Difference:
    """Percentage points, and their standard error (None: the rows do not say enough)."""

    points: float
    error: float | None
    over: str  # seeds, paired | seeds | images | counts

    @property
    def sign(self) -> int:
        """1: above; -1: below; 0: cannot be told apart."""
        told = self.error is not None and abs(self.points) > ERRORS * self.error
        return int(np.sign(self.points)) if told else 0

    @property
    def known(self) -> str:
        """How well it is known, in words."""
        return "standard error not known" if self.error is None else f"standard error {self.error:.1f}"

    def __str__(self) -> str:
        return f"{self.points:+.1f}, {self.known}"


def difference(a: list[dict], b: list[dict]) -> Difference:
    """Mean value of the rows `a` less that of `b`: one row of one metric for each seed on either side."""
    points = _mean(a) - _mean(b)
    seeds = [sorted(row["seed"] for row in rows) for rows in (a, b)]
    if len(set(seeds[0]) & set(seeds[1])) >= SEEDS:
        return Difference(points, *_error_over_seeds(a, b, paired=seeds[0] == seeds[1]))
    hits = [_hit_rates(rows) for rows in (a, b)]
    if all(one is not None for one in hits) and len(hits[0]) == len(hits[1]):
        return Difference(points, _standard_error(100 * (hits[0] - hits[1])), "images")
    return Difference(points, _binomial_error(a, b), "counts")


def _mean(rows: list[dict]) -> float:
    return float(np.mean([row["value"] for row in rows]))


def _standard_error(values: np.ndarray) -> float | None:
    """Of the mean of `values` [N]; None for a lone one."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def _error_over_seeds(a: list[dict], b: list[dict], paired: bool) -> tuple[float | None, str]:
    left, right = (np.array([r["value"] for r in sorted(rows, key=lambda r: r["seed"])]) for rows in (a, b))
    if paired:
        return _standard_error(left - right), "seeds, paired"
    return float(np.hypot(_standard_error(left), _standard_error(right))), "seeds"


def _hit_rates(rows: list[dict]) -> np.ndarray | None:
    """Fraction of the seeds that had each validation image right [images]; None where a row does not say."""
    sides = []
    for row in rows:
        correct, images = (row["details"].get(key) for key in ("correct", "images"))
        if not correct or not images:
            return None
        bits = np.unpackbits(np.frombuffer(base64.b64decode(correct), dtype=np.uint8))
        sides.append(bits[:images])
    return np.mean(sides, axis=0) if len({len(side) for side in sides}) == 1 else None


def _binomial_error(a: list[dict], b: list[dict]) -> float | None:
    """Seeds share their validation images, so more of them do not make more images."""
    variance = 0.0
    for rows in (a, b):
        images = rows[0]["details"].get("images")
        if not images:
            return None
        rate = (_mean(rows) / 100 * images + 1) / (images + 2)  # never 0 or 1: no figure is free of error
        variance += rate * (1 - rate) / images
    return 100 * variance**0.5
