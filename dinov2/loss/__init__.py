"""The three losses of DINOv2 and the two ways of turning teacher logits into targets. Knows no model."""

from dinov2.loss.koleo import koleo_loss
from dinov2.loss.prototypes import Center, cross_entropy, dino_loss, ibot_loss, sinkhorn_knopp

__all__ = ["Center", "cross_entropy", "dino_loss", "ibot_loss", "koleo_loss", "sinkhorn_knopp"]
