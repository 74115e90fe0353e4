"""Cosine schedules with linear warm-up, one value per iteration (METHOD of DINOv2)."""

from dataclasses import dataclass

import numpy as np
from omegaconf import DictConfig


@dataclass(frozen=True)
class Cosine:
    """Linear from `start` to `base` over `warmup` iterations, then cosine to `final` at `total`; `final` ever after."""

    base: float
    final: float
    total: int
    warmup: int = 0
    start: float = 0.0

    def __call__(self, iteration: int) -> float:
        if iteration >= self.total:
            return float(self.final)
        if iteration < self.warmup:
            return float(np.linspace(self.start, self.base, self.warmup)[iteration])
        angle = np.pi * (iteration - self.warmup) / (self.total - self.warmup)
        return float(self.final + 0.5 * (self.base - self.final) * (1 + np.cos(angle)))


@dataclass(frozen=True)
class StepValues:
    """The schedules' values of one iteration."""

    lr: float
    weight_decay: float
    ema_momentum: float
    teacher_temp: float
    last_layer_lr: float
    backbone_lr: float


class Schedules:
    """All schedules of a stage; its length is train.epochs * train.epoch_length iterations."""

    def __init__(self, cfg: DictConfig):
        length = cfg.train.epoch_length
        total = cfg.train.epochs * length
        optim, teacher = cfg.optim, cfg.teacher
        peak = optim.base_lr * (cfg.train.batch_size / 1024) ** 0.5
        warmup_temp = teacher.warmup_temp_epochs * length
        self.lr = Cosine(peak, optim.min_lr, total, optim.warmup_epochs * length)
        self.weight_decay = Cosine(optim.weight_decay, optim.weight_decay_end, total)
        self.momentum = Cosine(teacher.momentum, teacher.final_momentum, total)
        self.teacher_temp = Cosine(teacher.temp, teacher.temp, warmup_temp, warmup_temp, teacher.warmup_temp)
        self.last_layer_frozen = optim.freeze_last_layer_epochs * length
        self.head_warmup = optim.head_warmup_epochs * length

    def __call__(self, iteration: int) -> StepValues:
        lr = self.lr(iteration)
        return StepValues(
            lr=lr,
            weight_decay=self.weight_decay(iteration),
            ema_momentum=self.momentum(iteration),
            teacher_temp=self.teacher_temp(iteration),
            last_layer_lr=0.0 if iteration < self.last_layer_frozen else lr,
            backbone_lr=0.0 if iteration < self.head_warmup else lr,
        )
