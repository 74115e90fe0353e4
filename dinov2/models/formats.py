"""A backbone's tensors under the names of Hugging Face's and timm's files, and back to the public DINOv2 names.

Hugging Face: as Dinov2Model and Dinov2WithRegistersModel write their files (model.safetensors), by any version of
transformers. timm: as vit_*_patch14_dinov2 and vit_*_patch14_reg4_dinov2 name them.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

State = dict[str, Tensor]

HUGGINGFACE = (  # starts of name parts: public, Hugging Face's. The longer of two that overlap comes first.
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    ("attn.proj.", "attention.output.dense."),
    ("attn.", "attention.attention."),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
    ("mlp.w12.", "mlp.weights_in."),
    ("mlp.w3.", "mlp.weights_out."),
    ("norm.", "layernorm."),
)
QKV = ("query", "key", "value")


def _rename(name: str, pairs) -> str:
    for old, new in pairs:
        name = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{new}", name)
    return name


def to_huggingface(state: State) -> State:
    """Public names → Hugging Face's. A backbone without LayerScale gets one of ones, which theirs always has."""
    split: State = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            split |= {name.replace("qkv", part): v for part, v in zip(QKV, value.chunk(3), strict=True)}
        else:
            split[name] = value
        if name.endswith(("norm1.weight", "norm2.weight")):
            scale = name.replace("norm", "ls").replace("weight", "gamma")
            split |= {} if scale in state else {scale: torch.ones_like(value)}
    # Cloned: the parts of qkv share their memory, which safetensors refuses.
    return {_rename(name, HUGGINGFACE): value.clone() for name, value in split.items()}


def from_huggingface(state: State) -> State:
    """Hugging Face's names → public."""
    back = [(new, old) for old, new in HUGGINGFACE]
    split = {_rename(name, back): value for name, value in state.items()}
    joined: State = {}
    for name, value in split.items():
        if ".attn.query." in name:
            parts = [name.replace("query", part) for part in QKV]
            joined[name.replace("query", "qkv")] = torch.cat([split[part] for part in parts if part in split])
        elif ".attn.key." not in name and ".attn.value." not in name:
            joined[name] = value
    return joined


def to_timm(state: State) -> State:
    """Public names → timm's, which has no mask token and, with registers, no position embedding of the CLS token."""
    swiglu = (("mlp.w12.", "mlp.fc1."), ("mlp.w3.", "mlp.fc2."))
    renamed = {_rename(name, swiglu): v.contiguous() for name, v in state.items() if name != "mask_token"}
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:].contiguous()
    return renamed


def from_timm(state: State) -> State:
    """timm's names → public, with a mask token of zeros: its value at the start of a training."""
    renamed = dict(state) | {"mask_token": torch.zeros_like(state["cls_token"][0])}
    if "reg_token" in renamed:
        renamed["register_tokens"] = renamed.pop("reg_token")
        renamed["pos_embed"] = torch.cat((torch.zeros_like(renamed["cls_token"]), renamed["pos_embed"]), dim=1)
    fc1, fc2 = renamed.get("blocks.0.mlp.fc1.weight"), renamed.get("blocks.0.mlp.fc2.weight")
    if fc1 is not None and fc2 is not None and len(fc1) == 2 * fc2.shape[1]:
        renamed = {_rename(n, (("mlp.fc1.", "mlp.w12."), ("mlp.fc2.", "mlp.w3."))): v for n, v in renamed.items()}
    return renamed


def public_names(state: State) -> State:
    """Tensors of a backbone under public names, whichever of the three forms they come in."""
    if "embeddings.cls_token" in state:
        return from_huggingface(state)
    if "cls_token" in state and "pos_embed" in state and "mask_token" not in state:
        return from_timm(state)
    return state
