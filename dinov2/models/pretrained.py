"""Backbones from files: runs of this project, teacher checkpoints, public DINOv2 and DINOv3 weights of any form."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dinov2 import checkpoint
from dinov2.config import is_run, load_defaults, load_run_config
from dinov2.models.vision_transformer import VisionTransformer, build_backbone
from dinov2.models.weights import Weights, grid_side, read_weights


def fit_channels(model: VisionTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The patch embedding for the model's number of channels.

    Each channel gets the mean kernel of the file's, scaled so that an image whose channels are all alike has the tokens
    that it has in the file's model: one channel is seen as grey is there.
    """
    kernel, channels = state["patch_embed.proj.weight"], model.patch_embed.proj.in_channels  # [D, C, p, p]
    if kernel.shape[1] == channels:
        return state
    mean = kernel.sum(dim=1, keepdim=True) / channels
    return state | {"patch_embed.proj.weight": mean.repeat(1, channels, 1, 1)}


def fit_pos_embed(model: VisionTransformer, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Position embeddings of another image size, interpolated to the model's (high-resolution continuation)."""
    if model.pos_embed is None or "pos_embed" not in state or model.pos_embed.shape[1] == state["pos_embed"].shape[1]:
        return state
    side, target = grid_side(state["pos_embed"]), grid_side(model.pos_embed)
    grid = state["pos_embed"][:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(target, target), mode="bicubic", antialias=target < side)
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(state["pos_embed"].dtype)
    return state | {"pos_embed": torch.cat((state["pos_embed"][:, :1], patches), dim=1)}


def load_pretrained(model: VisionTransformer, path: Path | str) -> None:
    """Fills a backbone from a file of weights; strict but for the number of channels and the size of the images."""
    fit(model, read_weights(path))


def fit(model: VisionTransformer, weights: Weights) -> None:
    """Fills a backbone from weights that are read already."""
    state, own = fit_pos_embed(model, fit_channels(model, weights.state)), model.state_dict()
    if any(hasattr(value, "full_tensor") for value in own.values()):
        from torch.distributed.tensor import distribute_tensor

        for name in own.keys() & state.keys():
            state[name] = distribute_tensor(state[name], own[name].device_mesh, own[name].placements)
    checkpoint.load_strict(model, state, weights.path)


def bare_config(weights: Weights) -> DictConfig:
    """The settings of a backbone without a run: the file's own, and of what no file says the defaults.

    Images of other than three channels get ImageNet's mean and std averaged, where the file's folder names none.
    """
    cfg, images = load_defaults(), weights.images
    model = weights.model | {"pos_embed_size": weights.image_size}
    grey = {} if weights.channels == 3 else {k: [sum(cfg.data[k]) / 3] * weights.channels for k in ("mean", "std")}
    data = {"in_chans": weights.channels} | grey | {k: images[k] for k in ("mean", "std") if k in images}
    size = {key: images.get(key, cfg.eval[key]) for key in ("resize", "crop")}
    size["crop"] -= size["crop"] % model["patch_size"]
    return OmegaConf.merge(cfg, {"model": model, "data": data, "eval": size})


def locate(path: Path | str, epoch: int | None = None) -> tuple[Path, DictConfig | None]:
    """The file of weights that `path` means, as dinov2.load_backbone() takes it, and the config of its run, if any."""
    path = Path(path)
    if (path / "config.yaml").is_file():
        kept = checkpoint.list_kept(path)
        if epoch is None and not kept:
            raise ValueError(f"{path} has no kept checkpoint yet")
        file = (kept[-1] if epoch is None else checkpoint.at_epoch(path, epoch)).teacher
        return file, load_run_config(path)
    if not path.exists():
        raise ValueError(f"{path} is missing: name a run, one of its checkpoints, or a file of weights")
    if epoch is not None:
        raise ValueError(f"epoch={epoch}, but {path} is no run's folder: weights alone are of one epoch")
    file = path / checkpoint.TEACHER if (path / checkpoint.TEACHER).is_file() else path
    described = any((folder / "config.json").is_file() for folder in (file, file.parent))
    run = None if described else next(filter(is_run, file.absolute().parents), None)
    return file, None if run is None else load_run_config(run)


def read_backbone(path: Path | str, epoch: int | None = None) -> tuple[VisionTransformer, DictConfig]:
    """A backbone on the CPU, in eval mode, and the settings that belong to it. `path` as in dinov2.load_backbone."""
    file, cfg = locate(path, epoch)
    weights = read_weights(file)
    cfg = bare_config(weights) if cfg is None else cfg
    model = build_backbone(cfg, drop_path=False)
    fit(model, weights)
    return model.eval().requires_grad_(False), cfg
