"""What SimCLR, MoCo v3 and SimSiam share: a backbone with a projector, over the two global crops of each image.

Deviation: SimCLR and SimSiam were published with a ResNet-50 and LARS or SGD; here they use a ViT and AdamW, as MoCo v3
and the other objectives do, so that all of them are compared on one backbone.
"""

from omegaconf import DictConfig
from torch import Tensor, nn

from dinov2.layers.projector import Projector
from dinov2.models.vision_transformer import build_backbone
from dinov2.objectives.diagnostics import diagnose_embeddings
from dinov2.objectives.objective import GLOBAL_CROPS, CropBatch, Objective


def build_network(cfg: DictConfig, last_norm: bool, drop_path: bool = False) -> nn.ModuleDict:
    """backbone and projector. last_norm: whether the projector's output is normalised over the batch."""
    backbone, head = build_backbone(cfg, drop_path=drop_path), cfg.projector
    backbone.mask_token.requires_grad_(False)  # nothing is masked: it would never have a gradient
    projector = Projector(backbone.embed_dim, head.layers, head.hidden, head.dim, last_norm)
    return nn.ModuleDict({"backbone": backbone, "projector": projector})


def build_predictor(cfg: DictConfig, last_norm: bool) -> Projector:
    """Two layers that map one crop's embedding to the other's."""
    return Projector(cfg.projector.dim, 2, cfg.projector.predictor, cfg.projector.dim, last_norm)


class TwoCrops(Objective):
    """Compares the two global crops; there are no local crops, no masks and no teacher temperature."""

    @classmethod
    def check(cls, cfg: DictConfig) -> None:
        unused = {"crops.local_number": cfg.crops.local_number, "ibot.mask_probability": cfg.ibot.mask_probability}
        for key, value in unused.items():
            if value:
                raise ValueError(f"objective={cfg.objective} compares two global crops: {key}={value} must be 0")

    def cls_tokens(self, network: nn.ModuleDict, batch: CropBatch) -> tuple[Tensor, Tensor]:
        """CLS tokens of the first and of the second crops.  # two of [B, D]"""
        tokens = network["backbone"](batch.global_crops, masked_indices=batch.masked_indices[:0])["x_norm_clstoken"]
        return tokens.chunk(GLOBAL_CROPS)

    def observe(self, cls: tuple[Tensor, Tensor], embeddings: tuple[Tensor, Tensor]) -> None:
        """embeddings: those that are compared, of both crops [B, d]."""
        if self.observing:
            self.diagnostics = diagnose_embeddings(*cls, *embeddings)
