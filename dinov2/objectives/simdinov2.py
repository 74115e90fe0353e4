"""SimDINOv2 (Wu et al. 2025): DINOv2 without prototypes, centring, temperatures or KoLeo.

Student and teacher are compared by the cosine of what their heads give, of the CLS tokens over crops and of each masked
patch; the coding rate of the CLS tokens' embeddings, which is maximised, takes the place of all that forbids collapse.
"""

import torch
from torch import Tensor

from dinov2.loss import Center, coding_rate
from dinov2.objectives.diagnostics import diagnose_embeddings
from dinov2.objectives.distillation import SelfDistillation, StudentOutputs, Targets, total_and_terms
from dinov2.objectives.objective import GLOBAL_CROPS, CropBatch, LossAndTerms


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Half the squared distance of unit vectors.  # [..., d], [..., d] → [...]"""
    return 1 - (first.float() * second.float()).sum(dim=-1)


class SimDINOv2(SelfDistillation):
    """Targets are the teacher's embeddings; the heads end at their bottleneck (dino.prototypes=0).

    Deviation: the coding rate is that of the student's embeddings alone, over the images of all ranks; the public
    code's DINOv2 variant takes their mean with the teacher's, of one rank.
    """

    over_prototypes = False

    def logits_to_targets(
        self, second: Tensor, first: Tensor, patches: Tensor, temp: float, dino: Center, ibot: Center
    ) -> Targets:
        return Targets(torch.stack((second, first)), patches)

    def observe(self, targets: Targets, student: StudentOutputs) -> None:
        if self.observing:
            self.diagnostics = diagnose_embeddings(*student.cls_tokens, *student.global_cls)

    def losses(self, student: StudentOutputs, targets: list[Targets], batch: CropBatch) -> LossAndTerms:
        """Mean distance over all pairs of different crops, and over masked patches, less the coding rate."""
        pairs = (len(student.local_cls) + GLOBAL_CROPS - 1) * GLOBAL_CROPS
        global_pairs = [distance(student.global_cls, target.cls).mean(dim=1).sum() for target in targets]
        terms = {"dino_global_crops_loss": torch.stack(global_pairs) / pairs}  # [teachers]
        if len(student.local_cls):
            local = [distance(student.local_cls[:, None], target.cls).mean(dim=2).sum() for target in targets]
            terms["dino_local_crops_loss"] = torch.stack(local) / pairs
        cls = sum(terms.values())
        patches = [(distance(student.patches, t.patches) * batch.mask_weights).sum() for t in targets]
        terms["ibot_loss"] = torch.stack(patches) / len(batch.masks)
        losses = self.cfg.dino.weight * cls + self.cfg.ibot.weight * terms["ibot_loss"]  # [teachers]
        loss, terms = total_and_terms(losses, terms, targets)
        rates = [coding_rate(crops, self.cfg.coding_rate.epsilon) for crops in student.global_cls]
        terms["coding_rate"] = sum(rates) / GLOBAL_CROPS
        return loss - self.cfg.coding_rate.weight * terms["coding_rate"], terms
