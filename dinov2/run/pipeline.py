"""How the commands of a pipeline are run: one after another, each once, printed, until the first that fails."""

import hashlib
import json
import os
import shlex
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dinov2.run.options import PYTHON
from utils.files import write_text

ROOT = Path(__file__).resolve().parents[2]  # of the packages


class CommandFailed(Exception):
    """A command ended with an exit code other than 0."""

    def __init__(self, code: int):
        super().__init__(f"stopped: the command above ended with exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Step:
    """One command: the words after the name of Python. name: of its mark, "" for a command that is run each time.
    state: what it read, as sums() and tree_state() tell it. note: said in place of a command.
    """

    command: list[str]
    name: str = ""
    state: str = ""
    note: str = ""


@dataclass
class Runner:
    """Runs steps in the working folder. A mark in <output>/.done says that the very same command ended well in the same
    state. It is written last: an interrupted command is run again, and goes on by itself.
    """

    output: str
    dry: bool = False

    def run(self, steps: Iterable[Step]) -> None:
        """Each in turn; a step is asked for when the one before has ended. CommandFailed ends it."""
        for step in steps:
            mark, content = Path(self.output, ".done", step.name), json.dumps([step.command, step.state])
            if step.note:
                print(step.note, flush=True)
            elif step.name and not self.dry and mark.is_file() and mark.read_text(errors="replace") == content:
                say("finished before:", step.command)
            else:
                say("+", step.command)
                if self.dry:
                    continue
                if code := execute(step.command):
                    raise CommandFailed(code)
                if step.name:
                    write_text(mark, content)


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
    return 128 - code if code < 0 else code


def environment() -> dict[str, str]:
    """This process's, in which the packages are found wherever they lie."""
    path = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [path])])}


def sums(*files: Path | str) -> str:
    """Names and checksums of the files that exist: another text, once the content of one has changed."""
    found = [(str(file), hashlib.sha256(Path(file).read_bytes()).hexdigest()) for file in files if Path(file).is_file()]
    return " ".join(f"{name} {digest[:16]}" for name, digest in found)


def tree_state(*folders: str) -> str:
    """A checksum that changes with the data: names, sizes and times of what lies in the folders and of every folder
    below them, without a look at every image. Hidden files, such as the list of images, are left out.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for line in _describe_entries(folder, ()):
            digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _describe_entries(folder: str, above: tuple[str, ...]) -> Iterable[str]:
    """above: real paths of the folders on the way down, against looping links."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if not entry.name.startswith(".") and (not above or entry.is_dir()):
                yield f"{entry.path} {entry.stat().st_size} {entry.stat().st_mtime_ns}"
                if entry.is_dir():
                    yield from _describe_entries(entry.path, (*above, real))
    except OSError as error:
        yield str(error.strerror)
