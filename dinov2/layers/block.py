"""The transformer block on packed tokens: attention and feed-forward residuals, LayerScale, stochastic depth."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2.layers.attention import Attention, Packing

MLP_RATIO = 4  # hidden width of the MLP to that of the tokens
SUBSET_ABOVE = 0.1  # drop-path rate above which skipping dropped sequences pays for gathering the kept ones [DINOv2]


def activated(x: Tensor, activation: Callable[[Tensor], Tensor], linear: nn.Linear) -> Tensor:
    """linear(activation(x)). Of the two a GPU keeps x alone for the backward pass, which computes the activation again:
    where it compiles, the compiler does that (`train.placement.compile_parts`); a CPU has memory rather than time."""
    if not (x.is_cuda and x.requires_grad) or torch.compiler.is_compiling():
        return linear(activation(x))
    return checkpoint(lambda x: linear(activation(x)), x, use_reentrant=False, preserve_rng_state=False)


class Mlp(nn.Module):
    """Public names: fc1, fc2."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.fc1(x), F.gelu, self.fc2)


def silu_gated(x: Tensor) -> Tensor:  # [..., 2 * D] → [..., D]
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class SwiGLU(nn.Module):
    """Public names: w12, w3. Hidden width is 2/3 of the MLP's, rounded up to a multiple of 8."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        width = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * width)
        self.w3 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.w12(x), silu_gated, self.w3)


FFN = {"mlp": Mlp, "swiglu": SwiGLU}


class LayerScale(nn.Module):
    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def drop_sequences(residual: Tensor, packing: Packing, rate: float) -> Tensor:
    """Stochastic depth by mask: each sequence's residual is dropped with probability `rate`, the kept ones rescaled.

    residual: [T, D]
    """
    keep = torch.rand(packing.sequences, device=residual.device) >= rate  # [S]
    scale = keep.to(residual.dtype) / (1 - rate)
    parts = scale.split([sequences for sequences, _ in packing.groups])
    each = [part[:, None].expand(-1, tokens) for part, (_, tokens) in zip(parts, packing.groups, strict=True)]
    return residual * torch.cat([part.flatten() for part in each])[:, None]


def add_subset_residual(
    x: Tensor, packing: Packing, rate: float, residual: Callable[[Tensor, Packing], Tensor]
) -> Tensor:
    """Stochastic depth by subset (DINOv2): the residual of a random fraction 1 - rate of each group's sequences only.

    x: [T, D]. At least one sequence of each group is kept; the residual is rescaled by sequences / kept.
    """
    rows, scales, groups, first = [], [], [], 0
    for sequences, tokens in packing.groups:
        kept = max(int(sequences * (1 - rate)), 1)
        chosen = torch.randperm(sequences, device=x.device)[:kept]
        rows.append(first + (chosen[:, None] * tokens + torch.arange(tokens, device=x.device)).flatten())
        scales.append(torch.full((kept * tokens, 1), sequences / kept, device=x.device))
        groups.append((kept, tokens))
        first += sequences * tokens
    index = torch.cat(rows)  # [T_kept]
    update = residual(x[index], Packing.on(x.device, groups, packing.rotations)) * torch.cat(scales)
    return x.index_add(0, index, update.to(x.dtype))


class Block(nn.Module):
    """Pre-norm transformer block. Public names: norm1, attn, ls1.gamma, norm2, mlp, ls2.gamma."""

    def __init__(self, dim: int, heads: int, ffn: str, layerscale: float, drop_path: float, norm_eps: float = 1e-6):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim, layerscale) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = FFN[ffn](dim, MLP_RATIO * dim)
        self.ls2 = LayerScale(dim, layerscale) if layerscale else nn.Identity()
        self.drop_path = drop_path

    def attention_residual(self, x: Tensor, packing: Packing, rows: Tensor | None = None) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), packing, rows))

    def ffn_residual(self, x: Tensor, packing: Packing) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, packing: Packing, rows: Tensor | None = None) -> Tensor:
        """x: [T, D] → [T, D], or [R, D] of the tokens `rows` [R] alone: the others end as keys and values."""
        if not self.training or self.drop_path == 0:
            kept = x if rows is None else x.index_select(0, rows)
            kept = kept + self.attention_residual(x, packing, rows)
            return kept + self.ffn_residual(kept, packing)
        for residual in (self.attention_residual, self.ffn_residual):
            if self.drop_path > SUBSET_ABOVE:
                x = add_subset_residual(x, packing, self.drop_path, residual)
            else:
                x = x + drop_sequences(residual(x, packing), packing, self.drop_path)
        return x if rows is None else x.index_select(0, rows)
