"""iBOT (Zhou et al. 2022): self-distillation of the CLS token, and of each masked patch from its own unmasked view.

Both losses go through one head (section 3.2) unless ibot.separate_head; masks are block-wise, half of the global crops
none (appendix). The teacher's targets, centres and moving average are those of DINO, in `distillation`.
"""

from __future__ import annotations

from dinov2.loss import ibot_loss
from dinov2.objectives.distillation import SelfDistillation, StudentOutputs, Targets, cls_losses, total_and_terms
from dinov2.objectives.objective import GLOBAL_CROPS, CropBatch, LossAndTerms


class IBOT(SelfDistillation):
    def losses(self, student: StudentOutputs, targets: list[Targets], batch: CropBatch) -> LossAndTerms:
        """Section 3.1: the sum of L_[CLS] (eq. 2, over all pairs of different crops) and L_MIM (eq. 3)."""
        terms_in_all = (len(student.local_cls) + GLOBAL_CROPS - 1) * GLOBAL_CROPS
        terms = cls_losses(student, targets, terms_in_all)
        patches = [target.patches for target in targets]
        terms["ibot_loss"] = ibot_loss(student.patches, patches, batch.mask_weights, crops=len(batch.masks))
        cls = sum(value for name, value in terms.items() if name != "ibot_loss")
        losses = self.cfg.dino.weight * cls + self.cfg.ibot.weight * terms["ibot_loss"]  # [teachers]
        return total_and_terms(losses, terms, targets)
