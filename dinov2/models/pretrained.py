"""Backbones from files: runs of this project, teacher checkpoints, public DINOv2 weights, Hugging Face's and timm's."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dinov2 import checkpoint
from dinov2.config import load_run_config
from dinov2.models.formats import public_names
from dinov2.models.vision_transformer import VisionTransformer, build_backbone

WEIGHTS = "model.safetensors"  # in a folder of Hugging Face or timm


def read_weights(path: Path | str) -> dict:
    """Content of a torch file, a .safetensors file, or a folder with model.safetensors. ValueError when unreadable."""
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    if path.suffix != ".safetensors":
        return checkpoint.load_tensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} can't be read as a safetensors file: {str(error).splitlines()[0]}") from None


def backbone_state(content: dict) -> dict[str, Tensor]:
    """The backbone's tensors of a loaded file under public names.

    content: {"teacher": {"backbone.…"}}, or bare names: public, Hugging Face's or timm's.
    """
    state = content.get("teacher", content) if isinstance(content, dict) else {}
    prefixed = {name.removeprefix("backbone."): v for name, v in state.items() if name.startswith("backbone.")}
    return public_names(prefixed or dict(state))


def fit_pos_embed(model: VisionTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Position embeddings of another image size, interpolated to the model's (high-resolution continuation)."""
    own, given = model.pos_embed.shape[1] - 1, state["pos_embed"].shape[1] - 1
    if own == given:
        return state
    side, target = round(given**0.5), round(own**0.5)
    if side * side != given:
        raise ValueError(f"its position embeddings, {given} patches, are no square grid")
    grid = state["pos_embed"][:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(target, target), mode="bicubic", antialias=target < side)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(state["pos_embed"].dtype)
    return state | {"pos_embed": torch.cat((state["pos_embed"][:, :1], patches), dim=1)}


def load_pretrained(model: VisionTransformer, path: Path | str) -> None:
    """Fills a backbone from a file of weights; strict but for the size that the position embeddings are built for."""
    state = backbone_state(read_weights(path))
    if "pos_embed" not in state:
        raise ValueError(f"{path} holds no DINOv2 backbone: it has no pos_embed")
    try:
        state = fit_pos_embed(model, state)
    except ValueError as error:
        raise ValueError(f"{path} can't be used: {error}") from None
    own = model.state_dict()
    if any(hasattr(value, "full_tensor") for value in own.values()):
        from torch.distributed.tensor import distribute_tensor

        for name in own.keys() & state.keys():
            state[name] = distribute_tensor(state[name], own[name].device_mesh, own[name].placements)
    checkpoint.load_strict(model, state, path)


def load_backbone(path: Path | str, epoch: int | None = None) -> VisionTransformer:
    """A trained backbone, ready for features, on the CPU and in eval mode.

    path: a run's folder (its last kept epoch, or `epoch`), one of its checkpoint folders, or a teacher_checkpoint.pth
    inside a run; any other .pth with public names is read with the architecture of the config.yaml beside it.

        features = load_backbone("runs/nct")(images)["x_norm_clstoken"]    # images [B, 3, H, W], normalised
    """
    path = Path(path)
    if (path / "config.yaml").is_file():
        kept = [c for c in checkpoint.list_checkpoints(path) if c.evaluate]
        if epoch is None and not kept:
            raise ValueError(f"{path} has no kept checkpoint yet")
        run, file = path, (kept[-1] if epoch is None else checkpoint.at_epoch(path, epoch)).teacher
    else:
        file = path / checkpoint.TEACHER if path.is_dir() else path
        runs = [folder for folder in file.absolute().parents if (folder / "config.yaml").is_file()]
        if not file.is_file() or not runs:
            raise ValueError(f"{path} is no run, checkpoint or weights with a config.yaml above them")
        run = runs[0]
    model = build_backbone(load_run_config(run), drop_path=False)
    load_pretrained(model, file)
    return model.eval().requires_grad_(False)
