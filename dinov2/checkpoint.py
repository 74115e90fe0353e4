"""Checkpoints of a run: sharded (torch.distributed.checkpoint), atomic, resumable on another number of ranks.

    <run>/checkpoints/iter_0000012499/{*.distcp, .metadata, teacher_checkpoint.pth, COMPLETE}

A checkpoint is written under a hidden name and renamed when whole. COMPLETE lists its files with their sizes and
checksums: a folder without it, or whose files do not fit it, is not used. teacher_checkpoint.pth (evaluation epochs) is
a plain file with public DINOv2 names: {"teacher": {"backbone.…": tensor, "dino_head.…": tensor}}.
"""

import hashlib
import json
import mmap
import os
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor

from dinov2.dcp_reader import load_tensors_into, read_description
from utils import distributed, tensor_files
from utils.nested import flatten

# A single process saves and loads without a group on purpose; the warning at every checkpoint would be noise.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

MARK = "COMPLETE"
TEACHER = "teacher_checkpoint.pth"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    iteration: int  # iterations done
    epoch: int  # whole epochs done
    evaluate: bool  # kept for evaluation: it has a teacher_checkpoint.pth
    identity: str = ""  # of the run that wrote it, see dinov2.train.identity; "" in checkpoints of older versions
    hashes: dict[str, str] = field(default_factory=dict)  # xxh3 by file; empty in checkpoints of older versions

    @property
    def teacher(self) -> Path:
        return self.path / TEACHER


def _folder(run: Path | str) -> Path:
    return Path(run) / "checkpoints"


@cache
def _warn(sentence: str) -> None:
    """Warns once per process: the same folders are looked at many times."""
    distributed.print_on_main(f"warning: {sentence}", file=sys.stderr)


def _read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None, with a warning, when it is not whole."""
    try:
        mark = json.loads((path / MARK).read_text())
        if mark.pop("check", None) not in (None, _checksum(mark)):
            raise ValueError(f"{path / MARK} is damaged")
        for name, size in mark["files"].items():
            if (path / name).stat().st_size != size:
                raise ValueError(f"{path / name} is truncated")
        if path.name != _folder_name(mark["iteration"]):
            raise ValueError(f"{path / MARK} is of iteration {mark['iteration']}")
        numbers = mark["iteration"], int(mark["epoch"]), bool(mark["evaluate"])
        return Checkpoint(path, *numbers, mark.get("identity", ""), mark.get("xxh3", {}))
    except OSError as error:
        reason = f"{error.filename} can't be read ({error.strerror})"
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        reason = f"{path / MARK} is damaged"
    except ValueError as error:
        reason = str(error)
    _warn(f"{reason}; this checkpoint is not used")
    return None


def _folder_name(iteration: int) -> str:
    return f"iter_{iteration:010d}"


def _checksum(mark: dict) -> str:
    """Checksum of what COMPLETE says."""
    return xxhash.xxh3_64_hexdigest(json.dumps(mark, sort_keys=True).encode())


def list_checkpoints(run: Path | str) -> list[Checkpoint]:
    """A run's checkpoints whose files have their sizes, oldest first; contents are checked when one is loaded."""
    found = [_read_checkpoint(path) for path in sorted(_folder(run).glob("iter_*"))]
    return sorted((c for c in found if c is not None), key=lambda c: c.iteration)


def list_kept(run: Path | str) -> list[Checkpoint]:
    """Those of list_checkpoints that are kept for evaluation."""
    return [checkpoint for checkpoint in list_checkpoints(run) if checkpoint.evaluate]


def latest(run: Path | str) -> Checkpoint | None:
    """The last undamaged checkpoint; damaged ones are named in a warning. All ranks call it."""
    for checkpoint in reversed(list_checkpoints(run)):
        try:
            check(checkpoint)
            read_description(checkpoint.path)
            return checkpoint
        except ValueError as error:
            _warn(f"{error}; this checkpoint is not used")
    return None


def check(checkpoint: Checkpoint) -> None:
    """ValueError that names the first damaged file. The ranks share the work: all call it."""
    if not checkpoint.hashes:
        _warn(f"{checkpoint.path} was written without checksums: the sizes of its files alone are checked")
    names, ranks = sorted(checkpoint.hashes), distributed.world_size()
    own = [name if i % ranks == distributed.rank() else None for i, name in enumerate(names)]
    wrong = [name is not None and _differs(checkpoint.path / name, checkpoint.hashes[name]) for name in own]
    for name, count in zip(names, _sum_over_ranks(wrong), strict=True):
        if count:
            raise ValueError(f"{checkpoint.path / name} is damaged: it is not what was written")


def _differs(path: Path, wanted: str) -> bool:
    try:
        status = path.stat()
        return _hash_file(path, status.st_size, status.st_mtime_ns) != wanted
    except OSError:
        return True


@cache
def _hash_file(path: Path, size: int, time: int) -> str:
    """xxh3 of a file; size and time are keys of the cache: a changed file is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def _sync_and_hash(path: Path) -> str:
    """xxh3 of a file just written, computed while it is synced to the disk.

    The file is still in memory, so it is mapped: reading would copy it, which takes longer than the hash. _hash_file
    reads instead, because a damaged disk must raise an error there, not a signal.
    """
    with open(path, "rb") as file, ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno())
        empty = not os.fstat(file.fileno()).st_size  # which cannot be mapped
        with nullcontext(b"") if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest = xxhash.xxh3_64_hexdigest(content)
        synced.result()
    return digest


def _sum_over_ranks(values: list[int]) -> list[int]:
    return distributed.all_reduce_sum(torch.tensor(values, dtype=torch.int64, device=distributed.device())).tolist()


def at_epoch(run: Path | str, epoch: int) -> Checkpoint:
    """The checkpoint at the end of an epoch. ValueError that lists those that exist."""
    by_epoch = {checkpoint.epoch: checkpoint for checkpoint in list_kept(run)}
    if epoch not in by_epoch:
        there = f"at epoch {epoch} (kept: {', '.join(map(str, by_epoch)) or 'none'})"
        raise ValueError(f"{run} has no kept checkpoint {there}; train it further or choose one of these")
    return by_epoch[epoch]


def save(
    run: Path | str,
    state: dict,
    iteration: int,
    epoch: int,
    teacher: dict[str, Tensor] | None,
    keep_last: int,
    identity: str = "",
) -> Checkpoint:
    """Writes `state` (nested dicts of tensors) and, for evaluation, the teacher's whole tensors. All ranks call it."""
    folder = _folder(run)
    final = folder / _folder_name(iteration)
    temporary = folder / f".{final.name}.tmp"
    if distributed.is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    distributed.barrier()
    mark = {"iteration": iteration, "epoch": epoch, "evaluate": teacher is not None, "identity": identity}
    try:
        # On a full disk the writer raises a long chain of errors; without its mark the folder is never used.
        dcp.save(state, storage_writer=dcp.FileSystemWriter(temporary, sync_files=False), no_dist=_is_single_process())
        hashes = _write_through(temporary, teacher)
        if distributed.is_main():
            _finish(temporary, final, mark, hashes)
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
    return Checkpoint(final, iteration, epoch, teacher is not None, identity, hashes)


def _is_single_process() -> bool:
    return distributed.world_size() == 1


def _write_through(folder: Path, teacher: dict[str, Tensor] | None) -> dict[str, str]:
    """Each rank syncs its shard to the disk; the main rank also writes the teacher. Returns the files' checksums."""
    own = {path.name: 0 for path in folder.glob(f"__{distributed.rank()}_*.distcp")}
    hashes, failure = {}, None
    try:
        if distributed.is_main():
            if teacher is not None:
                torch.save({"teacher": teacher}, folder / TEACHER)
            own |= {path.name: 0 for path in folder.iterdir() if not path.name.startswith("__")}
        hashes = {name: _sync_and_hash(folder / name) for name in own}
    except (OSError, RuntimeError) as error:  # torch.save answers a full disk with a RuntimeError
        failure = error
    if any(_sum_over_ranks([failure is not None])):
        raise failure or OSError("another rank could not write its part")
    return distributed.gather_dicts(hashes)


def _finish(temporary: Path, final: Path, mark: dict, hashes: dict[str, str]) -> None:
    mark = mark | {"files": {name: (temporary / name).stat().st_size for name in hashes}, "xxh3": hashes}
    with open(temporary / MARK, "w") as file:
        file.write(json.dumps(mark | {"check": _checksum(mark)}))
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)  # an unreadable one of the same iteration
    os.rename(temporary, final)


def _prune(run: Path | str, keep_last: int) -> None:
    """Removes the oldest checkpoints that are not kept for evaluation, and what killed runs left behind. The newest of
    all stays: it may be the position that a SIGTERM has saved."""
    found = list_checkpoints(run)
    passing = [c for c in found if not c.evaluate]
    for checkpoint in passing[: max(len(passing) - keep_last, 0)]:
        if checkpoint is found[-1]:
            continue
        # Renamed first: a half-removed folder must not look like a checkpoint.
        hidden = checkpoint.path.with_name(f".{checkpoint.path.name}.removed")
        os.rename(checkpoint.path, hidden)
    sweep(run)


def sweep(run: Path | str) -> None:
    """Removes what killed runs left half-written or half-removed."""
    for leftover in [*_folder(run).glob(".iter_*.removed"), *_folder(run).glob(".iter_*.tmp")]:
        shutil.rmtree(leftover, ignore_errors=True)


def load(checkpoint: Checkpoint, state: dict) -> dict:
    """Fills the tensors of `state` in place from a checkpoint (which may hold more) and returns it.

    Strict: ValueError that names the first tensors that are missing or have another shape.
    """
    check(checkpoint)
    description = read_description(checkpoint.path)
    # What is no tensor has no size: it fits none.
    sizes = {name: getattr(item, "size", None) for name, item in description.state_dict_metadata.items()}
    wanted = {name: value.shape for name, value in flatten(state).items() if isinstance(value, Tensor)}
    _refuse_misfits(checkpoint.path, [], sizes, wanted)
    load_tensors_into(state, checkpoint.path, description, _is_single_process())
    return state


def load_tensors(path: Path | str) -> dict:
    """A plain torch file, weights only. ValueError when it holds code, or is not what its checkpoint says of it."""
    path = Path(path)
    checkpoint = _read_checkpoint(path.parent) if (path.parent / MARK).is_file() else None
    wanted = checkpoint.hashes.get(path.name) if checkpoint else None
    if wanted and _differs(path, wanted):
        way = f"remove {path.parent} and train on, which goes on from the checkpoint before it"
        raise ValueError(f"{path} is damaged: it is not what was written; {way}")
    return tensor_files.load_tensors(path)


def load_strict(module: torch.nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """load_state_dict whose error names the file and the first keys that do not fit."""
    own = module.state_dict()
    unknown = [f"{name} is unknown to the model" for name in state if name not in own]
    sizes, wanted = ({name: value.shape for name, value in tensors.items()} for tensors in (state, own))
    _refuse_misfits(source, unknown, sizes, wanted)
    module.load_state_dict(state)


def _refuse_misfits(source: Path | str, wrong: list[str], sizes: dict, wanted: dict[str, torch.Size]) -> None:
    """ValueError that names the first tensors of a file that are missing or of another size, or `wrong` otherwise."""
    wrong = [f"{name} is missing" for name in wanted if name not in sizes] + wrong
    for name, size in wanted.items():
        if name in sizes and sizes[name] != size:
            wrong.append(f"{name} is {list(sizes[name] or ())}, the model wants {list(size)}")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(f"{source} is of another architecture: {'; '.join(wrong[:3])}{more}")
