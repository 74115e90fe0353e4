"""DINO (Caron et al. 2021): self-distillation of the CLS token over crops of two sizes.

The teacher's target is softmax((g_t(x) - c) / τ_t) with a running centre c, the student's output softmax(g_s(x) / τ_s).
The teacher is a moving average of the student; both networks are in `distillation`.
"""

from omegaconf import DictConfig

from dinov2.objectives.distillation import SelfDistillation, StudentOutputs, Targets, cls_losses, total_and_terms
from dinov2.objectives.objective import GLOBAL_CROPS, CropBatch, LossAndTerms


class DINO(SelfDistillation):
    """No patch is masked, and the prototypes have unit length (norm_last_layer in the public code)."""

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        super().check(cfg)
        if cfg.ibot.mask_probability:
            given = f"ibot.mask_probability={cfg.ibot.mask_probability}"
            raise ValueError(f"objective=dino masks no patches: {given} must be 0")

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.student["dino_head"].last_layer.weight_g.requires_grad_(False)

    def losses(self, student: StudentOutputs, targets: list[Targets], batch: CropBatch) -> LossAndTerms:
        """Cross-entropy of each of the teacher's two crops with every other crop of the student's, averaged."""
        terms_in_all = (len(student.local_cls) + GLOBAL_CROPS - 1) * GLOBAL_CROPS
        dino = cls_losses(student, targets, terms_in_all)
        return total_and_terms(sum(dino.values()), dino, targets)
