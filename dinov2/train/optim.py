"""AdamW with DINOv2's parameter groups: layer-wise learning rates, no decay on biases, norms and LayerScale."""

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from dinov2.train.schedules import StepValues

AT_DEPTH_ZERO = ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")


def lr_multiplier(name: str, blocks: int, decay: float, patch_embed: float, frozen: int = 0) -> float:
    """Multiplier of a backbone parameter: decay ** (distance from the top), the patch embedding slower still.

    blocks: number of transformer blocks; 0 for a head, whose multiplier is 1. frozen: number of first blocks that are
    not trained, nor is what lies before them: their multiplier is 0.
    """
    if blocks == 0:
        return 1.0
    depth = blocks + 1
    if name.startswith(AT_DEPTH_ZERO):
        depth = 0
    elif name.startswith("blocks."):
        depth = int(name.split(".")[1]) + 1
    if depth <= frozen and frozen > 0:
        return 0.0
    multiplier = decay ** (blocks + 1 - depth)
    return multiplier * patch_embed if "patch_embed" in name else multiplier


def wd_multiplier(name: str) -> float:
    return 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0


def parameter_groups(module: nn.Module, cfg: DictConfig) -> list[dict]:
    """Groups of one sub-module of the student, parameters of equal multipliers together: fewer, larger updates."""
    blocks, optim = len(module.blocks) if hasattr(module, "blocks") else 0, cfg.optim
    groups: dict[tuple, dict] = {}
    for name, parameter in module.named_parameters():
        key = (
            lr_multiplier(name, blocks, optim.layerwise_decay, optim.patch_embed_lr_mult, optim.frozen_blocks),
            wd_multiplier(name),
            "last_layer" in name,
        )
        group = {"params": [], "is_backbone": blocks > 0}
        group |= dict(zip(("lr_multiplier", "wd_multiplier", "is_last_layer"), key, strict=True))
        groups.setdefault(key, group)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(student: nn.ModuleDict, cfg: DictConfig) -> torch.optim.AdamW:
    depth, frozen = len(student["backbone"].blocks), cfg.optim.frozen_blocks
    if frozen > depth:
        raise ValueError(f"optim.frozen_blocks={frozen} is more than the {depth} blocks of model.depth")
    groups = [group for module in student.values() for group in parameter_groups(module, cfg)]
    # lr is set before every step; fused runs the whole update as one kernel per group.
    return torch.optim.AdamW(groups, lr=0.0, betas=(cfg.optim.beta1, cfg.optim.beta2), fused=True)


def apply_schedule(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = values.weight_decay * group["wd_multiplier"]
        lr = values.last_layer_lr if group["is_last_layer"] else values.lr
        if group["is_backbone"]:
            lr = values.backbone_lr
        group["lr"] = lr * group["lr_multiplier"]


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def optimizer_state(student: nn.ModuleDict, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by parameter, for any number of ranks: state.<parameter>.exp_avg, ….

    Without what is no tensor: rates, multipliers and betas of the groups follow from the configuration.
    """
    whole = get_optimizer_state_dict(student, optimizer, options=FLAT)
    return {name: value for name, value in whole.items() if name.startswith("state.")}


def load_optimizer_state(student: nn.ModuleDict, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    whole = get_optimizer_state_dict(student, optimizer, options=FLAT)
    set_optimizer_state_dict(student, optimizer, whole | state, options=FLAT)


def clip_gradients(student: nn.ModuleDict, limit: float) -> dict[str, Tensor]:
    """Clips each sub-module by itself; its gradient norms before that."""
    norms = {}
    for name, module in student.items():
        norm = nn.utils.clip_grad_norm_(module.parameters(), limit or float("inf"))
        norms[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norms
