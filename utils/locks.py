"""One writer per folder: a lock that says who holds it, is right on NFS, and does not outlive its holder.

    with locked(folder): ...
    python -m utils.locks FOLDER NAME PID      the same for a shell script of process PID; nothing is printed

FOLDER/.lock holds host, process and start of the holder. It is made whole under another name and linked, which either
succeeds or not, on network file systems too; flock() is not needed. A lock whose process is gone, or whose Slurm job
was put back into the queue and started again, is taken over. One of another host can only be named.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils import cli

NAME = ".lock"


def _read_system(read: Callable[[str], str], path: str) -> str:
    try:
        return read(path).strip()
    except OSError:
        return ""


_BOOT = _read_system(lambda path: Path(path).read_text(), "/proc/sys/kernel/random/boot_id")  # another at each start
_SPACE = _read_system(os.readlink, "/proc/self/ns/pid")  # whose processes have numbers of their own
_HOST = hashlib.sha256((socket.gethostname() + _SPACE).encode()).hexdigest()[:6]  # short: it goes into names of files


@contextmanager
def locked(folder: Path | str, part: str = "") -> Iterator[None]:
    """Hold folder, which is made if need be, until the block ends, also by an error, Ctrl-C or SIGTERM.

    part: a lock of its own for each part of the folder that has one writer. ValueError says who holds it.
    """
    lock = Path(folder, NAME + part)
    new = [path for path in (lock.parent, *lock.parent.parents) if not path.exists()]
    content = acquire(lock)
    sweep(folder)
    held = os.getpid()  # a forked worker that leaves through this block releases nothing
    own = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if own:
        signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        yield
    finally:
        if own and signal.getsignal(signal.SIGTERM) is _exit_on_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() == held and _read_lock(lock) == content:
            lock.unlink()
            with suppress(OSError):  # what was refused leaves no empty folders; others are in use
                for path in new:
                    path.rmdir()


def process_tag() -> str:
    """The end of the names of this process's temporary files, .NAME.tmp-<tag>: host and process."""
    return f"{_HOST}-{os.getpid()}"


def sweep(folder: Path | str) -> None:
    """Remove what kills left in folder: temporary files and folders, and the lock, of processes that are gone."""
    for path in Path(folder).glob(".*.tmp-*"):
        host, _, pid = path.name.rpartition(".tmp-")[2].rpartition("-")
        if host in ("", _HOST) and pid.isdecimal() and _process_start(int(pid)) is None:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    found = _read_lock(Path(folder, NAME))
    if found is not None and _is_stale(found):
        with suppress(OSError, ValueError):  # read-only, or another one is at it
            _take_over(Path(folder, NAME), found)


def _exit_on_signal(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def acquire(lock: Path, pid: int | None = None) -> str:
    """Makes the lock for a process, this one by default, and returns its content. ValueError says who holds it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    content = _describe_holder(os.getpid() if pid is None else pid)
    while not _create(lock, content):
        found = _read_lock(lock)
        if found is None:
            continue  # released this moment
        if not _is_stale(found):
            raise ValueError(_explain_refusal(lock, found))
        _take_over(lock, found)
    return content


def _take_over(lock: Path, found: str) -> None:
    """Remove a stale lock. Of several processes that found it, the one that makes the mark named after it does so."""
    mark = lock.with_name(f"{lock.name}-{hashlib.sha256(found.encode()).hexdigest()[:12]}")
    if not _create(mark, "taking over"):
        with suppress(FileNotFoundError):  # the other one was done this moment
            if time.time() - mark.stat().st_mtime > 10:
                raise ValueError(f"{mark} was left by a process that was ended just then; remove it and {lock}")
        time.sleep(0.1)
        return
    if _read_lock(lock) == found:
        lock.unlink()
    mark.unlink()


def _create(path: Path, content: str) -> bool:
    """Makes path with this content, whole. Returns False where it is there already."""
    temporary = path.with_name(f"{path.name}.tmp-{process_tag()}")
    try:
        temporary.write_text(content)
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                return _create_exclusively(path, content)  # a file system without hard links
            if temporary.stat().st_nlink == 2:
                return True  # an NFS server whose answer was lost has made the link all the same
            if not isinstance(error, FileExistsError):
                raise
            return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _create_exclusively(path: Path, content: str) -> bool:
    try:
        with open(path, "x") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _read_lock(lock: Path) -> str | None:
    try:
        return lock.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _describe_holder(pid: int) -> str:
    return json.dumps({
        "host": socket.gethostname(), "boot": _BOOT, "space": _SPACE,
        "pid": pid, "start": _process_start(pid), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID"), "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "key": uuid.uuid4().hex,
    })  # fmt: skip


def _process_start(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None if there is none alive, "" where none can tell."""
    try:
        # The second field is the program's name in brackets, which may hold anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]  # dead, in a container where nobody collects the dead
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def _is_stale(found: str) -> bool:
    """Whether the holder is known to be gone. Of a file that is no lock of ours nothing is known."""
    try:
        holder = json.loads(found)
        if holder["host"] == socket.gethostname() and holder["boot"] != _BOOT:
            return True
        # Containers may share a host's name and not see each other's processes.
        here = (holder["host"], holder["space"]) == (socket.gethostname(), _SPACE)
        if here and _process_start(int(holder["pid"])) != holder["start"]:
            return True
        restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        same_job = holder["job"] is not None and holder["job"] == os.environ.get("SLURM_JOB_ID")
        return same_job and holder["restarts"] < restarts
    except (ValueError, KeyError, TypeError):
        return False


def _explain_refusal(lock: Path, found: str) -> str:
    try:
        holder = json.loads(found)
        job = f", Slurm job {holder['job']}" if holder["job"] else ""
        who = f"process {holder['pid']} on {holder['host']}{job} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        who = "a process that left no name"
    return f"{lock.parent} is in use by {who}; wait for it, or remove {lock} if it is gone"


def main(argv: list[str]) -> int:
    if len(argv) != 3 or not argv[2].isdecimal():
        raise ValueError("give FOLDER NAME PID")
    acquire(Path(argv[0], f"{NAME}-{argv[1]}"), int(argv[2]))
    return 0


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
