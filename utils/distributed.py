"""Ranks, from the launch environment (torchrun, or srun and submitit on Slurm), which only this module reads."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import NoReturn, TextIO, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # rank 0 may build an index of a large tree while the others wait
POLL = 1.0  # s
joined = False  # whether this process has joined a group of ranks
_waits = count()  # all ranks call `wait_for_main` equally often


def _slurm_environment() -> dict[str, str]:
    """torchrun's variables from a Slurm step's; the first node is the master, the port follows the job's number."""
    nodes = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    master = subprocess.run(nodes, check=True, capture_output=True, text=True).stdout.split()[0]
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": master,
        "MASTER_PORT": str(20000 + int(os.environ["SLURM_JOB_ID"]) % 20000),
    }


def read_launcher() -> tuple[int, int]:
    """(rank, number of ranks) from the launcher, for ranks that need no group; chooses this rank's GPU."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.update(_slurm_environment())
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def init() -> None:
    """Joins the process group when started as one of several ranks; chooses this rank's GPU. Safe to call twice."""
    global joined
    if not dist.is_initialized() and read_launcher()[1] > 1:
        joined = True
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


def close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """Ends this rank with its exit code, as sys.exit does, but without finalising the interpreter.

    A thread of gloo may still release a tensor then and needs the interpreter's lock; CPython ends a thread that asks
    for it during finalisation, in the middle of a destructor, and the process aborts (docs/security.md).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print_on_main(text: str, file: TextIO | None = None) -> None:
    """Prints on the main rank alone, at once."""
    if is_main():
        print(text, file=file, flush=True)


def device() -> torch.device:
    """This rank's GPU, a Mac's (mps, untested), or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def wait_for_main() -> None:
    """Waits for the main rank, however long it works alone; a collective would time out."""
    if not dist.is_initialized():
        return
    store, name = dist.distributed_c10d._get_default_store(), f"main-{next(_waits)}"
    if is_main():
        store.set(name, "here")
    while not store.check([name]):
        time.sleep(POLL)
    dist.barrier()  # the main rank may host the store and must not leave while others use it


def on_main(function: Callable[[], T]) -> T | None:
    """Calls function() on the main rank; its result is there, its ValueError or OSError on all ranks."""
    result, message = None, [None]
    if is_main():
        try:
            result = function()
        except (ValueError, OSError) as error:
            if not dist.is_initialized():
                raise
            message = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0)
    if message[0] is not None:
        raise ValueError(message[0])
    return result


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks, in place."""
    return all_reduce_sum(tensor).div_(world_size())


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        ctx.rows = slice(rank() * len(own), (rank() + 1) * len(own))
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce_sum(gradient.contiguous().clone())[ctx.rows]


def gather_rows(own: Tensor) -> Tensor:
    """The rows of all ranks, in their order; each rank has equally many.  # [n, ...] → [ranks * n, ...]

    Differentiable: the gradient of a row is the sum over the ranks.
    """
    return _GatherRows.apply(own) if dist.is_initialized() else own


def gather_dicts(own: dict[str, str]) -> dict[str, str]:
    """The merged dicts of all ranks, on every rank."""
    gathered: list[dict] = [own] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(gathered, own)
    return {key: value for part in gathered for key, value in part.items()}
