"""DINOv2's student and EMA teacher: outputs, targets, losses. Reads top-down like the algorithm.

One step: teacher targets from the unmasked global crops → student outputs from the masked global and the local crops →
DINO (local, global), iBOT and KoLeo losses. Subclasses add teachers through `extra_targets`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dinov2.layers.dino_head import DINOHead
from dinov2.loss import Center, dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from dinov2.models.vision_transformer import build_backbone
from dinov2.train.collapse import Information
from dinov2.train.diagnostics import diagnose
from utils.memory import keep_freed_memory

GLOBAL_CROPS = 2


def read_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Of masks [2 * B, N]: the positions of the masked patches in [2 * B * N], and each one's weight in the loss, the
    inverse of its crop's number.  # both [M]; how many is asked of the masks, so a device had to be waited for"""
    masked = masks.flatten().nonzero().squeeze(1)
    per_crop = masks.sum(dim=1, keepdim=True).clamp(min=1).float()  # [2 * B, 1]
    return masked, (1 / per_crop).expand_as(masks)[masks]


@dataclass
class Batch:
    """One micro-batch of B images; crops are crop-major (all first crops, then all second ones)."""

    global_crops: Tensor  # [2 * B, C, S, S]
    local_crops: Tensor  # [L * B, C, s, s]
    masks: Tensor  # [2 * B, N] bool
    other_global_crops: Tensor | None = None  # [2 * B, C, S, S]: the same crops of a second view of each image
    masked: Tensor | None = None  # [M], with the next of `read_masks`; None: read from the masks
    mask_weights: Tensor | None = None  # [M]

    def __post_init__(self) -> None:
        if self.masked is None:
            self.masked, self.mask_weights = read_masks(self.masks)


@dataclass
class Targets:
    """What a teacher asks of the student."""

    cls: Tensor  # [2, B, K]: of the second, then of the first global crop, so that each meets the student's other crop
    patches: Tensor  # [M, K_ibot]
    weight: float = 1.0  # of this teacher's losses in the total
    prefix: str = ""  # of the names of its terms


@dataclass
class StudentOutputs:
    local_cls: Tensor  # [L, B, K] logits
    global_cls: Tensor  # [2, B, K] logits
    patches: Tensor  # [M, K_ibot] logits of the masked patches
    cls_tokens: Tensor  # [2, B, D] before the head


def build_heads(cfg: DictConfig, dim: int) -> dict[str, nn.Module]:
    """dino_head, and ibot_head when it is separate."""

    def head(section: DictConfig) -> DINOHead:
        return DINOHead(dim, section.prototypes, section.layers, section.hidden, section.bottleneck)

    return {"dino_head": head(cfg.dino)} | ({"ibot_head": head(cfg.ibot)} if cfg.ibot.separate_head else {})


def build_network(cfg: DictConfig, drop_path: bool = False) -> nn.ModuleDict:
    """backbone and heads under their public names."""
    backbone = build_backbone(cfg, drop_path=drop_path)
    return nn.ModuleDict({"backbone": backbone} | build_heads(cfg, backbone.embed_dim))


def tokens_through_heads(network: nn.ModuleDict, *cls: Tensor, patches: Tensor) -> list[Tensor]:
    """Logits of several sets of CLS tokens [n_i, D] and of patch tokens [M, D]; a shared head runs once."""
    if "ibot_head" in network:
        parts = network["dino_head"](torch.cat(cls)).split([len(tokens) for tokens in cls])
        return [*parts, network["ibot_head"](patches)]
    tokens = [*cls, patches]
    return list(network["dino_head"](torch.cat(tokens)).split([len(part) for part in tokens]))


class SSLModel(nn.Module):
    """Student, EMA teacher, centres. `forward` gives the loss to back-propagate and the terms to display."""

    def __init__(self, cfg: DictConfig):
        super().__init__()
        keep_freed_memory()
        self.cfg = cfg
        self.student = build_network(cfg, drop_path=True)
        self.teacher = build_network(cfg)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.dino_center = Center((1, cfg.dino.prototypes))
        self.ibot_center = Center((1, 1, (cfg.ibot if cfg.ibot.separate_head else cfg.dino).prototypes))
        self.observing = False  # when set, forward also fills `diagnostics`
        self.diagnostics: dict[str, float] = {}
        self.information: Information | None = None  # when set, forward adds the teacher's targets to it

    def networks(self) -> list[nn.ModuleDict]:
        """All networks, to be placed and sharded alike."""
        return [self.student, self.teacher]

    def train(self, mode: bool = True) -> SSLModel:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, teacher_temp: float, progress: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss [] and the terms as the public code displays them; progress: share of the schedule done, in [0, 1]."""
        targets = self.teacher_targets(batch, teacher_temp)
        more_targets = self.extra_targets(batch, teacher_temp, progress)
        self.student["dino_head"].observing = self.observing
        student = self.student_outputs(batch)
        self.observe(targets, student)
        loss, terms = self.distillation_losses(student, [targets, *more_targets], batch)
        koleo = self.cfg.dino.koleo_weight * sum(koleo_loss(tokens) for tokens in student.cls_tokens)
        terms["koleo_loss"] = koleo / GLOBAL_CROPS
        return loss + koleo, terms

    def observe(self, targets: Targets, student: StudentOutputs) -> None:
        if self.information is not None:
            self.information.add("cls", targets.cls)
            self.information.add("patches", targets.patches)
        if self.observing:
            bottleneck = self.student["dino_head"].bottleneck.narrow(
                0, student.local_cls[..., 0].numel(), student.global_cls[..., 0].numel()
            )
            self.diagnostics = diagnose(targets.cls, student.global_cls, student.cls_tokens, bottleneck)

    def extra_targets(self, batch: Batch, teacher_temp: float, progress: float) -> list[Targets]:
        """Hook for the targets of further teachers."""
        return []

    @torch.no_grad()
    def teacher_targets(self, batch: Batch, temp: float) -> Targets:
        logits = self.target_logits(self.teacher["backbone"], self.teacher, batch.global_crops, batch.masked)
        return self.logits_to_targets(*logits, temp, self.dino_center, self.ibot_center)

    @torch.no_grad()
    def target_logits(self, backbone: nn.Module, heads: nn.ModuleDict, crops: Tensor, masked: Tensor):
        """Logits of the CLS tokens, crops swapped (two of [B, K]), and of the patches masked for the student [M, K]."""
        out = backbone(crops, read=masked)
        first, second = out["x_norm_clstoken"].chunk(GLOBAL_CROPS)
        return tokens_through_heads(heads, second, first, patches=out["x_norm_patchtokens"])

    @torch.no_grad()
    def logits_to_targets(
        self, second: Tensor, first: Tensor, patches: Tensor, temp: float, dino: Center, ibot: Center
    ) -> Targets:
        cls = torch.cat((second, first))  # [2 * B, K]
        if self.cfg.teacher.centering == "sinkhorn_knopp":
            return Targets(sinkhorn_knopp(cls, temp).view(GLOBAL_CROPS, len(first), -1), sinkhorn_knopp(patches, temp))
        targets = Targets(dino.softmax(cls, temp).view(GLOBAL_CROPS, len(first), -1), ibot.softmax(patches, temp))
        dino.observe(cls)
        ibot.observe(patches)
        return targets

    def student_outputs(self, batch: Batch) -> StudentOutputs:
        images = len(batch.global_crops) // GLOBAL_CROPS
        crops, masks, read = [batch.global_crops], [batch.masks], [batch.masked]
        if len(batch.local_crops):
            crops, masks, read = [*crops, batch.local_crops], [*masks, None], [*read, batch.masked[:0]]
        outputs = self.student["backbone"](crops, masks, read)
        large, cls = outputs[0], outputs[0]["x_norm_clstoken"]
        local_cls = outputs[1]["x_norm_clstoken"] if len(outputs) > 1 else cls[:0]
        patches = large["x_norm_patchtokens"]
        local, large_cls, masked = tokens_through_heads(self.student, local_cls, cls, patches=patches)
        return StudentOutputs(
            local_cls=local.view(len(local) // images, images, local.shape[1]),
            global_cls=large_cls.unflatten(0, (GLOBAL_CROPS, images)),
            patches=masked,
            cls_tokens=cls.unflatten(0, (GLOBAL_CROPS, images)),
        )

    def distillation_losses(self, student: StudentOutputs, targets: list[Targets], batch: Batch):
        """Weighted sum and terms of DINO on local and global crops and iBOT, against the targets of all teachers."""
        cls = [target.cls for target in targets]
        local_crops = len(student.local_cls)
        # At least 1 for the local terms, as published: without local crops the global term is divided by 3, not 2.
        terms_in_all = max(local_crops * GLOBAL_CROPS, 1) + GLOBAL_CROPS * (GLOBAL_CROPS - 1)
        dino = {}  # term → [teachers]
        if local_crops:
            dino["dino_local_crops_loss"] = dino_loss(student.local_cls, cls) / terms_in_all
        # Each global crop meets the other crop's target only; the factor is the number of such pairs.
        pairs = dino_loss(student.global_cls.flatten(0, 1)[None], [target.flatten(0, 1)[None] for target in cls])
        dino["dino_global_crops_loss"] = pairs * GLOBAL_CROPS / terms_in_all
        ibot = ibot_loss(student.patches, [t.patches for t in targets], batch.mask_weights, crops=len(batch.masks))
        losses = self.cfg.dino.weight * sum(dino.values()) + self.cfg.ibot.weight * ibot  # [teachers]
        # The iBOT term is displayed halved, as the public code does.
        displayed = dino | {"ibot_loss": ibot / 2}
        terms = {t.prefix + name: values[i] for i, t in enumerate(targets) for name, values in displayed.items()}
        return sum(target.weight * loss for target, loss in zip(targets, losses, strict=True)), terms

    @torch.no_grad()
    def finish_step(self, momentum: float) -> None:
        """After the optimiser's step: centres take in this step's logits, the teacher follows the student."""
        for module in self.modules():
            if isinstance(module, Center):
                module.update()
        student = [local_tensor(p) for p in self.student.parameters()]
        teacher = [local_tensor(p) for p in self.teacher.parameters()]
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, student, alpha=1 - momentum)

    def checkpoint_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of this model."""
        return self.state_dict()

    def load_checkpoint_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(state)


def local_tensor(parameter: Tensor) -> Tensor:
    """This rank's shard; the tensor itself when it is not sharded."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
