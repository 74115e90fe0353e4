"""Checkpoints of a run: sharded (torch.distributed.checkpoint), atomic, resumable on another number of ranks.

    <run>/checkpoints/iter_0000012499/{*.distcp, .metadata, teacher_checkpoint.pth, COMPLETE}

A checkpoint is written under a hidden name and renamed when whole. COMPLETE lists its files with their sizes: a folder
without it, or whose files do not fit it, is never read. teacher_checkpoint.pth (evaluation epochs) is a plain file with
public DINOv2 names: {"teacher": {"backbone.…": tensor, "dino_head.…": tensor}}.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from utils import distributed

# One process saves and loads by itself on purpose; said at every checkpoint, it would bury what matters.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

MARK = "COMPLETE"
TEACHER = "teacher_checkpoint.pth"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    iteration: int  # iterations done
    epoch: int  # whole epochs done
    evaluate: bool  # kept for evaluation: it has a teacher_checkpoint.pth

    @property
    def teacher(self) -> Path:
        return self.path / TEACHER


def _folder(run: Path | str) -> Path:
    return Path(run) / "checkpoints"


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None when it is not whole, which is said."""
    try:
        mark = json.loads((path / MARK).read_text())
        for name, size in mark["files"].items():
            if (path / name).stat().st_size != size:
                print(f"warning: {path / name} is truncated; this checkpoint is not used", file=sys.stderr)
                return None
        return Checkpoint(path, mark["iteration"], mark["epoch"], mark["evaluate"])
    except (OSError, json.JSONDecodeError, KeyError):
        print(f"warning: {path} is incomplete; this checkpoint is not used", file=sys.stderr)
        return None


def list_checkpoints(run: Path | str) -> list[Checkpoint]:
    """Whole checkpoints of a run, oldest first."""
    found = [_read(path) for path in sorted(_folder(run).glob("iter_*"))]
    return sorted((c for c in found if c is not None), key=lambda c: c.iteration)


def latest(run: Path | str) -> Checkpoint | None:
    checkpoints = list_checkpoints(run)
    return checkpoints[-1] if checkpoints else None


def at_epoch(run: Path | str, epoch: int) -> Checkpoint:
    """The checkpoint at the end of an epoch. ValueError that lists those that exist."""
    checkpoints = [c for c in list_checkpoints(run) if c.evaluate]
    for checkpoint in checkpoints:
        if checkpoint.epoch == epoch:
            return checkpoint
    epochs = ", ".join(str(c.epoch) for c in checkpoints) or "none"
    raise ValueError(
        f"{run} has no kept checkpoint at epoch {epoch} (kept: {epochs}); train it further or choose one of these"
    )


def save(
    run: Path | str,
    state: dict,
    iteration: int,
    epoch: int,
    teacher: dict[str, Tensor] | None,
    keep_last: int,
) -> Checkpoint:
    """Writes `state` (nested dicts of tensors) and, for evaluation, the teacher's whole tensors. All ranks call it."""
    folder = _folder(run)
    final = folder / f"iter_{iteration:010d}"
    temporary = folder / f".{final.name}.tmp"
    if distributed.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    try:
        # The writer's own error on a full disk is a long chain; the folder never gets its mark either way.
        dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary, sync_files=True), no_dist=_alone())
        if distributed.is_main():
            if teacher is not None:
                torch.save({"teacher": teacher}, temporary / TEACHER)
            _finish(temporary, final, iteration, epoch, teacher is not None)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        free = shutil.disk_usage(folder).free / 1e9
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise OSError(f"could not write checkpoint {final} ({free:.1f} GB free on its disk): {reason}") from error
    distributed.barrier()
    if distributed.is_main():
        _prune(run, keep_last)
    return Checkpoint(final, iteration, epoch, teacher is not None)


def _alone() -> bool:
    return distributed.world_size() == 1


def _finish(temporary: Path, final: Path, iteration: int, epoch: int, evaluate: bool) -> None:
    files = {path.name: path.stat().st_size for path in temporary.iterdir()}
    mark = {"iteration": iteration, "epoch": epoch, "evaluate": evaluate, "files": files}
    with open(temporary / MARK, "w") as file:
        file.write(json.dumps(mark))
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)  # an unreadable one of the same iteration
    os.rename(temporary, final)


def _prune(run: Path | str, keep_last: int) -> None:
    """Removes the oldest checkpoints that are not kept for evaluation, and what killed runs left half-written."""
    passing = [c for c in list_checkpoints(run) if not c.evaluate]
    for checkpoint in passing[: max(len(passing) - keep_last, 0)]:
        # Renamed first: a half-removed folder must not look like a checkpoint.
        hidden = checkpoint.path.with_name(f".{checkpoint.path.name}.removed")
        os.rename(checkpoint.path, hidden)
    for leftover in [*_folder(run).glob(".iter_*.removed"), *_folder(run).glob(".iter_*.tmp")]:
        shutil.rmtree(leftover, ignore_errors=True)


class _MetadataUnpickler(pickle.Unpickler):
    """DCP describes its tensors in a pickle: only the classes of that description are let in."""

    ALLOWED = {
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.planner", "SavePlan"),
        ("pathlib", "PosixPath"),
        ("builtins", "dict"),
    }
    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")

    def find_class(self, module: str, name: str):
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        description = module in self.MODULES and name.lstrip("_")[:1].isupper()  # its classes, none of its functions
        if dtype or description or (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _described(path: Path) -> dict[str, tuple[int, ...] | None]:
    """Names and shapes of the tensors in a checkpoint (None for other values)."""
    try:
        with open(path / ".metadata", "rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path / '.metadata'} holds code or foreign objects ({error}): refused") from None
    described = metadata.state_dict_metadata.items()
    return {name: tuple(item.size) if hasattr(item, "size") else None for name, item in described}


def _flat(state: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in state.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def load(checkpoint: Checkpoint, state: dict) -> dict:
    """Fills the tensors of `state` in place from a checkpoint (which may hold more) and returns it.

    Strict: ValueError that names the first tensors that are missing or have another shape.
    """
    described = _described(checkpoint.path)
    wrong = []
    for name, value in _flat(state).items():
        if name not in described:
            wrong.append(f"{name} is missing")
        elif isinstance(value, Tensor) and described[name] != tuple(value.shape):
            wrong.append(f"{name} is {list(described[name] or ())}, the model wants {list(value.shape)}")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"{checkpoint.path} is of another architecture: {'; '.join(wrong[:3])}{more}")
    dcp.load(state, checkpoint_id=checkpoint.path, no_dist=_alone())
    return state


def load_tensors(path: Path | str) -> dict:
    """A plain torch file, weights only. ValueError when it is truncated or holds code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than weights (a pickle with code in it?): refused") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} can't be read as a torch file: {str(error).splitlines()[0]}") from None


def load_strict(module: torch.nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """load_state_dict whose error names the file and the first keys that do not fit."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown to the model" for name in state if name not in own]
    wrong += [
        f"{name} is {list(state[name].shape)}, the model wants {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"{source} is of another architecture: {'; '.join(wrong[:3])}{more}")
    module.load_state_dict(state)
