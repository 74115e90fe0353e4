"""What is learned, one file per objective: found by its name in OBJECTIVES (the key `objective`).

dinov2/configs/objectives/<name>.yaml holds its settings. On which images it learns, and when, is none of its business.
"""

from dinov2.objectives.dino import DINO
from dinov2.objectives.dinov2 import DINOv2
from dinov2.objectives.ibot import IBOT
from dinov2.objectives.mocov3 import MoCoV3
from dinov2.objectives.objective import CropBatch, Objective
from dinov2.objectives.simclr import SimCLR
from dinov2.objectives.simdinov2 import SimDINOv2
from dinov2.objectives.simsiam import SimSiam

OBJECTIVES: dict[str, type[Objective]] = {
    "dinov2": DINOv2,
    "dino": DINO,
    "ibot": IBOT,
    "simclr": SimCLR,
    "mocov3": MoCoV3,
    "simsiam": SimSiam,
    "simdinov2": SimDINOv2,
}

__all__ = ["OBJECTIVES", "CropBatch", "DINOv2", "Objective"]
