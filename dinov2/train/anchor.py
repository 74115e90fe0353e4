"""NCT's anchor: a frozen teacher from the denoised stage looks at the denoised view of the same global crops, and the
student must meet its targets from the noisy view (paper, section on denoised regularisation).

total = DINOv2 loss + λ * (DINO local + DINO global + iBOT against the frozen teacher's targets), with its own centres.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dinov2 import checkpoint
from dinov2.loss import Center
from dinov2.models.pretrained import load_pretrained
from dinov2.objectives import OBJECTIVES
from dinov2.objectives.distillation import SelfDistillation, Targets, build_network
from dinov2.objectives.objective import CropBatch


class Anchored(SelfDistillation):
    """What `with_anchor` adds to an objective: the anchor's terms, which are the objective's own against its targets.

    weight: λ; weight_end: λ at the end of the stage (cosine between), or None.
    own_head: the frozen tokens go through the frozen head (anchor.head: frozen) instead of the EMA teacher's (ema).
    The frozen network is no sub-module in checkpoints: it is read again from the run that it came from.
    """

    def __init__(self, cfg: DictConfig, weight: float, weight_end: float | None = None, own_head: bool = False):
        super().__init__(cfg)
        self.weight, self.weight_end, self.own_head = weight, weight_end, own_head
        self.anchor = build_network(cfg).requires_grad_(False)
        self.anchor_dino_center = Center(tuple(self.dino_center.center.shape))
        self.anchor_ibot_center = Center(tuple(self.ibot_center.center.shape))

    def train(self, mode: bool = True) -> Anchored:
        super().train(mode)
        self.anchor.eval()
        return self

    def weight_at(self, progress: float) -> float:
        if self.weight_end is None:
            return self.weight
        return self.weight_end + 0.5 * (self.weight - self.weight_end) * (1 + math.cos(math.pi * progress))

    def extra_targets(self, batch: CropBatch, teacher_temp: float, progress: float) -> list[Targets]:
        weight = self.weight_at(progress)
        if weight == 0:
            return []
        assert batch.other_global_crops is not None
        with torch.no_grad():
            heads = self.anchor if self.own_head else self.teacher
            logits = self.target_logits(self.anchor["backbone"], heads, batch.other_global_crops, batch.masked_indices)
            targets = self.logits_to_targets(*logits, teacher_temp, self.anchor_dino_center, self.anchor_ibot_center)
        return [replace(targets, weight=weight, prefix="anchor_")]

    def checkpoint_state(self) -> dict[str, Tensor]:
        return {name: value for name, value in super().checkpoint_state().items() if not name.startswith("anchor.")}

    def load_checkpoint_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(state | {f"anchor.{name}": value for name, value in self.anchor.state_dict().items()})

    def networks(self) -> list[nn.ModuleDict]:
        return [*super().networks(), self.anchor]

    def load_anchor(self, source: checkpoint.Checkpoint) -> None:
        """The frozen network becomes the teacher of a denoised run's checkpoint; the centres start from that run's."""
        state = {f"teacher.{name}": value for name, value in self.anchor.state_dict().items()}
        state["dino_center.center"] = self.anchor_dino_center.center
        state["ibot_center.center"] = self.anchor_ibot_center.center
        checkpoint.load(source, {"model": state})

    def load_anchor_file(self, path: Path) -> None:
        """The frozen network's backbone becomes that of a file of weights; its tokens go through the teacher's head."""
        load_pretrained(self.anchor["backbone"], path)


@cache
def with_anchor(objective: type[SelfDistillation]) -> type[Anchored]:
    """The objective with an anchor."""
    return type(f"Anchored{objective.__name__}", (Anchored, objective), {})


def can_be_anchored(name: str) -> bool:
    """Whether the objective of this name learns from a teacher's targets, which an anchor can give too."""
    return issubclass(OBJECTIVES[name], SelfDistillation)
