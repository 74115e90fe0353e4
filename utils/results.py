"""Rows of results: what evaluators write and the report reads. One JSON object per line, in <run>/results.jsonl.

A row says by itself what it is (method, objective, curriculum, noise, data set, seed, epoch, metric, value, view,
protocol, details, config hash, version, time): nothing is ever read out of a path's name.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from utils.files import naming_errors

FIELDS = ("method", "noise", "dataset", "seed", "epoch", "iteration", "metric", "value", "view", "protocol")
# Method → curriculum of its rows: the images that it trains on, in their order.
CURRICULA = {"dinov2": "none", "nc": "nc", "nct": "nct", "n2n": "denoised", "clean": "clean"}
FLOORS = ("untrained", "pixels", "public")  # methods of rows that no training has gone into
VERSION = "0.2.0"


def append_json(path: Path, row: dict) -> None:
    """Appends one JSON line in one write, after closing a line that a killed process left half-written.

    OSError names the file, also where the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_errors(path), open(path, "a+b") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(row) + "\n").encode())


def read_json_lines(path: Path) -> list[dict]:
    """All whole lines of a JSON-lines file; a missing file is empty. A line cut by a kill is skipped, as is any other
    that is no JSON object.
    """
    if not Path(path).exists():
        return []
    rows = []
    for line in Path(path).read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
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
    """Rows of one results.jsonl, or of <path>/results.jsonl when `path` is a run's folder; others are left out.

    Rows of before there were other objectives are DINOv2's, and their curriculum follows from their method.
    """
    path = Path(path)
    rows = [row for row in read_json_lines(path / "results.jsonl" if path.is_dir() else path) if _is_result(row)]
    return [what_is_learned(row["method"], "dinov2") | row for row in rows]


def what_is_learned(method: str, objective: str) -> dict[str, str]:
    """The fields objective and curriculum of a row; a floor has no objective."""
    return {"objective": objective if method in CURRICULA else "", "curriculum": CURRICULA.get(method, "none")}


def _is_result(row: dict) -> bool:
    """Whether append_result() may have written it: every field is there and of its type."""
    texts = ("method", "noise", "dataset", "metric", "view", "protocol")
    numbers = ("epoch", "iteration", "value", "seed")
    return (
        all(isinstance(row.get(field), str) for field in texts)
        and all(is_number(row.get(field)) for field in numbers)
        and isinstance(details := row.get("details"), dict)
        and all(is_number(details[key]) for key in ("images", "classes", "seconds") if key in details)
    )


def is_number(value: object) -> bool:
    """Whether a value read from JSON is a number that a float can hold."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
