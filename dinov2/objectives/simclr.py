"""SimCLR (Chen et al. 2020, section 2.1): two crops of an image attract each other and repel those of all other images.

x → two augmented crops → backbone h = f(x) → projection z = g(h) → NT-Xent. There is no teacher; h is used afterwards.
"""

import torch
from omegaconf import DictConfig

from dinov2.loss import nt_xent
from dinov2.objectives.objective import CropBatch, LossAndTerms
from dinov2.objectives.two_crops import TwoCrops, build_network


class SimCLR(TwoCrops):
    """Deviation: the public code also normalises the projection over the batch."""

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.student = build_network(cfg, last_norm=False, drop_path=True)

    def forward(self, batch: CropBatch, teacher_temp: float, progress: float = 0.0) -> LossAndTerms:
        cls = self.cls_tokens(self.student, batch)
        # Both crops pass the projector together, as published: its batch normalisation sees 2 N rows.
        first, second = self.student["projector"](torch.cat(cls)).chunk(2)
        self.observe(cls, (first, second))
        loss = nt_xent(first, second, self.cfg.projector.temp)
        return loss, {"nt_xent_loss": loss}
