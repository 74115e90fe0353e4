"""Who keeps the memory that it frees."""

import ctypes
from types import SimpleNamespace

import pytest

from utils import distributed, memory


@pytest.mark.parametrize("ranks,device,kept", [(1, "cpu", True), (2, "cpu", False), (2, "cuda", True)])
def test_of_several_ranks_on_a_cpu_none_does(ranks, device, kept, monkeypatch):
    said = {}
    glibc = SimpleNamespace(mallopt=said.__setitem__)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: glibc)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    monkeypatch.setattr(distributed, "device", lambda: SimpleNamespace(type=device))
    monkeypatch.setattr(memory.sys, "platform", "linux")
    memory.keep_freed_memory()
    assert said == ({memory.M_MMAP_MAX: 0, memory.M_TRIM_THRESHOLD: -1} if kept else {})
