"""Shared by all tests: the recorded numbers (GOLDEN_DIR, default tests/golden) and the rule that fills parameters."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
DATA_DIR = Path(os.environ.get("TEST_DATA_DIR", ROOT / ".data"))


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "gpu: runs on a GPU, and is skipped where there is none")


def pytest_collection_modifyitems(items) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))


def golden(name: str) -> dict:
    """Content of one recorded file: arrays of an .npz, or a parsed .json."""
    path = GOLDEN_DIR / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def seeded_input(seed: int, shape) -> torch.Tensor:
    """The input that a recorded file names by its seed."""
    return torch.from_numpy(np.random.RandomState(int(seed)).standard_normal(tuple(shape)).astype(np.float32))


def _fill_value(name: str, shape: tuple[int, ...], prefix: str, offset: int) -> np.ndarray:
    seed = (zlib.crc32((prefix + name).encode()) + offset) % 2**32
    z = np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
    if name.endswith("gamma"):
        return 0.5 + 0.1 * z
    if name.endswith("weight_g"):
        return np.ones_like(z)
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * z
    if name.split(".")[-1] == "center":
        return 0.1 * z
    if name.endswith(("weight", "weight_v")) and len(shape) >= 2:
        return z / np.sqrt(np.prod(shape[1:]))
    return 0.02 * z


@torch.no_grad()
def fill_parameters(module: torch.nn.Module, prefix: str = "", buffers: bool = False) -> torch.nn.Module:
    """Fills every parameter (and, with `buffers`, the centres) by its public name, as tests/golden/README.md says."""
    offset = golden("meta.json")["fill_seed_offset"]
    named = list(module.named_parameters()) + (list(module.named_buffers()) if buffers else [])
    for name, tensor in named:
        tensor.copy_(torch.from_numpy(np.asarray(_fill_value(name, tuple(tensor.shape), prefix, offset))))
    return module


@pytest.fixture
def golden_dir() -> Path:
    return GOLDEN_DIR


@pytest.fixture
def data_dir() -> Path:
    if not DATA_DIR.is_dir():
        pytest.skip(f"no data folder {DATA_DIR}: real images are not shipped with the project")
    return DATA_DIR
