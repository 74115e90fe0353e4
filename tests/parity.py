"""Prints the table of docs/parity.md: the largest differences between this code and the recorded numbers.

python -m tests.parity
"""

from __future__ import annotations

import numpy as np
import torch

from dinov2.layers.dino_head import DINOHead
from dinov2.loss import Center, dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from dinov2.models.vision_transformer import VisionTransformer
from tests.conftest import fill_parameters, golden, seeded_input
from tests.dinov2.models.test_vision_transformer import SETTINGS as VITS
from tests.dinov2.train.steps import DISPLAYED, SETTINGS, final_parameters, run_steps, steps_config, steps_model


def difference(ours, recorded) -> float:
    return float(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(recorded, dtype=np.float64)).max())


def vit_rows():
    for name, settings in VITS.items():
        r = golden(f"vit_small_{name}.npz")
        vit = fill_parameters(VisionTransformer("vit_small", **settings)).eval()
        x = seeded_input(r["input_seed"], r["input_shape"])
        with torch.no_grad():
            out, masked = vit(x), vit(x, torch.from_numpy(r["mask"]))
            layers = vit.get_intermediate_layers(x, n=[2, 5, 11], return_class_token=True)
        pairs = [
            (out["x_norm_clstoken"], r["cls"]),
            (out["x_norm_patchtokens"].mean(1), r["patch_mean"]),
            (masked["x_norm_clstoken"], r["masked_cls"]),
            (torch.stack([cls for _, cls in layers]), r["inter_cls"]),
        ]
        yield f"ViT-S {name}: tokens, masked tokens, blocks 2/5/11", max(difference(a, b) for a, b in pairs)


def loss_rows():
    r = {key: torch.from_numpy(np.asarray(value)) for key, value in golden("dino_loss.npz").items()}
    temp, center = float(r["teacher_temp"]), Center((1, r["teacher1"].shape[1]))
    center.observe(r["teacher1"])
    center.update()
    student = r["student"].requires_grad_()
    batch = len(r["probs2"]) // 2
    loss = dino_loss(student.view(-1, batch, student.shape[1]), [r["probs2"].view(2, batch, -1)])
    loss.backward()
    pairs = [(center.center, r["center_after_teacher1"]), (sinkhorn_knopp(r["teacher2"], temp), r["sinkhorn_teacher2"]),
             (center.softmax(r["teacher2"], temp), r["probs2"]), (student.grad, r["student_grad"])]  # fmt: skip
    yield "DINO: targets, centre, Sinkhorn-Knopp, gradient", max(difference(a.detach(), b) for a, b in pairs)
    yield "DINO: loss (relative)", difference(loss.detach(), r["loss"]) / float(r["loss"])
    r = {key: torch.from_numpy(np.asarray(value)) for key, value in golden("ibot_loss.npz").items()}
    student = r["student"].requires_grad_()
    loss = ibot_loss(student, [r["probs"]], r["masks_weight"], crops=len(r["masks"]))
    loss.backward()
    yield "iBOT: loss (relative)", difference(loss.detach(), r["loss"]) / float(r["loss"])
    yield "iBOT: gradient", difference(student.grad, r["student_grad"])
    r = golden("koleo_loss.npz")
    x = torch.from_numpy(r["input"]).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    yield "KoLeo: loss, gradient", max(difference(loss.detach(), r["loss"]), difference(x.grad, r["input_grad"]))
    r = golden("dino_head.npz")
    head = fill_parameters(DINOHead(r["input"].shape[1], r["output"].shape[1], hidden=64, bottleneck=32))
    yield "head: output", difference(head(torch.from_numpy(r["input"])).detach(), r["output"])


def step_rows():
    for name in SETTINGS:
        r, cfg = golden(f"{name}.npz"), steps_config(name)
        model = steps_model(name, cfg)
        history, centers = run_steps(name, model, cfg)
        errors = []
        for step, terms in enumerate(history):
            recorded = {key: float(r[f"step{step}/{DISPLAYED.get(key, key)}"]) for key in terms}
            errors.append(max(abs(terms[key] - recorded[key]) / abs(recorded[key]) for key in terms))
        state = final_parameters(model) | centers
        final = max(difference(state[k[6:]], r[k]) for k in r if k.startswith("final/"))
        steps = " / ".join(f"{error:.1e}" for error in errors)
        yield f"{name}: losses and gradient norms, steps 1 / 2 / 3 (relative)", steps
        yield f"{name}: parameters and centres after the steps", final


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| what | largest difference |\n|---|---|")
    for rows in (vit_rows(), loss_rows(), step_rows()):
        for what, error in rows:
            print(f"| {what} | {error if isinstance(error, str) else f'{error:.1e}'} |", flush=True)
