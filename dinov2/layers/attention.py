"""Multi-head self-attention over packed sequences, with PyTorch's own kernels.

Sequences of several lengths (global and local crops) travel as one flat tensor of tokens, so that all linear layers run
once. `Packing` says how the tokens belong together; only attention needs to know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.rope import rotate, without_key_bias


@dataclass(frozen=True)
class Packing:
    """How flat tokens [T, D] fall into sequences: consecutive groups of (sequences, tokens of each).

    rotations: of each group, the cosine and sine of its rotary position embeddings; empty for a model without them.
    """

    groups: tuple[tuple[int, int], ...]
    starts: Tensor | None = field(default=None, compare=False)  # [S + 1] int32: cumulative, as varlen kernels want them
    rotations: tuple[tuple[Tensor, Tensor], ...] = field(default=(), compare=False)

    @property
    def sizes(self) -> list[int]:
        """Tokens of each group."""
        return [sequences * tokens for sequences, tokens in self.groups]

    @property
    def sequences(self) -> int:
        return sum(sequences for sequences, _ in self.groups)

    @classmethod
    def on(
        cls,
        device: torch.device,
        groups: Iterable[tuple[int, int]],
        rotations: tuple[tuple[Tensor, Tensor], ...] = (),
    ) -> Packing:
        """With `starts`, where attention asks for them; made there, without a copy that would have to be waited for."""
        groups = tuple(groups)
        if device.type != "cuda" or len(groups) == 1:
            return cls(groups, rotations=rotations)
        parts, first = [], 0
        for sequences, tokens in groups:
            parts.append(torch.arange(sequences, device=device) * tokens + first)
            first += sequences * tokens
        starts = torch.cat((*parts, torch.full((1,), first, device=device))).to(torch.int32)
        return cls(groups, starts, rotations)


# Up to this many tokens, two plain matrix products beat PyTorch's CPU kernel in half precision by 3 to 6 times (they
# use the CPU's bf16 instructions, the kernel does not); beyond it the [N, N] scores would cost too much memory.
MATMUL_TOKENS = 512


def attend_one_size(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with the kernel that is quickest here.  # each [S, H, N, d] → [S, H, N, d]"""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= MATMUL_TOKENS:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attend_per_size(qkv: Tensor, packing: Packing) -> Tensor:
    """Scaled dot-product attention, one call for each group of equal length.

    qkv: [T, 3, H, d] → [T, H * d]
    """
    heads, dim = qkv.shape[2:]
    outputs = []
    for part, (sequences, tokens) in zip(qkv.split(packing.sizes), packing.groups, strict=True):
        q, k, v = part.view(sequences, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)  # each [S, H, N, d]
        out = attend_one_size(q, k, v)  # [S, H, N, d]
        outputs.append(out.transpose(1, 2).reshape(sequences * tokens, heads * dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attend_varlen(qkv: Tensor, packing: Packing) -> Tensor:
    """The same for all lengths in one kernel (CUDA, half precision).

    qkv: [T, 3, H, d] → [T, H * d]
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)  # each [T, H, d]
    longest = max(tokens for _, tokens in packing.groups)
    return varlen_attn(q, k, v, packing.starts, packing.starts, longest, longest).flatten(1)


def rotate_packed(qkv: Tensor, packing: Packing) -> Tensor:
    """Each group's queries and keys turned by its rotations.  # [T, 3, H, d] → the same"""
    parts = zip(qkv.split(packing.sizes), packing.groups, packing.rotations, strict=True)
    turned = [rotate(part.unflatten(0, group), *rotation).flatten(0, 1) for part, group, rotation in parts]
    return turned[0] if len(turned) == 1 else torch.cat(turned)


class Attention(nn.Module):
    """Public names: qkv.{weight,bias}, proj.{weight,bias}."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, packing: Packing, rows: Tensor | None = None) -> Tensor:
        """x: [T, D] → [T, D], or [R, D] of the tokens `rows` [R] alone."""
        bias = without_key_bias(self.qkv.bias) if packing.rotations else self.qkv.bias
        qkv = F.linear(x, self.qkv.weight, bias)  # [T, 3 * D]
        qkv = qkv.view(qkv.shape[0], 3, self.heads, -1)  # [T, 3, H, d]
        qkv = rotate_packed(qkv, packing) if packing.rotations else qkv
        varlen = qkv.is_cuda and qkv.dtype in (torch.bfloat16, torch.float16) and len(packing.groups) > 1
        out = attend_varlen(qkv, packing) if varlen else attend_per_size(qkv, packing)  # [T, D]
        return self.proj(out if rows is None else out.index_select(0, rows))
