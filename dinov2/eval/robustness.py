"""Robustness: one checkpoint under all nine noises and on clean images, by kNN and a cached linear probe.

    python -m dinov2.eval.robustness run=runs/nct-gauss255 checkpoints=best

Training and validation images of kNN and probe have the same noise, as everywhere; only the backbone was trained under
another one. No denoiser is used for any method.
"""

from collections.abc import Iterator
from copy import deepcopy

from omegaconf import DictConfig
from torch import nn

from dinov2.eval import common, knn, linear
from utils.noise import NoiseSpec


def one_per_noise(cfg: DictConfig) -> list[DictConfig]:
    """The run's settings under each of eval.robustness.noises. Raises ValueError for an unknown noise."""
    variants = []
    for noise in cfg.eval.robustness.noises:
        variant = deepcopy(cfg)
        variant.noise = str(NoiseSpec.parse(noise))
        variant.data.storage = "on_the_fly"  # the trees on disk are of the run's own noise
        variant.eval.view = "clean" if variant.noise == "none" else "noisy"
        variant.eval.linear.protocol = "cached"
        variant.eval.knn.n_per_class = []
        variant.eval.robustness.noises = [variant.noise]
        variants.append(variant)
    return variants


def evaluate(backbone: nn.Module, cfg: DictConfig, job: common.Job) -> Iterator[common.Result]:
    """Yields robustness_knn<k>_top1 and robustness_linear_top1 (percent) under cfg.noise."""
    for evaluator in (knn, linear):
        for metric, value, details in evaluator.evaluate(backbone, cfg, job):
            yield f"robustness_{metric}", value, details


if __name__ == "__main__":
    common.main("robustness", evaluate, __doc__, one_per_noise)
