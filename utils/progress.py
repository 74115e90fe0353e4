"""One progress bar for every tool: tqdm on a terminal, a plain line every few seconds where the output is none."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from utils.text import duration

PLAIN_SECONDS = 10.0  # between two plain lines: a Slurm log of a day stays under 10,000 lines
RECENT_LINES = 6  # that the pace is measured over


class Progress:
    """Counts finished units and shows the rate, the time left and a few values.

    Both are of the last minute: what came before the first unit, such as features that are cached once, is no measure
    of the rest.
    Use as a context manager with `update(n, **values)`, or iterate `progress(...)`.
    """

    def __init__(self, total: int | None, desc: str, unit: str = "it", initial: int = 0, enabled: bool = True):
        self.total, self.desc, self.unit, self.done, self.initial = total, desc, unit, initial, initial
        self.enabled, self.values = enabled, ""
        self.started = self.last_line = time.monotonic()
        self.printed = initial  # units done when the last plain line was printed
        self.marks: deque[tuple[float, int]] = deque(maxlen=RECENT_LINES)  # time and units done, from the first unit on
        interactive = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=desc, unit=unit, initial=initial, smoothing=0.1) if interactive else None

    def update(self, n: int = 1, **values: object) -> None:
        self.done += n
        if not self.marks and n:
            self._note_pace()
            if self.bar is not None:
                self.bar.unpause()
        if values:
            self.values = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
        if self.bar is not None:
            if values:
                self.bar.set_postfix_str(self.values, refresh=False)
            self.bar.update(n)
        elif self.enabled and time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self._print_line()

    def _note_pace(self) -> None:
        self.marks.append((time.monotonic(), self.done))

    def _print_line(self) -> None:
        self.printed = self.done
        of, pace = f"/{self.total}" if self.total else "", ""
        since, before = self.marks[0] if self.marks else (0.0, self.done)
        if self.done > before:
            rate = (self.done - before) / max(time.monotonic() - since, 1e-9)
            pace = f", {rate:.3g} {self.unit}/s" if rate < 1 else f", {rate:.1f} {self.unit}/s"
            pace += f", {duration((self.total - self.done) / rate)} left" if self.total else ""
        self._note_pace()
        print(f"{self.desc}: {self.done}{of} {self.unit}{pace} {self.values}".rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.enabled and self.printed != self.done and time.monotonic() - self.started >= 2.0:
            self._print_line()


def progress(iterable: Iterable, total: int | None = None, desc: str = "", unit: str = "it") -> Iterator:
    """Yields from `iterable` while showing progress; `total` defaults to its length."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    with Progress(total, desc, unit) as bar:
        for item in iterable:
            yield item
            bar.update(1)
