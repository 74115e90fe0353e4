"""Schedules against recorded values, and what a configuration makes of them."""

import numpy as np
import pytest

from dinov2.config import load_config
from dinov2.train.schedules import Cosine, Schedules
from tests.conftest import golden


def test_cosine_is_the_published_one():
    recorded = golden("cosine_schedule.npz")
    names = [name for name in recorded if name.startswith("args")]
    assert names
    for name in names:
        base, final, total, warmup, start = recorded[name].tolist()
        schedule = Cosine(base, final, int(total), int(warmup), start)
        values = recorded[name.replace("args", "values")]
        assert len(values) > total, "the recording goes on beyond the end"
        assert np.array_equal([schedule(i) for i in range(len(values))], values), name


def schedules(*more: str) -> Schedules:
    length = ["train.epochs=20", "train.epoch_length=10", "train.batch_size=64", "optim.warmup_epochs=4"]
    return Schedules(load_config([*length, *more], validated=False))


def test_learning_rate_scales_with_the_root_of_the_batch():
    values = schedules()
    assert values(39).lr == pytest.approx(0.004 * (64 / 1024) ** 0.5) and values(0).lr == 0
    assert schedules("train.batch_size=256")(39).lr == pytest.approx(2 * values(39).lr)
    assert values(200).lr == 1e-6


def test_each_value_from_its_keys():
    values = schedules("teacher.warmup_temp_epochs=5", "optim.freeze_last_layer_epochs=2", "optim.head_warmup_epochs=3")
    start, end = values(0), values(200)
    assert (start.weight_decay, end.weight_decay) == pytest.approx((0.04, 0.4))
    assert (start.ema_momentum, end.ema_momentum) == pytest.approx((0.992, 1.0))
    assert (start.teacher_temp, values(49).teacher_temp, end.teacher_temp) == pytest.approx((0.04, 0.07, 0.07))
    assert values(25).teacher_temp == pytest.approx(0.04 + 0.03 * 25 / 49)
    for iteration in range(1, 200):
        now = values(iteration)
        assert now.last_layer_lr == (0 if iteration < 20 else now.lr)
        assert now.backbone_lr == (0 if iteration < 30 else now.lr)
