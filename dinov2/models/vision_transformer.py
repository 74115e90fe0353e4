"""The Vision Transformer of DINOv2, with public parameter names. Runs on lists of crops of several sizes at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2.layers.attention import Packing
from dinov2.layers.block import Block
from dinov2.layers.rope import rotation

ARCHS = {  # embedding dim, blocks, heads
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant2": (1536, 40, 24),
}


class PatchEmbed(nn.Module):
    """[B, C, H, W] → [B, h * w, D]. Public name: proj.

    The convolution's weights, but a matrix product: patches that do not overlap are rows of one, and libraries take the
    gradient of the convolution up to 25 times as long (docs/performance.md).
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.proj.in_channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"images of shape {list(x.shape)}: this backbone takes [B, {channels}, H, W]")
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image of {height}x{width} is no multiple of the patch size {self.patch_size}")
        return F.linear(self.patches(x), self.proj.weight.flatten(1), self.proj.bias)

    def patches(self, x: Tensor) -> Tensor:
        """The values of each patch in one row.  # [B, C, H, W] → [B, h * w, C * p * p]"""
        size = self.patch_size
        grid = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C, h, p, w, p]
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class VisionTransformer(nn.Module):
    """ViT with registers, LayerScale and position embeddings: learned and interpolated (DINOv2), or rotary (DINOv3).

    image_size: pixels per side that learned position embeddings are built for.
    """

    def __init__(
        self,
        arch: str = "vit_small",
        image_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        depth: int | None = None,
        registers: int = 0,
        ffn: str = "mlp",
        layerscale: float = 1e-5,
        drop_path: float = 0.0,
        drop_path_uniform: bool = True,
        interpolate_offset: float = 0.1,
        interpolate_antialias: bool = False,
        pos_embed: str = "learned",
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        dim, blocks, heads = ARCHS[arch]
        depth = depth or blocks
        self.embed_dim, self.patch_size, self.registers, self.heads = dim, patch_size, registers, heads
        self.interpolate_offset, self.interpolate_antialias = interpolate_offset, interpolate_antialias
        self.activation_checkpointing = False
        channels = "1 channel" if in_chans == 1 else f"{in_chans} channels"
        self.architecture = f"{arch}, depth {depth}, patch {patch_size}, {channels}"  # of result rows
        rates = [drop_path] * depth if drop_path_uniform else torch.linspace(0, drop_path, depth).tolist()

        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        patches = (image_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, dim)) if pos_embed == "learned" else None
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, ffn, layerscale, rate, norm_eps) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def interpolated_pos_embed(self, height: int, width: int) -> Tensor:
        """Position embeddings for an image of height x width pixels.  # [1, 1 + h * w, D]"""
        assert self.pos_embed is not None
        rows, columns = height // self.patch_size, width // self.patch_size
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if (rows, columns) == (side, side):
            return self.pos_embed
        grid = self.pos_embed[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, side, side]
        if self.interpolate_offset:
            # The published embeddings were trained with scale factors nudged by 0.1, so the samples lie elsewhere than
            # with an exact size; weights and their forward must agree on it.
            scale = ((rows + self.interpolate_offset) / side, (columns + self.interpolate_offset) / side)
            size = {"scale_factor": scale}
        else:
            size = {"size": (rows, columns)}
        grid = F.interpolate(grid, mode="bicubic", antialias=self.interpolate_antialias, **size)
        assert grid.shape[-2:] == (rows, columns)
        patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(self.pos_embed.dtype)
        return torch.cat((self.pos_embed[:, :1], patches), dim=1)

    def embed(self, x: Tensor, masks: Tensor | None) -> Tensor:
        """Tokens before the first block: CLS, registers, patches.  # [B, 1 + R + N, D]"""
        height, width = x.shape[-2:]
        tokens = self.patch_embed(x)
        if masks is not None:
            tokens = torch.where(masks[..., None], self.mask_token.to(tokens.dtype), tokens)
        # shape[0] rather than len(): an exported graph stays open to batches of any size.
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), tokens), dim=1)
        if self.pos_embed is not None:
            tokens = tokens + self.interpolated_pos_embed(height, width)
        if self.register_tokens is not None:
            registers = self.register_tokens.expand(x.shape[0], -1, -1)
            tokens = torch.cat((tokens[:, :1], registers, tokens[:, 1:]), dim=1)
        return tokens

    def pack(self, crops: list[Tensor]) -> Packing:
        """How the tokens of these crops lie in one flat tensor, and the rotations of rotary position embeddings."""
        first, dim, device = 1 + self.registers, self.embed_dim // self.heads, crops[0].device
        grids = [[side // self.patch_size for side in crop.shape[-2:]] for crop in crops]
        groups = tuple((crop.shape[0], first + math.prod(grid)) for crop, grid in zip(crops, grids, strict=True))
        if self.pos_embed is not None:
            return Packing.on(device, groups)
        return Packing.on(device, groups, tuple(rotation(h, w, first, dim, device) for h, w in grids))

    def run_block(self, block: Block, tokens: Tensor, packing: Packing, rows: Tensor | None = None) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(block, tokens, packing, rows, use_reentrant=False)
        return block(tokens, packing, rows)

    def split(self, tokens: Tensor) -> dict[str, Tensor]:
        """Normalised tokens by kind; tokens: [B, 1 + R + N, D] before the last norm."""
        norm = self.norm(tokens)
        first = 1 + self.registers
        return {
            "x_norm_clstoken": norm[:, 0],  # [B, D]
            "x_norm_regtokens": norm[:, 1:first],  # [B, R, D]
            "x_norm_patchtokens": norm[:, first:],  # [B, N, D]
            "x_prenorm": tokens,
        }

    def forward(
        self,
        x: Tensor | list[Tensor],
        masks: Tensor | list[Tensor | None] | None = None,
        masked_indices: Tensor | list[Tensor] | None = None,
    ):
        """x: [B, C, H, W], masks: [B, N] bool or None → dict; lists of both → list of dicts, computed in one pass.

        masked_indices: [M], places in [B * N] (in a list for a list). Given, only these patch tokens leave the last
        block: {"x_norm_clstoken": [B, D], "x_norm_patchtokens": [M, D]}, with the same values as without.
        """
        single = not isinstance(x, list)
        crops, masks = ([x], [masks]) if single else (x, masks or [None] * len(x))
        indices = [masked_indices] if single and masked_indices is not None else masked_indices
        embedded = [self.embed(crop, mask) for crop, mask in zip(crops, masks, strict=True)]
        packing = self.pack(crops)
        rows = None if indices is None else self.masked_rows(packing, indices)
        flat = torch.cat([tokens.flatten(0, 1) for tokens in embedded])  # [T, D]
        for block in self.blocks[:-1]:
            flat = self.run_block(block, flat, packing)
        flat = self.run_block(self.blocks[-1], flat, packing, rows)  # [T, D] or, with rows, [R, D]
        if indices is None:
            parts = zip(flat.split(packing.sizes), packing.groups, masks, strict=True)
            outputs = [self.split(part.view(*group, -1)) | {"masks": mask} for part, group, mask in parts]
        else:
            outputs = self.split_masked(flat, packing, indices)
        return outputs[0] if single else outputs

    def masked_rows(self, packing: Packing, indices: list[Tensor]) -> Tensor:
        """Rows in [T, D] of the CLS tokens and then of the patch tokens at `indices`, group by group.  # [R]"""
        rows, start, first = [], 0, 1 + self.registers
        for (sequences, tokens), chosen in zip(packing.groups, indices, strict=True):
            patches = tokens - first
            rows.append(start + torch.arange(sequences, device=chosen.device) * tokens)
            rows.append(start + chosen // patches * tokens + first + chosen % patches)
            start += sequences * tokens
        return torch.cat(rows)

    def split_masked(self, tokens: Tensor, packing: Packing, indices: list[Tensor]) -> list[dict[str, Tensor]]:
        """Normalised tokens of each crop tensor; tokens [R, D] in the order of `masked_rows`."""
        sizes = []
        for (sequences, _), chosen in zip(packing.groups, indices, strict=True):
            sizes += [sequences, len(chosen)]
        parts = self.norm(tokens).split(sizes)
        names = ("x_norm_clstoken", "x_norm_patchtokens")
        return [dict(zip(names, pair, strict=True)) for pair in zip(parts[::2], parts[1::2], strict=True)]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple:
        """Outputs of the last n blocks (or of the blocks listed): patch tokens [B, N, D], as public DINOv2 gives them.

        reshape: [B, D, h, w] instead. return_class_token: pairs (patches, CLS [B, D]).
        """
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        tokens = self.embed(x, None)
        size, packing = tokens.shape, self.pack([x])
        flat, outputs = tokens.flatten(0, 1), []
        for i, block in enumerate(self.blocks):
            flat = self.run_block(block, flat, packing)
            if i in wanted:
                outputs.append(flat.view(size))
        if norm:
            outputs = [self.norm(out) for out in outputs]
        patches = [out[:, 1 + self.registers :] for out in outputs]
        if reshape:
            rows, columns = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
            patches = [p.transpose(1, 2).reshape(len(x), -1, rows, columns) for p in patches]
        if return_class_token:
            return tuple(zip(patches, [out[:, 0] for out in outputs], strict=True))
        return tuple(patches)


def build_backbone(cfg: DictConfig, drop_path: bool = True) -> VisionTransformer:
    """The backbone of a run's config. drop_path=False for the teacher and for evaluation."""
    model = cfg.model
    return VisionTransformer(
        arch=model.arch,
        image_size=model.pos_embed_size or cfg.crops.global_size,
        patch_size=model.patch_size,
        in_chans=cfg.data.in_chans,
        depth=model.depth,
        registers=model.registers,
        ffn=model.ffn,
        layerscale=model.layerscale,
        drop_path=model.drop_path if drop_path else 0.0,
        drop_path_uniform=model.drop_path_uniform,
        interpolate_offset=model.interpolate_offset,
        interpolate_antialias=model.interpolate_antialias,
        pos_embed=model.pos_embed,
        norm_eps=model.norm_eps,
    )
