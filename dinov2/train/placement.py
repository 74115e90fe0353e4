"""Where networks live: sharded over the ranks, compiled where that is asked for, gathered again for files."""

from itertools import pairwise

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._functorch import config as partitioner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from utils import distributed


def shard(network: nn.ModuleDict, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """FSDP2 over all ranks: each block, then the backbone and each head by themselves.

    dtype: that of autocast, in which the blocks' weights are gathered: it would round most of them anyway. A block asks
    for the weights of the next one before it computes, as in DINOv3.
    """
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    # The residual stream enters a block as it is, in float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    for module in network.values():
        blocks = list(getattr(module, "blocks", []))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        for block, following in pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])
        # Left to itself, the outermost module stays whole after a forward without backward: the EMA works on shards.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def compiling(cfg: DictConfig, device: torch.device) -> bool:
    """Whether train.compile asks for the compiler; if not, it is switched off for what would use it unasked."""
    on = device.type == "cuda" if cfg.train.compile is None else cfg.train.compile
    if device.type == "cuda":
        torch.compiler.set_stance("default" if on else "force_eager")
    return on


def compile_parts(network: nn.ModuleDict) -> None:
    """torch.compile of blocks and heads. Of what is inside them: FSDP's gathering and diagnostics stay around it."""
    torch._dynamo.config.recompile_limit = 64  # all blocks of all networks are one function: of several shapes
    # Activations and normalised tokens are made again in the backward pass rather than kept for its matrix products.
    partitioner.ban_recompute_materialized_backward = False
    for module in network.values():
        for part in getattr(module, "blocks", None) or module.children():
            part.forward = torch.compile(part.forward)


def whole_state(network: nn.ModuleDict) -> dict[str, Tensor]:
    """The state dict with shards gathered, on the CPU. All ranks call it."""
    state = network.state_dict()
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).cpu() for name, v in state.items()}
