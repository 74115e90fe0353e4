"""The losses of all objectives and the two ways of turning teacher logits into targets. Knows no model."""

from dinov2.loss.coding_rate import coding_rate
from dinov2.loss.contrastive import info_nce, negative_cosine, nt_xent
from dinov2.loss.koleo import koleo_loss
from dinov2.loss.prototypes import Center, cross_entropy, dino_loss, ibot_loss, sinkhorn_knopp

__all__ = [
    "Center",
    "coding_rate",
    "cross_entropy",
    "dino_loss",
    "ibot_loss",
    "info_nce",
    "koleo_loss",
    "negative_cosine",
    "nt_xent",
    "sinkhorn_knopp",
]
