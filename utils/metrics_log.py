"""What a run writes while it trains: metrics.jsonl, and the same to TensorBoard."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from utils.files import naming_errors, write_text
from utils.results import append_json, read_json_lines


class MetricsLog:
    """write({"iteration": i, …numbers…}) → one JSON line and TensorBoard scalars. Main rank only.

    clock: the key that counts the steps. after: the step that the run goes on from; rows of later steps, which it will
    write again, are dropped (None: all are kept).
    """

    def __init__(self, run: Path, clock: str = "iteration", after: int | None = None):
        from torch.utils.tensorboard import SummaryWriter  # here, as it loads slowly

        self.path, self.clock = Path(run) / "metrics.jsonl", clock
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if after is not None:
            rows = [row for row in read_json_lines(self.path) if row[clock] <= after]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        self.folder = Path(run) / "tensorboard"
        threading.excepthook = _print_unless_raised_again
        with naming_errors(self.folder):
            self.board = SummaryWriter(str(self.folder), purge_step=after + 1 if after else None)

    def write(self, row: dict) -> None:
        append_json(self.path, row)
        with naming_errors(self.folder):
            for key, value in row.items():
                if isinstance(value, int | float) and key != self.clock:
                    self.board.add_scalar(key, value, row[self.clock])

    def close(self) -> None:
        with naming_errors(self.folder):
            self.board.close()


def _print_unless_raised_again(arguments: threading.ExceptHookArgs) -> None:
    """What TensorBoard's own thread can't write is raised by the next write or close, which name the folder."""
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)
