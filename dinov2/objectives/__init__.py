"""What is learned, one file an objective: found by its name in OBJECTIVES (the key `objective`).

dinov2/configs/objectives/<name>.yaml holds its settings. On which images it learns, and when, is none of its business.
"""

from dinov2.objectives.dino import DINO
from dinov2.objectives.dinov2 import DINOv2
from dinov2.objectives.objective import Batch, Objective

OBJECTIVES: dict[str, type[Objective]] = {"dinov2": DINOv2, "dino": DINO}

__all__ = ["DINO", "OBJECTIVES", "Batch", "DINOv2", "Objective"]
