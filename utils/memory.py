"""How the process gets its memory from the system."""

import ctypes
import sys

from utils import distributed

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # parameters of glibc's mallopt


def keep_freed_memory() -> None:
    """Lets the process keep the memory that it frees for its next allocations. Linux with glibc; elsewhere nothing.

    Left to itself, glibc maps each large block anew and hands it back when freed. A training step on a CPU frees
    gigabytes of them, and to fault them in again takes a third of its time, and half of an augmentation's
    (docs/performance.md). Not done for several ranks on a CPU: one of them has died in glibc's heap, where this puts
    the large blocks too.
    """
    if distributed.world_size() > 1 and distributed.device().type == "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
