"""What a run writes while it trains: metrics.jsonl, and the same to TensorBoard."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from utils.results import append_json


class MetricsLog:
    """write({"iteration": i, …numbers…}) → one JSON line and TensorBoard scalars. Main rank only."""

    def __init__(self, run: Path):
        self.path = Path(run) / "metrics.jsonl"
        self.board = SummaryWriter(str(Path(run) / "tensorboard"))

    def write(self, row: dict) -> None:
        append_json(self.path, row)
        for key, value in row.items():
            if isinstance(value, int | float) and key != "iteration":
                self.board.add_scalar(key, value, row["iteration"])

    def close(self) -> None:
        self.board.close()
