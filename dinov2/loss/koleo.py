"""KoLeo: spreads features by pushing each away from its nearest neighbour (Sablayrolles et al. 2018)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def koleo_loss(features: Tensor, eps: float = 1e-8) -> Tensor:
    """-mean log distance to the nearest neighbour among L2-normalised features, in float32.  # [B, D] → []

    A lone feature has no neighbour: the loss is 0, with zero gradient.
    Deviation: the release takes the feature itself as its neighbour then, and its loss is a constant -log(2 eps).
    """
    if len(features) < 2:
        return features.float().sum() * 0.0
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=eps)
        with torch.no_grad():
            similarity = x @ x.t()
            nearest = similarity.fill_diagonal_(-1).argmax(dim=1)  # [B]
        distance = F.pairwise_distance(x, x[nearest], p=2, eps=eps)
        return -torch.log(distance + eps).mean()
