"""What a run writes while it trains: metrics.jsonl, and the same to TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from utils.images import atomic_path
from utils.results import append_json, read_json_lines


class MetricsLog:
    """write({"iteration": i, …numbers…}) → one JSON line and TensorBoard scalars. Main rank only.

    done: iterations of the checkpoint that the run goes on from. Rows of later ones, which a killed run wrote, are
    dropped: they come again.
    """

    def __init__(self, run: Path, done: int = 0):
        self.path = Path(run) / "metrics.jsonl"
        rows = [row for row in read_json_lines(self.path) if done and row["iteration"] <= done]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.board = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=done + 1 if done else None)

    def write(self, row: dict) -> None:
        append_json(self.path, row)
        for key, value in row.items():
            if isinstance(value, int | float) and key != "iteration":
                self.board.add_scalar(key, value, row["iteration"])

    def close(self) -> None:
        self.board.close()
