"""Losses between the embeddings of two crops: NT-Xent (SimCLR), InfoNCE (MoCo v3), negative cosine (SimSiam).

Each is the mean over this rank's images; the mean over ranks, which training takes, is the loss of the whole batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.distributed import gather_rows, rank


def _normalise(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.float(), dim=-1)


def nt_xent(first: Tensor, second: Tensor, temp: float) -> Tensor:
    """SimCLR: each of the 2 N crops of all ranks picks its partner among the 2 N - 1 others.

    first, second: embeddings [B, d] of the two crops of this rank's images → []
    """
    with torch.autocast(first.device.type, enabled=False):
        own = torch.cat((_normalise(first), _normalise(second)))  # [2 * B, d]
        parts = [gather_rows(crops) for crops in own.chunk(2)]  # of [N, d]
        place = rank() * len(first) + torch.arange(len(first), device=first.device)
        places = torch.cat((place, place + len(parts[0])))  # of own crops among all
        logits = own @ torch.cat(parts).t() / temp  # [2 * B, 2 * N]
        logits = logits.scatter(1, places[:, None], float("-inf"))
        return F.cross_entropy(logits, places.roll(len(first)))


def info_nce(queries: Tensor, keys: Tensor, temp: float) -> Tensor:
    """MoCo v3: each query picks the key of its image among all ranks' keys; times 2 temp, as in the public code.

    queries, keys: [B, d] → []
    """
    with torch.autocast(queries.device.type, enabled=False):
        logits = _normalise(queries) @ gather_rows(_normalise(keys)).t() / temp  # [B, N]
        place = rank() * len(queries) + torch.arange(len(queries), device=queries.device)
        return 2 * temp * F.cross_entropy(logits, place)


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """SimSiam, eq. 1: -cos(p, z), without gradient for z (eq. 3).  # [B, d], [B, d] → []"""
    return -(_normalise(predictions) * _normalise(targets.detach())).sum(dim=-1).mean()
