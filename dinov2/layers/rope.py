"""Rotary position embeddings as in DINOv3: queries and keys of the patches are turned by angles of their place."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BASE = 100.0  # of the wavelengths; that of all public DINOv3 weights


def inverse_periods(dim: int, device: torch.device | None = None) -> Tensor:
    """Turns a unit of distance, falling from 1 towards 1 / BASE, of a head of `dim` channels.  # [d / 4]"""
    return BASE ** -(torch.arange(dim // 4, device=device) / (dim // 4))


def rotation(rows: int, columns: int, prefix: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles, for `prefix` tokens that are not turned and then the patches, row by row.

    A patch's place is that of its centre, in [-1, 1] from the image's border to border.  # each [prefix + N, 1, 1, d]
    """
    sides = [2 * (torch.arange(side, device=device) + 0.5) / side - 1 for side in (rows, columns)]
    places = torch.cartesian_prod(*sides)  # [N, 2]
    angles = 2 * math.pi * places[:, :, None] * inverse_periods(dim, device)  # [N, 2, d / 4]
    angles = F.pad(angles.flatten(1).tile(2), (0, 0, prefix, 0))[:, None, None]
    return angles.cos(), angles.sin()


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys turned, values as they are.  # [S, N, 3, H, d] → the same"""
    qk, v = qkv[:, :, :2], qkv[:, :, 2:]
    first, second = qk.chunk(2, dim=-1)
    turned = qk * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned.to(v.dtype), v), dim=2)


def without_key_bias(bias: Tensor) -> Tensor:
    """The bias of queries, keys and values with that of the keys at zero: DINOv3 trains none.  # [3 * D] → the same"""
    query, key, value = bias.chunk(3)
    return torch.cat((query, torch.zeros_like(key), value))
