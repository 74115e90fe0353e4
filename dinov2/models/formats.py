"""A backbone's tensors under the names of Hugging Face's and timm's files, and back to the public DINOv2 names.

Hugging Face: as Dinov2Model, Dinov2WithRegistersModel and DINOv3ViTModel write their files (model.safetensors), by any
version of transformers. timm: as vit_*_patch14_dinov2, vit_*_patch14_reg4_dinov2 and vit_*_patch16_dinov3 name them.
A backbone without pos_embed is a DINOv3; its registers have the name that DINOv2 gave them.
"""

import re

import torch
from torch import Tensor

from dinov2.layers.rope import without_key_bias

State = dict[str, Tensor]

# Starts of name parts: public, Hugging Face's. The longer of two that overlap comes first.
HUGGINGFACE_BOTH = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
)
HUGGINGFACE = (
    *HUGGINGFACE_BOTH,
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    ("attn.proj.", "attention.output.dense."),
    ("attn.", "attention.attention."),
    ("mlp.w12.", "mlp.weights_in."),
    ("mlp.w3.", "mlp.weights_out."),
    ("norm.", "layernorm."),
)
QKV = ("query", "key", "value")
HUGGINGFACE_V3 = (
    *HUGGINGFACE_BOTH,
    ("patch_embed.proj.", "embeddings.patch_embeddings."),
    ("blocks.", "layer."),
    ("attn.proj.", "attention.o_proj."),
    ("attn.", "attention."),
    ("mlp.fc1.", "mlp.up_proj."),
    ("mlp.fc2.", "mlp.down_proj."),
)
QKV_V3 = ("q_proj", "k_proj", "v_proj")
TIMM_V3 = (("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"), ("register_tokens", "reg_token"))


def _rename(name: str, pairs) -> str:
    for old, new in pairs:
        name = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{new}", name)
    return name


def to_huggingface(state: State) -> State:
    """Public names → Hugging Face's. A backbone without LayerScale gets one of ones, which theirs always has."""
    learned = "pos_embed" in state
    pairs, parts = (HUGGINGFACE, QKV) if learned else (HUGGINGFACE_V3, QKV_V3)
    split: State = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            split |= {name.replace("qkv", part): v for part, v in zip(parts, value.chunk(3), strict=True)}
        else:
            split[name] = value
        if name.endswith(("norm1.weight", "norm2.weight")):
            scale = name.replace("norm", "ls").replace("weight", "gamma")
            split |= {} if scale in state else {scale: torch.ones_like(value)}
    if not learned:  # no bias of the keys, and a mask token of another shape
        split = {name: value for name, value in split.items() if not name.endswith("k_proj.bias")}
        split["mask_token"] = split["mask_token"][None]
    # Cloned: the parts of qkv share their memory, which safetensors refuses.
    return {_rename(name, pairs): value.clone() for name, value in split.items()}


def from_huggingface(state: State) -> State:
    """Hugging Face's names → public."""
    learned = "embeddings.position_embeddings" in state
    pairs, parts = (HUGGINGFACE, QKV) if learned else (HUGGINGFACE_V3, QKV_V3)
    back = [(new, old) for old, new in pairs]
    split = {_rename(name.removeprefix("model."), back): value for name, value in state.items()}
    if not learned and "mask_token" in split:
        split["mask_token"] = split["mask_token"][0]
    return _join_qkv(split, parts)


def _join_qkv(state: State, parts: tuple[str, str, str]) -> State:
    """The three parts of attn.qkv, which are named on their own, as one; a bias that one of them lacks is zero."""
    first, *others = (f".attn.{part}." for part in parts)
    joined: State = {}
    for name, value in state.items():
        if first in name:
            found = [state.get(name.replace(first, f".attn.{part}.")) for part in parts]
            if name.endswith(".bias"):
                found = [torch.zeros_like(value) if part is None else part for part in found]
            joined[name.replace(first, ".attn.qkv.")] = torch.cat([part for part in found if part is not None])
        elif not any(other in name for other in others):
            joined[name] = value
    return joined


def to_timm(state: State) -> State:
    """Public names → timm's, which has no mask token and, with registers, no position embedding of the CLS token."""
    if "pos_embed" not in state:
        return _to_timm_v3(state)
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


def _to_timm_v3(state: State) -> State:
    """Public names of a DINOv3 → timm's, of vit_*_patch16_dinov3_qkvb."""
    renamed = {_rename(name, TIMM_V3): v.contiguous() for name, v in state.items() if name != "mask_token"}
    for name in [name for name in renamed if name.endswith("qkv.bias")]:
        query, _, value = renamed.pop(name).chunk(3)
        for part, bias in (("q_bias", query), ("v_bias", value)):
            renamed[name.replace("qkv.bias", part)] = bias.clone()
    return renamed


def _from_timm_v3(state: State) -> State:
    """timm's names of a DINOv3, with or without biases of queries and values → public."""
    named = {_rename(name, [(new, old) for old, new in TIMM_V3]): value for name, value in state.items()}
    named["mask_token"] = torch.zeros_like(state["cls_token"][0])
    for name in [name for name in named if name.endswith("attn.qkv.weight")]:
        zeros = named[name].new_zeros(named[name].shape[1])
        query, value = (named.pop(name.replace("qkv.weight", part), zeros) for part in ("q_bias", "v_bias"))
        named[name.replace("weight", "bias")] = torch.cat((query, zeros, value))
    return named


def _from_dinov3(state: State) -> State:
    """Names of the public DINOv3's files → those of DINOv2's. What only its own training reads is left out."""
    unused = ("rope_embed.", "local_cls_norm.")
    kept = {name: v for name, v in state.items() if not name.startswith(unused) and not name.endswith("bias_mask")}
    # The file's bias of the keys is masked there: whatever its value, it is none.
    biases = {name: without_key_bias(v) for name, v in kept.items() if name.endswith("attn.qkv.bias")}
    return {_rename(name, (("storage_tokens", "register_tokens"),)): v for name, v in (kept | biases).items()}


def public_names(state: State) -> State:
    """Tensors of a backbone under public names, whichever of the forms above they come in."""
    if "embeddings.cls_token" in state:
        return from_huggingface(state)
    if "rope_embed.periods" in state:
        return _from_dinov3(state)
    if "cls_token" in state and "mask_token" not in state:
        return from_timm(state) if "pos_embed" in state else _from_timm_v3(state)
    return state
