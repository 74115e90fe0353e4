"""Runs of a tool in a process of its own, killed or interrupted in their midst."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 60  # after which a run counts as hanging


def start(main: Callable[[list[str]], int], argv: list[str], log: Path) -> int:
    """Fork a process that runs main(argv) as the command line would; its output goes to log. Returns its id.

    A fork spares the seconds in which a new Python would load torch.
    """
    child = os.fork()
    if child:
        return child
    try:
        # A shell's background job inherits SIGINT ignored; here it is what Ctrl-C sends to a job in the foreground.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        from utils import cli

        cli.run(lambda: main(argv))
    except SystemExit as exit:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit.code or 0)
    finally:
        os._exit(70)  # a traceback


def end(child: int, sign: int | None = None) -> int:
    """Signal the process, wait for its end, return its exit code (negative: the signal that ended it).

    SIGKILL goes to its whole group where it leads one, as when a machine goes down.
    """
    if sign is not None:
        leads = sign == signal.SIGKILL and os.getpgid(child) == child
        (os.killpg if leads else os.kill)(child, sign)
    for _ in range(SECONDS * 100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError("the run does not end")


def wait_for(condition: Callable[[], bool], child: int) -> bool:
    """Whether the condition comes true before the process ends."""
    for _ in range(SECONDS * 200):
        if condition():
            return True
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.005)
    raise AssertionError("the run does not get on")


def contents(root: Path) -> dict[str, bytes]:
    """Every file below root."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
