"""Rows of results: what evaluators write and the report reads. One JSON object a line, in <run>/results.jsonl.

A row says by itself what it is (method, noise, data set, seed, epoch, metric, value, view, protocol, details, config
hash, version, time): nothing is ever read out of a path's name.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from utils.files import named

FIELDS = ("method", "noise", "dataset", "seed", "epoch", "iteration", "metric", "value", "view", "protocol")
FLOORS = ("untrained", "pixels", "public")  # methods of rows that no training has gone into
VERSION = "0.1.0"


def append_json(path: Path, row: dict) -> None:
    """Appends one JSON line in one write, after closing a line that a killed process left half-written.

    OSError names the file, also where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with named(path), open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(row) + "\n").encode())


def read_json_lines(path: Path) -> list[dict]:
    """All whole lines of a JSON-lines file; a missing file is empty, a line cut by a kill is skipped."""
    if not Path(path).exists():
        return []
    rows = []
    for line in Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def append_result(path: Path, row: dict) -> None:
    """Appends a result row; missing `details`, `config_hash`, `version` and `time` are filled in.

    Raises ValueError when one of FIELDS is missing: a row without them can't be told apart later.
    """
    missing = [field for field in FIELDS if field not in row]
    if missing:
        raise ValueError(f"result row for {path} lacks {', '.join(missing)}")
    defaults = {"details": {}, "config_hash": "", "version": VERSION, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    append_json(Path(path), defaults | row)


def read_results(path: Path) -> list[dict]:
    """Rows of one results.jsonl, or of <path>/results.jsonl when `path` is a run's folder."""
    path = Path(path)
    return read_json_lines(path / "results.jsonl" if path.is_dir() else path)
