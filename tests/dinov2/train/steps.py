"""Runs the recorded training steps; shared by the tests of one rank and of several."""

from __future__ import annotations

import numpy as np
import torch
from omegaconf import OmegaConf

from dinov2.config import load_defaults
from dinov2.objectives import DINOv2
from dinov2.objectives.objective import CropBatch
from dinov2.train.anchor import with_anchor
from dinov2.train.optim import apply_schedule, build_optimizer, clip_gradients
from dinov2.train.schedules import StepValues
from tests.conftest import fill_parameters, golden, seeded_input

BATCH, LOCAL = 4, 4
SETTINGS = {
    "train_steps_centering_shared_head": {},
    "train_steps_centering_separate_head": {"ibot": {"separate_head": True}},
    "train_steps_sinkhorn_separate_head": {
        "ibot": {"separate_head": True},
        "teacher": {"centering": "sinkhorn_knopp"},
    },
    "train_steps_anchored_head_current": {"anchor": {"head": "ema"}},
    "train_steps_anchored_head_frozen": {"anchor": {"head": "frozen"}},
}
SMALL = {
    "crops": {"global_size": 64, "local_size": 32, "local_number": LOCAL},
    "model": {"layerscale": 0.1},
    "dino": {"prototypes": 128, "hidden": 64, "bottleneck": 32},
    "ibot": {"prototypes": 160, "hidden": 64, "bottleneck": 32},
}
DISPLAYED = {  # our name: recorded name
    "dino_local_crops_loss": "dino_local_crops_loss",
    "dino_global_crops_loss": "dino_global_crops_loss",
    "koleo_loss": "koleo_loss",
    "ibot_loss": "ibot_loss",
    "anchor_dino_local_crops_loss": "denoised_dino_local_loss",
    "anchor_dino_global_crops_loss": "denoised_dino_global_crops_loss",
    "anchor_ibot_loss": "denoised_ibot_loss",
}


def steps_config(name: str, **overrides):
    return OmegaConf.merge(load_defaults(), SMALL, SETTINGS[name], overrides)


def steps_model(name: str, cfg) -> DINOv2:
    """The model of the recording: filled student, its copy as the teacher, filled anchor with its centres."""
    anchored = "anchored" in name
    model = with_anchor(DINOv2)(cfg, 1.6, own_head=cfg.anchor.head == "frozen") if anchored else DINOv2(cfg)
    fill_parameters(model.student, "student.")
    model.teacher.load_state_dict(model.student.state_dict())
    if anchored:
        fill_parameters(model.anchor, "anchor.")
        fill_parameters(model.anchor_dino_center, "anchor.dino_loss.", buffers=True)
        fill_parameters(model.anchor_ibot_center, "anchor.ibot_loss.", buffers=True)
    return model.train()


def part_of(tensor: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    """Images of one of several equal parts of a crop-major batch of BATCH images."""
    by_crop = tensor.unflatten(0, (-1, BATCH))
    size = BATCH // parts
    return by_crop[:, part * size : (part + 1) * size].flatten(0, 1).contiguous()


def recorded_batch(recorded: dict, step: int, part: int = 0, parts: int = 1, device: str = "cpu") -> CropBatch:
    seeds = recorded[f"step{step}/input_seeds"]
    sizes = [(2 * BATCH, 3, 64, 64), (LOCAL * BATCH, 3, 32, 32), (2 * BATCH, 3, 64, 64)]
    crops = [part_of(seeded_input(seed, size), part, parts) for seed, size in zip(seeds, sizes, strict=True)]
    masks = part_of(torch.from_numpy(recorded[f"step{step}/masks"]), part, parts)
    return CropBatch(*(tensor.to(device) for tensor in (crops[0], crops[1], masks, crops[2])))


def run_steps(
    name: str, model: DINOv2, cfg, part: int = 0, parts: int = 1, micro: int = 1, dtype: torch.dtype | None = None
) -> tuple[list[dict], dict]:
    """Three steps in the published order: terms and gradient norms of each, and the centres that the last step used.

    micro: micro-batches per step. dtype: of autocast, if any. Runs on the model's device.
    """
    recorded, device = golden(f"{name}.npz"), model.dino_center.center.device.type
    optimizer = build_optimizer(model.student, cfg)
    history = []
    for step in range(3):
        lr, weight_decay, momentum, temp, last_layer_lr = recorded[f"step{step}/schedule"].tolist()
        apply_schedule(optimizer, StepValues(lr, weight_decay, momentum, temp, last_layer_lr, backbone_lr=lr))
        optimizer.zero_grad(set_to_none=True)
        terms: dict[str, float] = {}
        for index in range(micro):
            batch = recorded_batch(recorded, step, part * micro + index, parts * micro, device)
            with torch.autocast(device, dtype, enabled=dtype is not None):
                loss, new = model(batch, temp)
            (loss / micro).backward()
            for key, value in new.items():
                terms[key] = terms.get(key, 0.0) + value.item() / micro
        norms = clip_gradients(model.student, cfg.optim.clip_grad)
        optimizer.step()
        # The public code folds a step's logits into the centre when the next step asks for it: its last ones never are.
        centers = {"dino_center": model.dino_center.center.clone(), "ibot_center": model.ibot_center.center.clone()}
        model.finish_step(momentum)
        history.append(terms | {f"grad_norm/{key}": float(value) for key, value in norms.items()})
    return history, centers


def check_history(name: str, history: list[dict[str, float]], skip: tuple[str, ...] = ()) -> None:
    recorded = golden(f"{name}.npz")
    for step, terms in enumerate(history):
        for key, value in terms.items():
            if key not in skip:
                expected = recorded[f"step{step}/{DISPLAYED.get(key, key)}"]
                np.testing.assert_allclose(value, expected, rtol=1e-4 if step == 0 else 1e-2, err_msg=f"{step} {key}")


def final_parameters(model: DINOv2) -> dict[str, torch.Tensor]:
    """Parameters of student and teacher under the recording's names, whole also when they are sharded."""
    return {
        f"{owner}_{module}_{name}": (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu()
        for owner in ("student", "teacher")
        for module, network in getattr(model, owner).items()
        for name, value in network.named_parameters()
    }


def check_final(name: str, state: dict[str, torch.Tensor]) -> None:
    recorded = golden(f"{name}.npz")
    keys = [key.removeprefix("final/") for key in recorded if key.startswith("final/")]
    assert len(keys) >= 5
    for key in keys:
        np.testing.assert_allclose(state[key], recorded[f"final/{key}"], rtol=1e-2, atol=1e-4, err_msg=key)


def check_three_steps(name: str, build=steps_model) -> None:
    """Trains the recorded steps with the model of build(name, cfg): every term, parameter and centre as recorded."""
    cfg = steps_config(name)
    model = build(name, cfg)
    history, centers = run_steps(name, model, cfg)
    check_history(name, history)
    check_final(name, final_parameters(model) | {key: value.cpu() for key, value in centers.items()})
