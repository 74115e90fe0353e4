"""How commands of ours are run, by the same Python: one by itself, or several side by side."""

import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from dinov2.run.options import PYTHON

ROOT = Path(__file__).resolve().parents[2]  # of the packages
POLL_SECONDS = 0.05
RELAY_SECONDS = 5.0  # for the last lines of a command that has ended; what it left running may hold its output open


def say(mark: str, command: list[str]) -> None:
    """Print a command as a shell would read it back."""
    print(mark, shlex.join([PYTHON, *command]), flush=True)


def execute(command: list[str]) -> int:
    """The exit code of a command of ours, 128 + the signal where one ended it."""
    process = subprocess.Popen([PYTHON, *command], env=environment())
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal has told the command too, which ends in its own way
        code = process.wait() or 130
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    return _shell_code(code)


def _shell_code(code: int) -> int:
    return 128 - code if code < 0 else code


def environment() -> dict[str, str]:
    """This process's, in which the packages are found wherever they lie."""
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [path])])}


class Crew:
    """Commands side by side, each with its part of the cores; every line that one prints begins with its name.
    As a context manager: those that still run are ended with it.
    """

    def __init__(self, size: int):
        self.size = size
        self.commands: dict[str, subprocess.Popen] = {}
        self.relays: list[threading.Thread] = []
        threads = str(max(1, (os.cpu_count() or 1) // size))
        self.environment = {"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"} | environment()

    @property
    def free(self) -> int:
        return self.size - len(self.commands)

    @property
    def names(self) -> set[str]:
        return set(self.commands)

    def start(self, name: str, command: list[str]) -> None:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        process = subprocess.Popen([PYTHON, *command], env=self.environment, **pipes)
        self.commands[name] = process
        self.relays.append(threading.Thread(target=_relay, args=(process.stdout, name), daemon=True))
        self.relays[-1].start()

    def wait(self) -> list[tuple[str, int]]:
        """Those that have ended, at least one where any runs, with their exit codes as execute() gives them."""
        ended: dict[str, int] = {}
        while self.commands and not ended:
            codes = {name: process.poll() for name, process in self.commands.items()}
            ended = {name: _shell_code(code) for name, code in codes.items() if code is not None}
            if not ended:
                time.sleep(POLL_SECONDS)
        for name in ended:
            del self.commands[name]
        return list(ended.items())

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for process in self.commands.values():
            if kind is not KeyboardInterrupt:  # of which the terminal has told them
                process.terminate()
        for process in self.commands.values():
            process.wait()
        for relay in self.relays:
            relay.join(RELAY_SECONDS)


def _relay(lines: Iterable[str], name: str) -> None:
    for line in lines:
        text = line.removesuffix("\n")
        print(f"{name} | {text}\n", end="", flush=True)  # in one piece: others print too
