"""DINOv2 (Oquab et al. 2023, section 4): DINO on the CLS tokens, iBOT on the masked patches, and KoLeo."""

from dinov2.loss import ibot_loss, koleo_loss
from dinov2.objectives.distillation import SelfDistillation, StudentOutputs, Targets, cls_losses, total_and_terms
from dinov2.objectives.objective import GLOBAL_CROPS, CropBatch, LossAndTerms


class DINOv2(SelfDistillation):
    """The terms are those that the public code displays."""

    def losses(self, student: StudentOutputs, targets: list[Targets], batch: CropBatch) -> LossAndTerms:
        """Section 4: image-level objective + patch-level objective + KoLeo regularizer."""
        # At least 1 for the local terms, as published: without local crops the global term is divided by 3, not 2.
        terms_in_all = max(len(student.local_cls) * GLOBAL_CROPS, 1) + GLOBAL_CROPS * (GLOBAL_CROPS - 1)
        dino = cls_losses(student, targets, terms_in_all)
        ibot = ibot_loss(student.patches, [t.patches for t in targets], batch.mask_weights, crops=len(batch.masks))
        losses = self.cfg.dino.weight * sum(dino.values()) + self.cfg.ibot.weight * ibot  # [teachers]
        # The iBOT term is displayed halved, as the public code does.
        loss, terms = total_and_terms(losses, dino | {"ibot_loss": ibot / 2}, targets)
        koleo = self.cfg.dino.koleo_weight * sum(koleo_loss(tokens) for tokens in student.cls_tokens)
        terms["koleo_loss"] = koleo / GLOBAL_CROPS
        return loss + koleo, terms
