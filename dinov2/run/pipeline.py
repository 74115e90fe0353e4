"""How the commands of a pipeline are run: each once, printed, until the first that fails; one after another, or those
that do not need each other side by side.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dinov2.run.commands import Crew, execute, say
from utils.files import write_text


class CommandFailed(Exception):
    """A command ended with an exit code other than 0. name: of its step, where others ran beside it."""

    def __init__(self, code: int, name: str = ""):
        ends = "; those beside it were told to end, and go on when this is called again" if name else ""
        super().__init__(f"stopped: {name or 'the command above'} ended with exit code {code}{ends}")
        self.code = code


@dataclass(frozen=True)
class Step:
    """One command: the words after the name of Python. name: of its mark, "" for a command that is run each time.
    state: what it read, as sums() and tree_state() tell it. note: said in place of a command. after: names of the steps
    that must have ended before it, where it may run beside others; None: it runs alone.
    """

    command: list[str]
    name: str = ""
    state: str = ""
    note: str = ""
    after: tuple[str, ...] | None = None


@dataclass
class Runner:
    """Runs steps in the working folder. A mark in <output>/.done says that the very same command ended well in the same
    state. It is written last: an interrupted command is run again, and goes on by itself.
    """

    output: str
    dry: bool = False
    jobs: int = 1  # commands side by side

    def run(self, steps: Iterable[Step]) -> None:
        """Each in turn, but those that may run beside others together; CommandFailed ends it. A step that runs alone is
        asked for when the one before has ended.
        """
        together: list[Step] = []
        for step in steps:
            if step.note:
                print(step.note, flush=True)
            elif step.after is not None and self.jobs > 1 and not self.dry:
                together.append(step)
            else:
                self._run_together(together)
                together = []
                self._run_alone(step)
        self._run_together(together)

    def _run_alone(self, step: Step) -> None:
        if self._is_due(step):
            if code := execute(step.command):
                raise CommandFailed(code)
            self._mark(step)

    def _run_together(self, steps: list[Step]) -> None:
        """At most `jobs` at a time, in their order as far as what they wait for has ended."""
        named = {step.name: step for step in steps}  # once each: a seed may have been asked for twice
        first = [step for step in named.values() if not named.keys() & set(step.after or ())]
        if len(first) < 2:
            for step in named.values():
                self._run_alone(step)
            return
        waiting, running = list(named.values()), Crew(min(self.jobs, len(first)))
        with running:
            while waiting or running.names:
                unfinished = {step.name for step in waiting} | running.names
                ready = [step for step in waiting if not unfinished & set(step.after or ())]
                for step in ready[: running.free]:
                    waiting.remove(step)
                    if self._is_due(step):
                        running.start(step.name, step.command)
                for name, code in running.wait():
                    if code:
                        raise CommandFailed(code, name)
                    self._mark(named[name])

    def _is_due(self, step: Step) -> bool:
        """Says what is done about a step; False: nothing."""
        finished = step.name and not self.dry and _read(self._mark_of(step)) == self._content_of(step)
        say("finished before:" if finished else "+", step.command)
        return not (finished or self.dry)

    def _mark(self, step: Step) -> None:
        if step.name:
            write_text(self._mark_of(step), self._content_of(step))

    def _mark_of(self, step: Step) -> Path:
        return Path(self.output, ".done", step.name)

    def _content_of(self, step: Step) -> str:
        return json.dumps([step.command, step.state])


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


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
