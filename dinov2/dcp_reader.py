"""Reads torch.distributed.checkpoint safely: its description by an exact list of classes, and tensors, nothing else.

DCP describes a checkpoint in a pickle (.metadata) and stores what is no tensor as pickles in its shards; its own reader
loads both without a guard. Here the description is read once, by a list of classes, and handed over; what is no tensor
is neither written nor read.
"""

import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

_DESCRIPTION = "torch.distributed.checkpoint.metadata"


class _DescriptionUnpickler(pickle.Unpickler):
    """Admits the classes of a description by exact name: a dotted one would reach into an object's attributes."""

    ALLOWED = frozenset(
        [("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
        + [("torch", "Size"), ("torch.serialization", "_get_layout")]
        + [("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")]  # the latter from Python 3.13
        + [("torch.distributed.checkpoint.filesystem", "_StorageInfo")]
        + [(_DESCRIPTION, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata",
                                             "TensorStorageMetadata", "TensorProperties", "BytesStorageMetadata",
                                             "_MEM_FORMAT_ENCODING")]
    )  # fmt: skip

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def read_description(folder: Path) -> Metadata:
    """The description of a checkpoint. ValueError, naming the file, for a damaged one and for foreign objects in it."""
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            description = _DescriptionUnpickler(file).load()
        shards = {info.relative_path for info in description.storage_data.values()}
        assert isinstance(description, Metadata) and isinstance(description.state_dict_metadata, dict)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds code or foreign objects ({error}): refused") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from None
    if outside := [name for name in shards if not str(name).endswith(".distcp") or Path(name).name != name]:
        raise ValueError(f"{path} names {outside[0]}, which is no shard of this checkpoint: refused")
    return description


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path, description: Metadata):
        super().__init__(folder)
        self.description = description

    def read_metadata(self, *_: object, **__: object) -> Metadata:
        return self.description


class _TensorPlanner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item, value) -> None:
        raise ValueError(f"{read_item.dest_index.fqn} is no tensor")


def load_tensors_into(state: dict, folder: Path, description: Metadata, no_dist: bool) -> None:
    """Fills the tensors of `state` in place; no_dist: in a single process. ValueError where a shard can't be read."""
    try:
        dcp.load(state, storage_reader=_Reader(folder, description), planner=_TensorPlanner(), no_dist=no_dist)
    except dcp.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise ValueError(f"{folder} can't be read: {' '.join(str(reason).split()) or type(reason).__name__}") from None
