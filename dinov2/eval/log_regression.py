"""Logistic regression (scikit-learn) on CLS tokens; C is chosen on a held-out part of the training images.

python -m dinov2.eval.log_regression run=runs/nct-gauss255 checkpoints=best
python -m dinov2.eval.log_regression run=runs/nct-gauss255 eval.log_regression.n_per_class=[1,5]
"""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from dinov2.eval import common
from dinov2.eval.features import Features, extract
from dinov2.eval.knn import summarise
from utils import distributed


def fit_path(train: Features, cs: list[float], max_iter: int) -> Iterator[tuple[float, Any]]:
    """Yields (C, fitted LogisticRegression) for rising C, each started from the previous one: many times faster.

    Raises ValueError if the training features have fewer than two classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, y = train.values.cpu().double().numpy(), train.labels.cpu().numpy()
    if len(np.unique(y)) < 2:
        raise ValueError("logistic regression needs images of two classes; the training images hold one")
    model = LogisticRegression(max_iter=max_iter, warm_start=True)
    for c in sorted(cs):
        model.set_params(C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # n_iter in the row's details tells
            model.fit(x, y)
        yield c, model


def accuracy(model, test: Features) -> float:
    """Top-1 in percent."""
    return float((model.predict(test.values.cpu().double().numpy()) == test.labels.cpu().numpy()).mean() * 100)


def choose_c(train: Features, held_out: Features, cs: list[float], max_iter: int) -> tuple[float, dict[str, float]]:
    """The C with the best top-1 on `held_out` (the smallest of equals), and the top-1 of each C."""
    scores = {c: accuracy(model, held_out) for c, model in fit_path(train, cs, max_iter)}
    return max(scores, key=scores.get), {f"{c:.3g}": value for c, value in scores.items()}


def regress(train: Features, held_out: Features | None, test: Features, cfg) -> tuple[float, dict]:
    """Top-1 (percent) on `test`, and details. held_out=None: a tenth of `train`, used again once C is chosen."""
    settings = cfg.eval.log_regression
    cs = np.logspace(settings.c_min, settings.c_max, settings.c_number).tolist()
    part = train
    if held_out is None:
        order = np.random.default_rng(cfg.seed).permutation(len(train.labels))
        tenth = max(1, len(order) // 10)
        held_out, part = train.take(order[:tenth]), train.take(order[tenth:])
    c, scores = choose_c(part, held_out, cs, settings.max_iter)
    *_, (_, model) = fit_path(train, [value for value in cs if value <= c], settings.max_iter)
    return accuracy(model, test), {
        "C": c,
        "held_out_top1": scores,
        "n_iter": int(model.n_iter_[0]),
        "images": len(test.labels),
    }


def evaluate(backbone: torch.nn.Module, cfg: DictConfig, job: common.Job) -> Iterator[common.Result]:
    """Yields log_regression_top1 (percent), with eval.log_regression.n_per_class also
    log_regression_top1_<n>_per_class.

    Few-shot variants choose C on training images other than the n of each class. Ranks share only the features' work.
    """
    train, test = extract(backbone, cfg, "train"), extract(backbone, cfg, "val")
    if not distributed.is_main():  # features were gathered; scikit-learn has no ranks
        return
    yield "log_regression_top1", *regress(train, None, test, cfg)
    for n in cfg.eval.log_regression.n_per_class:
        values, cs = [], []
        for seed in range(cfg.eval.log_regression.tries):
            few, rest = train.split_per_class(n, seed)
            value, details = regress(few, rest if len(rest.labels) else None, test, cfg)
            values.append(value)
            cs.append(details["C"])
        mean, details = summarise(values)
        yield f"log_regression_top1_{n}_per_class", mean, details | {"C": cs}


if __name__ == "__main__":
    common.main("log_regression", evaluate, __doc__)
