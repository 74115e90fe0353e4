"""Self-distillation over prototypes, what DINO, iBOT and DINOv2 share: an EMA teacher whose targets the student meets.

One step: teacher targets from the unmasked global crops → student outputs from the masked global and the local crops →
`losses`, which each objective writes in its own file. Further teachers join through `extra_targets`.
"""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dinov2.layers.dino_head import DINOHead
from dinov2.loss import Center, dino_loss, sinkhorn_knopp
from dinov2.models.vision_transformer import build_backbone
from dinov2.objectives.diagnostics import diagnose
from dinov2.objectives.objective import GLOBAL_CROPS, CropBatch, LossAndTerms, Objective, update_ema


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

    def head(section: DictConfig) -> nn.Module:
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


def cls_losses(student: StudentOutputs, targets: list[Targets], terms_in_all: int) -> dict[str, Tensor]:
    """DINO on local and global crops over the number of terms, against the targets of all teachers.

    term → [teachers]
    """
    cls, losses = [target.cls for target in targets], {}
    if len(student.local_cls):
        losses["dino_local_crops_loss"] = dino_loss(student.local_cls, cls) / terms_in_all
    # Each global crop meets the other crop's target only; the factor is the number of such pairs.
    pairs = dino_loss(student.global_cls.flatten(0, 1)[None], [target.flatten(0, 1)[None] for target in cls])
    losses["dino_global_crops_loss"] = pairs * GLOBAL_CROPS / terms_in_all
    return losses


def total_and_terms(losses: Tensor, displayed: dict[str, Tensor], targets: list[Targets]) -> LossAndTerms:
    """Weighted sum of the teachers' losses [teachers], and their terms by name."""
    terms = {t.prefix + name: values[i] for i, t in enumerate(targets) for name, values in displayed.items()}
    return sum(target.weight * loss for target, loss in zip(targets, losses, strict=True)), terms


class SelfDistillation(Objective):
    """Student, EMA teacher, centres. `losses` is the objective's own."""

    over_prototypes = True  # else the heads have none, and `logits` are unit embeddings

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        for key, head in (("dino", cfg.dino), ("ibot", cfg.ibot))[: 2 if cfg.ibot.separate_head else 1]:
            if bool(head.prototypes) != cls.over_prototypes:
                what, least = ("learns over", "at least 1") if cls.over_prototypes else ("has no", "0")
                given = f"{key}.prototypes={head.prototypes}"
                raise ValueError(f"objective={cfg.objective} {what} prototypes: {given} must be {least}")

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.student = build_network(cfg, drop_path=True)
        self.teacher = build_network(cfg)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.dino_center = Center((1, cfg.dino.prototypes))
        self.ibot_center = Center((1, 1, (cfg.ibot if cfg.ibot.separate_head else cfg.dino).prototypes))

    def forward(self, batch: CropBatch, teacher_temp: float, progress: float = 0.0) -> LossAndTerms:
        targets = self.teacher_targets(batch, teacher_temp)
        more_targets = self.extra_targets(batch, teacher_temp, progress)
        self.student["dino_head"].observing = self.observing
        student = self.student_outputs(batch)
        self.observe(targets, student)
        return self.losses(student, [targets, *more_targets], batch)

    def losses(self, student: StudentOutputs, targets: list[Targets], batch: CropBatch) -> LossAndTerms:
        """Loss [] and terms, against the targets of all teachers, the EMA teacher's first."""
        raise NotImplementedError

    def observe(self, targets: Targets, student: StudentOutputs) -> None:
        if self.information is not None:
            self.information.add("cls", targets.cls)
            if self.cfg.ibot.mask_probability:  # the same on all ranks
                self.information.add("patches", targets.patches)
        if self.observing:
            bottleneck = self.student["dino_head"].bottleneck.narrow(
                0, student.local_cls[..., 0].numel(), student.global_cls[..., 0].numel()
            )
            self.diagnostics = diagnose(targets.cls, student.global_cls, student.cls_tokens, bottleneck)

    def extra_targets(self, batch: CropBatch, teacher_temp: float, progress: float) -> list[Targets]:
        """Hook for the targets of further teachers."""
        return []

    @torch.no_grad()
    def teacher_targets(self, batch: CropBatch, temp: float) -> Targets:
        logits = self.target_logits(self.teacher["backbone"], self.teacher, batch.global_crops, batch.masked_indices)
        return self.logits_to_targets(*logits, temp, self.dino_center, self.ibot_center)

    @torch.no_grad()
    def target_logits(
        self, backbone: nn.Module, heads: nn.ModuleDict, crops: Tensor, masked_indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the CLS tokens, crops swapped (two of [B, K]), and of the patches masked for the student [M, K]."""
        out = backbone(crops, masked_indices=masked_indices)
        first, second = out["x_norm_clstoken"].chunk(GLOBAL_CROPS)
        second, first, patches = tokens_through_heads(heads, second, first, patches=out["x_norm_patchtokens"])
        return second, first, patches

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

    def student_outputs(self, batch: CropBatch) -> StudentOutputs:
        images = len(batch.global_crops) // GLOBAL_CROPS
        crops, masks, indices = [batch.global_crops], [batch.masks], [batch.masked_indices]
        if len(batch.local_crops):
            crops, masks, indices = [*crops, batch.local_crops], [*masks, None], [*indices, batch.masked_indices[:0]]
        outputs = self.student["backbone"](crops, masks, indices)
        cls, patches = outputs[0]["x_norm_clstoken"], outputs[0]["x_norm_patchtokens"]
        local_cls = outputs[1]["x_norm_clstoken"] if len(outputs) > 1 else cls[:0]
        local_logits, global_logits, patch_logits = tokens_through_heads(self.student, local_cls, cls, patches=patches)
        return StudentOutputs(
            local_cls=local_logits.view(len(local_logits) // images, images, local_logits.shape[1]),
            global_cls=global_logits.unflatten(0, (GLOBAL_CROPS, images)),
            patches=patch_logits,
            cls_tokens=cls.unflatten(0, (GLOBAL_CROPS, images)),
        )

    @torch.no_grad()
    def finish_step(self, momentum: float) -> None:
        """Centres take in this step's logits, the teacher follows the student."""
        for module in self.modules():
            if isinstance(module, Center):
                module.update()
        update_ema(self.teacher, self.student, momentum)
