"""iBOT (Zhou et al. 2022): self-distillation of the CLS token, and of each masked patch from the unmasked crop.

Both losses use one head unless ibot.separate_head. Masks are block-wise; half of the global crops have none. The
teacher's targets, centres and moving average are those of DINO, in `distillation`.
"""

from dinov2.loss import ibot_loss
from dinov2.objectives.distillation import SelfDistillation, StudentOutputs, Targets, cls_losses, total_and_terms
from dinov2.objectives.objective import GLOBAL_CROPS, CropBatch, LossAndTerms


class IBOT(SelfDistillation):
    """Deviation: blocks of masks have at least 4 patches, as in DINOv2, not (side // 3)², which is 16 of 14 x 14."""

    def losses(self, student: StudentOutputs, targets: list[Targets], batch: CropBatch) -> LossAndTerms:
        """L_[CLS], over all pairs of different crops, + L_MIM, over the masked patches."""
        terms_in_all = (len(student.local_cls) + GLOBAL_CROPS - 1) * GLOBAL_CROPS
        terms = cls_losses(student, targets, terms_in_all)
        patches = [target.patches for target in targets]
        terms["ibot_loss"] = ibot_loss(student.patches, patches, batch.mask_weights, crops=len(batch.masks))
        cls = sum(value for name, value in terms.items() if name != "ibot_loss")
        losses = self.cfg.dino.weight * cls + self.cfg.ibot.weight * terms["ibot_loss"]  # [teachers]
        return total_and_terms(losses, terms, targets)
