"""Several ranks as processes on this machine; what is to be known of one that a signal ends."""

import faulthandler
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

SECONDS = 240  # after which a rank counts as hanging


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What a launcher says to a rank, and that its stacks are printed if a signal ends it."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def keep_core() -> None:
    """In a rank: what a signal ends leaves its memory in the current folder, if the system writes it to a file."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    faulthandler.enable()


def backtraces(folder: Path) -> str:
    """The stacks of all threads in the cores below folder, by gdb; the cores, which are large, are removed."""
    text = ""
    for core in sorted(folder.rglob("core*")):
        if shutil.which("gdb"):
            ask = ["-ex", "info registers", "-ex", "thread apply all backtrace"]
            command = ["gdb", "-batch", *ask, sys.executable, core]
            text += f"{core}\n" + subprocess.run(command, capture_output=True, text=True, timeout=SECONDS).stdout
        core.unlink()
    return text


def run_ranks(count: int, folder: Path, *command: str) -> list[int]:
    """Exit codes of `python command` as ranks, whose current folders are folder/rank-<n>.

    Of one that a signal ended, the stacks go to stderr and to folder/backtraces.txt.
    """
    processes, port = [], free_port()
    for rank in range(count):
        own = folder / f"rank-{rank}"
        own.mkdir(parents=True, exist_ok=True)
        env = os.environ | {"PYTHONPATH": str(ROOT)} | environment(rank, count, port)
        processes.append(subprocess.Popen([sys.executable, *command], env=env, cwd=own, preexec_fn=keep_core))
    codes = [process.wait(timeout=SECONDS) for process in processes]
    if min(codes) < 0:
        names = [signal.Signals(-code).name if code < 0 else str(code) for code in codes]
        (folder / "backtraces.txt").write_text(found := f"{command}: {names}\n{backtraces(folder)}")
        print(found, file=sys.stderr)
    return codes
