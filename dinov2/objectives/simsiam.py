"""SimSiam (Chen, He 2021): a predictor maps one crop's embedding to the other's, whose gradient is stopped.

z = projector(f(x)), p = predictor(z); loss = D(p1, z2) / 2 + D(p2, z1) / 2 with D the negative cosine and z without
gradient (section 3, eq. 1 to 4). There are neither negatives nor a teacher; f itself is used afterwards.
"""

from omegaconf import DictConfig

from dinov2.loss import negative_cosine
from dinov2.objectives.objective import CropBatch, LossAndTerms
from dinov2.objectives.two_crops import TwoCrops, build_network, build_predictor


class SimSiam(TwoCrops):
    """Deviation: the predictor's learning rate decays like all others; the published one is constant."""

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.student = build_network(cfg, last_norm=True, drop_path=True)
        self.student["predictor"] = build_predictor(cfg, last_norm=False)

    def forward(self, batch: CropBatch, teacher_temp: float, progress: float = 0.0) -> LossAndTerms:
        cls = self.cls_tokens(self.student, batch)
        z = tuple(self.student["projector"](tokens) for tokens in cls)
        p = [self.student["predictor"](embeddings) for embeddings in z]
        self.observe(cls, z)
        loss = negative_cosine(p[0], z[1]) / 2 + negative_cosine(p[1], z[0]) / 2
        return loss, {"cosine_loss": loss}
