"""Tables of features: a name and its float32 values per row, as .parquet, .npy or .csv, written whole or not at all.

.parquet: columns path (text) and features (lists of one length; values with several axes are flattened, and their shape
is in the file's metadata). .npy: the values, with the paths in the same order in NAME.names.csv beside it. .csv:
columns path, f0, f1, …
"""

import csv
import fcntl
import io
import json
import math
import re
from pathlib import Path

import numpy as np

from utils.files import atomic_path
from utils.results import append_json, read_json_lines

SUFFIXES = (".parquet", ".npy", ".csv")
GROUP = 1024  # rows that are in memory at a time


def check_table(path: Path, shape: tuple[int, ...]) -> None:
    """ValueError if no table of rows of this shape can be written to path."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}")
    if path.exists():
        raise ValueError(f"{path} exists already: remove it or name another output")
    if path.suffix == ".csv" and len(shape) > 1:
        raise ValueError(f"{path} would have {math.prod(shape)} columns: name a .npy or .parquet")
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ValueError(f"{path} needs pyarrow: pip install pyarrow, or name a .npy or .csv") from None


def names_path(path: Path) -> Path:
    """The file with the names of the rows of a .npy."""
    return path.with_suffix(".names.csv")


def write_table(path: Path, names: list[str], values: np.ndarray) -> None:
    """values: float32 [N, ...], which may be mapped from a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            _write_parquet(temporary, names, values)
        elif path.suffix == ".csv":
            _write_csv(temporary, names, values)
        else:
            with atomic_path(names_path(path)) as beside:
                _write_csv(beside, names, np.empty((len(names), 0), np.float32))
            with open(temporary, "wb") as file:
                np.save(file, values, allow_pickle=False)


def _write_csv(path: Path, names: list[str], values: np.ndarray) -> None:
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:  # paths to the letter
        writer = csv.writer(file)
        writer.writerow(["path", *(f"f{i}" for i in range(values.shape[1]))])
        # Nine digits are enough to read each float32 back exactly.
        writer.writerows([name, *(f"{value:.9g}" for value in row)] for name, row in zip(names, values, strict=True))


def _write_parquet(path: Path, names: list[str], values: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = math.prod(values.shape[1:])
    fields = [("path", pa.string()), ("features", pa.list_(pa.float32(), width))]
    schema = pa.schema(fields, metadata={"shape": json.dumps(values.shape[1:])})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(names), GROUP):
            flat = pa.array(np.asarray(values[start : start + GROUP]).reshape(-1))
            columns = [pa.array(names[start : start + GROUP]), pa.FixedSizeListArray.from_arrays(flat, width)]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


class PartialRows:
    """Rows as they are computed, in order. With an output they are kept in a hidden file beside it, from which a killed
    call with the same key resumes; otherwise in memory.

    next: the first item that is not done yet. bad: items without a row, and why.
    """

    def __init__(self, output: Path | None, shape: tuple[int, ...], key: str = ""):
        self.shape, self.next, self.bad = shape, 0, {}
        self.path = output and output.with_name(f".{output.name}.{key}.rows")
        if self.path is None:
            self.rows = io.BytesIO()
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.log = self.path.with_suffix(".log")
        self.rows = open(self.path, "a+b")
        try:
            fcntl.flock(self.rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{output} is being written by another process: wait for it or name another") from None
        self._resume()

    def _resume(self) -> None:
        for line in read_json_lines(self.log):
            self.next, self.bad = line["next"], self.bad | line["bad"]
        end = (self.next - len(self.bad)) * 4 * math.prod(self.shape)
        if self.path.stat().st_size < end:  # the machine crashed before the rows were on the disk
            self.next, self.bad, end = 0, {}, 0
            self.log.unlink()
        self.rows.truncate(end)

    def append(self, values: np.ndarray, bad: dict[str, str]) -> None:
        """Adds the rows of the next items, and those of these items that have none."""
        self.rows.write(np.ascontiguousarray(values, np.float32).tobytes())
        self.next, self.bad = self.next + len(values) + len(bad), self.bad | bad
        if self.path is not None:
            self.rows.flush()
            append_json(self.log, {"next": self.next, "bad": bad})

    def values(self) -> np.ndarray:
        """All rows: float32 [N, ...], mapped from the file if there is one."""
        if self.path is None:
            return np.frombuffer(self.rows.getbuffer(), np.float32).reshape(-1, *self.shape)
        return np.memmap(self.path, np.float32, "r").reshape(-1, *self.shape)

    def remove(self) -> None:
        """Removes these rows and those of earlier calls with other keys. values() stays valid."""
        if self.path is None:
            return
        self.rows.close()
        name = self.path.name.rsplit(".", 2)[0]
        for path in self.path.parent.iterdir():
            if re.fullmatch(re.escape(name) + r"\.[0-9a-f]{16}\.(rows|log)", path.name):
                path.unlink(missing_ok=True)
