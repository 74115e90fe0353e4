"""What a file of backbone weights holds: its tensors under public names, and the settings that follow from them.

A .pth of this project, of Meta's DINOv2 or DINOv3; a folder or .safetensors of Hugging Face or timm.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinov2 import checkpoint
from dinov2.layers.rope import BASE, inverse_periods
from dinov2.models.formats import public_names
from dinov2.models.vision_transformer import ARCHS

SAFETENSORS = "model.safetensors"  # in a folder of Hugging Face or timm
TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # of Hugging Face's models
NEEDED = ("patch_embed.proj.weight", "cls_token", "blocks.0.norm1.weight")


@dataclass(frozen=True)
class Weights:
    """A backbone from a file."""

    path: Path
    state: dict[str, Tensor]  # under public names
    model: dict[str, object]  # keys of a config's section model that follow from them
    images: dict[str, object]  # what its folder says of images: mean, std, resize, crop; empty where it says nothing

    @property
    def channels(self) -> int:
        return self.state["patch_embed.proj.weight"].shape[1]

    @property
    def image_size(self) -> int | None:
        """Pixels per side that the position embeddings are built for; None where they are computed."""
        if "pos_embed" not in self.state:
            return None
        return grid_side(self.state["pos_embed"]) * self.model["patch_size"]


def grid_side(pos_embed: Tensor) -> int:
    """Patches per side of learned position embeddings [1, 1 + N, D]."""
    patches = pos_embed.shape[1] - 1
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"its position embeddings, {patches} patches, are no square grid")
    return side


def read_weights(path: Path | str) -> Weights:
    """The backbone in a file or folder. ValueError for what is unreadable, no backbone, or of an unknown kind."""
    path = Path(path)
    file = path / SAFETENSORS if path.is_dir() else path
    content = _load_tensors(file)
    teacher = content.get("teacher") if isinstance(content, dict) else None
    state = (content if isinstance(content, dict) else {}) if teacher is None else teacher
    named = {name.removeprefix("backbone."): v for name, v in state.items() if name.startswith("backbone.")}
    described = _read_json(file.with_name("config.json")) if file.suffix == ".safetensors" else {}
    try:
        public = public_names(named or dict(state))
        if missing := [name for name in NEEDED if name not in public]:
            raise ValueError(f"it has no {missing[0]}")
        _check_known_kind(state, described)
        model = _derive_model_keys(public, described, own=teacher is not None)
    except ValueError as error:
        raise ValueError(f"{path} holds no backbone that can be used: {error}") from None
    images = _derive_image_keys(described, _read_json(file.with_name("preprocessor_config.json")))
    return Weights(path, public, model, images)


def read_model_keys(path: Path | str) -> dict[str, object]:
    """The keys of a config's section model that a file of weights decides."""
    return read_weights(path).model


def _load_tensors(file: Path) -> dict:
    if file.suffix != ".safetensors":
        try:
            return checkpoint.load_tensors(file)
        except OSError as error:
            raise ValueError(f"{file} can't be read: {error.strerror}") from None
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} can't be read as a safetensors file: {str(error).splitlines()[0]}") from None


def _read_json(file: Path) -> dict:
    """The content of a JSON file beside the weights; empty where there is none."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _check_known_kind(state: dict[str, Tensor], described: dict) -> None:
    """ValueError for what the tensors' names and shapes do not show, and this project's backbone does otherwise."""
    known = {"hidden_act": ("gelu",), "model_type": TYPES, "rope_theta": (BASE,)}
    for key, values in known.items():
        if described.get(key, values[0]) not in values:
            raise ValueError(f"its config.json has {key} {described[key]}, known is {', '.join(map(str, values))}")
    dim, *_, heads = next((sizes for sizes in ARCHS.values() if sizes[0] == described.get("hidden_size")), (0, 0))
    if dim and described.get("num_attention_heads", heads) != heads:
        raise ValueError(f"its config.json has {described['num_attention_heads']} heads, known are {heads} of {dim}")
    periods = state.get("rope_embed.periods")
    if periods is not None and not torch.allclose(1 / periods.float(), inverse_periods(4 * len(periods)), rtol=0.01):
        raise ValueError(f"its rotary position embeddings have other periods than those of base {BASE:.0f}")


def _derive_model_keys(state: dict[str, Tensor], described: dict, own: bool) -> dict[str, object]:
    """The keys of a config's section model that follow from a backbone's tensors.

    own: a file of this project, which interpolates position embeddings as its own config says.
    """
    width, patch_size = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    arch = next((name for name, (dim, *_) in ARCHS.items() if dim == width), None)
    if arch is None:
        widths = ", ".join(str(dim) for dim, *_ in ARCHS.values())
        raise ValueError(f"its tokens are {width} wide, known are {widths}")
    if "pos_embed" in state:
        grid_side(state["pos_embed"])
    learned, registers = "pos_embed" in state, state.get("register_tokens", torch.empty(1, 0)).shape[1]
    keys = {
        "arch": arch,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "patch_size": patch_size,
        "registers": registers,
        "ffn": "swiglu" if "blocks.0.mlp.w12.weight" in state else "mlp",
        "pos_embed": "learned" if learned else "rope",
        "norm_eps": float(described.get("layer_norm_eps", 1e-6 if learned else 1e-5)),
    }
    if "blocks.0.ls1.gamma" not in state:
        keys["layerscale"] = 0.0
    if learned and not own:
        # As the public DINOv2 and transformers do: of these only the models without registers differ.
        exact = registers > 0 or described.get("model_type") == "dinov2"
        keys |= {"interpolate_offset": 0.0 if exact else 0.1, "interpolate_antialias": registers > 0}
    return keys


def _derive_image_keys(described: dict, processor: dict) -> dict[str, object]:
    """mean, std, resize and crop of evaluation, from Hugging Face's preprocessor_config.json or timm's config.json."""
    if "image_mean" in processor:
        size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
        size, crop = (value if isinstance(value, dict) else {"height": value} for value in (size, crop))
        resize = size.get("shortest_edge") or size.get("height") or 256
        crop = (crop.get("height") or resize) if processor.get("do_center_crop", bool(crop)) else resize
        return {"mean": processor["image_mean"], "std": processor["image_std"], "resize": resize, "crop": crop}
    timm = described.get("pretrained_cfg") or {}
    if "mean" in timm:
        crop = timm["input_size"][-1]
        resize = round(crop / timm.get("crop_pct", 1.0))
        return {"mean": timm["mean"], "std": timm["std"], "resize": resize, "crop": crop}
    return {}
