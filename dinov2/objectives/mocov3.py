"""MoCo v3 (Chen, Xie, He 2021): queries of one crop meet the keys of the other, which a momentum encoder computes.

q = predictor(projector(f_q(x))), k = momentum encoder(x); loss = ctr(q1, k2) + ctr(q2, k1), where ctr is InfoNCE over
the keys of the batch. As in the public code, the patch projection stays random, and f_q is used afterwards rather than
the momentum encoder.
"""

import torch
from omegaconf import DictConfig
from torch import nn

from dinov2.loss import info_nce
from dinov2.objectives.objective import CropBatch, LossAndTerms, update_ema
from dinov2.objectives.two_crops import TwoCrops, build_network, build_predictor


class MoCoV3(TwoCrops):
    """Deviation: learned position embeddings, not the published fixed sines and cosines."""

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.student = build_network(cfg, last_norm=True, drop_path=True)
        self.student["backbone"].patch_embed.requires_grad_(False)
        self.teacher = build_network(cfg, last_norm=True)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.student["predictor"] = build_predictor(cfg, last_norm=True)

    def forward(self, batch: CropBatch, teacher_temp: float, progress: float = 0.0) -> LossAndTerms:
        cls = self.cls_tokens(self.student, batch)
        queries = tuple(self.student["predictor"](self.student["projector"](tokens)) for tokens in cls)
        with torch.no_grad():
            keys = [self.teacher["projector"](tokens) for tokens in self.cls_tokens(self.teacher, batch)]
        self.observe(cls, queries)
        temp = self.cfg.projector.temp
        loss = info_nce(queries[0], keys[1], temp) + info_nce(queries[1], keys[0], temp)
        return loss, {"contrastive_loss": loss}

    def published(self) -> nn.ModuleDict:
        return self.student

    def finish_step(self, momentum: float) -> None:
        update_ema(self.teacher, self.student, momentum)
