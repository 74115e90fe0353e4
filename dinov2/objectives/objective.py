"""What an objective is: all that the trainer asks of it, and nothing else.

An objective owns its networks and turns a batch into a loss. It knows neither data sets nor stages: any of them can be
trained on any view of the images, in any order. `dinov2.objectives.OBJECTIVES` finds one by its name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dinov2.objectives.diagnostics import Information
from utils.memory import keep_freed_memory

GLOBAL_CROPS = 2
LossAndTerms = tuple[Tensor, dict[str, Tensor]]  # [] to back-propagate, and by name what is displayed


def index_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the masked patches among all 2 * B * N, and their weights in the loss.  # [2 * B, N] → [M], [M]

    A patch's weight is 1 / masked patches of its crop. M depends on the values: a GPU would have to be waited for.
    """
    masked_indices = masks.flatten().nonzero().squeeze(1)
    per_crop = masks.sum(dim=1, keepdim=True).clamp(min=1).float()  # [2 * B, 1]
    return masked_indices, (1 / per_crop).expand_as(masks)[masks]


@dataclass
class CropBatch:
    """One micro-batch of B images; crops are crop-major (all first crops, then all second ones)."""

    global_crops: Tensor  # [2 * B, C, S, S]
    local_crops: Tensor  # [L * B, C, s, s]
    masks: Tensor  # [2 * B, N] bool
    other_global_crops: Tensor | None = None  # [2 * B, C, S, S]: the same crops of a second view of each image
    masked_indices: Tensor | None = None  # [M], as mask_weights from `index_masks`; None: computed from the masks
    mask_weights: Tensor | None = None  # [M]

    def __post_init__(self) -> None:
        if self.masked_indices is None:
            self.masked_indices, self.mask_weights = index_masks(self.masks)


class Objective(nn.Module):
    """The protocol. One that is added implements `__init__`, `forward` and, where it differs, the rest.

    student: backbone and heads under their public names; what the optimiser moves.
    teacher: a network that follows the student, or None.
    """

    student: nn.ModuleDict

    def __init__(self, cfg: DictConfig):
        super().__init__()
        self.check(cfg)
        keep_freed_memory()
        self.cfg = cfg
        self.teacher: nn.ModuleDict | None = None
        self.observing = False  # when set, forward also fills `diagnostics`
        self.diagnostics: dict[str, float] = {}  # columns of metrics.jsonl
        self.information: Information | None = None  # when set, forward adds its targets over prototypes, if any, to it

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        """ValueError for settings that the objective has no use for; called before anything is built."""

    def forward(self, batch: CropBatch, teacher_temp: float, progress: float = 0.0) -> LossAndTerms:
        """Loss and terms; progress: fraction of the schedule that is done, in [0, 1]."""
        raise NotImplementedError

    def finish_step(self, momentum: float) -> None:
        """After the optimiser's step; momentum: of a teacher, at this iteration."""

    def trained(self) -> list[nn.ModuleDict]:
        """The networks that training changes: they start from given weights together."""
        return [self.student] if self.teacher is None else [self.student, self.teacher]

    def networks(self) -> list[nn.ModuleDict]:
        """All networks, to be placed and sharded alike."""
        return self.trained()

    def published(self) -> nn.ModuleDict:
        """The network whose backbone is evaluated and written for users."""
        return self.student if self.teacher is None else self.teacher

    def checkpoint_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this objective."""
        return self.state_dict()

    def load_checkpoint_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(state)

    def train(self, mode: bool = True) -> Objective:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's shard; the tensor itself when it is not sharded."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Exponential moving average: teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter."""
    leading = dict(student.named_parameters())
    pairs = [(local_tensor(p), local_tensor(leading[name])) for name, p in teacher.named_parameters()]
    own, led = zip(*pairs, strict=True)
    torch._foreach_mul_(own, momentum)
    torch._foreach_add_(own, led, alpha=1 - momentum)
