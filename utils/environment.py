"""Where a run was trained: <run>/environment.json, a list with an entry for each start of the training."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from utils.files import write_text
from utils.results import VERSION

FILE = "environment.json"
CODE = Path(__file__).resolve().parents[1]


def record_environment(run: Path) -> None:
    """Appends this process's environment to the run's list."""
    entries = [*read_environment(run), environment()]
    write_text(run / FILE, json.dumps(entries, indent=1) + "\n")


def read_environment(run: Path) -> list[dict]:
    """The run's entries, oldest first; none if there is no readable file."""
    try:
        entries = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def environment() -> dict:
    """Command, code and machine of this process; memory in GB."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.orig_argv),
        "commit": commit(CODE),
        "versions": {
            "python": platform.python_version(),
            "torch": package_version("torch"),
            "numpy": package_version("numpy"),
            "project": VERSION,
        },
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": memory(),
        "gpu": gpu(),
        "host": platform.node(),
    }


def commit(code: Path) -> str | None:
    """Commit of the code, with "+ changes" if tracked files differ from it; None outside its own repository."""
    try:
        if Path(git(code, "rev-parse", "--show-toplevel")).resolve() != code:
            return None  # installed within another project's repository
        changed = git(code, "status", "--porcelain", "--untracked-files=no")
        return git(code, "rev-parse", "HEAD") + (" + changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command in `folder`, without optional locks, so that training never waits for one."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the processor, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def memory() -> float | None:
    """Memory of the machine in GB."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def gpu() -> str | None:
    """Name of the GPU that the training uses, if PyTorch sees one."""
    torch = sys.modules.get("torch")  # a process that has not imported it trains nothing on a GPU
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
