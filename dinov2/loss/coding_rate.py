"""The coding rate of embeddings (SimDINO): how much of their space they fill. To maximise it forbids collapse."""

import torch
from torch import Tensor

from utils.distributed import gather_rows


def coding_rate(embeddings: Tensor, epsilon: float) -> Tensor:
    """log det(I + d / (m epsilon) Z^T Z) / 2, times (d + m) / (d m), over the m unit embeddings of all ranks.

    embeddings: unit vectors [B, d] of this rank's images → [], the same on all ranks. In float32.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        z = gather_rows(embeddings.float())  # [m, d]
        m, d = z.shape
        gram = z.t() @ z if d <= m else z @ z.t()  # both have the same determinant below
        eye = torch.eye(len(gram), device=z.device)
        factor, _ = torch.linalg.cholesky_ex(eye + d / (m * epsilon) * gram)  # positive definite: no check to wait for
        return factor.diagonal().log().sum() * (d + m) / (d * m)
