"""Three whole training steps against the recording: losses, gradient norms, centres, parameters after AdamW and EMA."""

import pytest
import torch

from dinov2.objectives import DINOv2
from dinov2.train.anchor import with_anchor
from tests.conftest import golden
from tests.dinov2.train.steps import (
    SETTINGS,
    check_three_steps,
    final_parameters,
    recorded_batch,
    run_steps,
    steps_config,
    steps_model,
)


@pytest.mark.parametrize("name", SETTINGS)
def test_three_steps(name):
    check_three_steps(name)


def test_micro_batches_equal_the_batch():
    name = "train_steps_centering_shared_head"
    cfg = steps_config(name, dino={"koleo_weight": 0.0})  # KoLeo's neighbours are those of one micro-batch
    whole, parts = steps_model(name, cfg), steps_model(name, cfg)
    history, centers = run_steps(name, whole, cfg)
    history_parts, centers_parts = run_steps(name, parts, cfg, micro=2)
    for a, b in zip(history, history_parts, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    torch.testing.assert_close(centers, centers_parts, atol=1e-5, rtol=1e-4)


def test_anchor_without_weight_is_the_baseline_step_to_the_bit():
    name = "train_steps_anchored_head_current"
    cfg = steps_config(name)
    torch.manual_seed(0)
    base = DINOv2(cfg)
    anchored = with_anchor(DINOv2)(cfg, weight=0.0)
    anchored.student.load_state_dict(base.student.state_dict())
    anchored.teacher.load_state_dict(base.teacher.state_dict())
    forwards = []
    anchored.anchor["backbone"].register_forward_hook(lambda *_: forwards.append(1))
    history, _ = run_steps(name, base.train(), cfg)
    history_anchored, _ = run_steps(name, anchored.train(), cfg)
    assert history == history_anchored and not forwards
    state, anchored_state = final_parameters(base), final_parameters(anchored)
    assert all(torch.equal(state[key], anchored_state[key]) for key in state)


def test_anchor_is_frozen_and_not_in_checkpoints():
    name = "train_steps_anchored_head_frozen"
    cfg = steps_config(name)
    model = steps_model(name, cfg)
    before = {key: value.clone() for key, value in model.anchor.state_dict().items()}
    centre = model.anchor_dino_center.center.clone()
    run_steps(name, model, cfg)
    assert all(torch.equal(value, before[key]) for key, value in model.anchor.state_dict().items())
    assert all(p.grad is None for p in model.anchor.parameters())
    assert not torch.equal(centre, model.anchor_dino_center.center)
    state = model.checkpoint_state()
    assert not any(key.startswith("anchor.") for key in state) and "anchor_dino_center.center" in state
    other = steps_model(name, cfg)
    other.load_checkpoint_state(state)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_anchor_weight_follows_its_schedule():
    cfg = steps_config("train_steps_anchored_head_current")
    model = with_anchor(DINOv2)(cfg, weight=2.0, weight_end=0.5)
    assert [round(model.weight_at(p), 6) for p in (0.0, 0.5, 1.0)] == [2.0, 1.25, 0.5]


def test_targets_do_not_depend_on_the_student_mask():
    name = "train_steps_centering_shared_head"
    cfg = steps_config(name)
    model = steps_model(name, cfg)
    batch = recorded_batch(golden(f"{name}.npz"), 0)
    targets = model.teacher_targets(batch, 0.04)
    assert targets.cls.shape == (2, 4, 128) and targets.patches.shape == (int(batch.masks.sum()), 128)
    torch.testing.assert_close(targets.cls.sum(-1), torch.ones(2, 4))
