"""What the report knows: runs, the table of methods, and what the figures say about the paper's ordering."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from utils.results import read_json_lines, read_results

METHODS = {  # label of the rows: (name, pretrained on), in the paper's order from worst to best
    "dinov2": ("DINOv2", "noisy"),
    "nc": ("DINOv2 w/ NC", "denoised, then noisy"),
    "nct": ("DINOv2 w/ NCT", "denoised, then noisy, anchored"),
    "n2n": ("N2N + DINOv2", "denoised"),
    "clean": ("DINOv2 (clean)", "clean"),
}
RANK = {method: i for i, method in enumerate(METHODS)}
SHORT = {"dinov2": "DINOv2", "nc": "NC", "nct": "NCT", "n2n": "N2N + DINOv2", "clean": "clean"}
EQUAL_ALLOWED = {"n2n", "clean"}  # NCT <= N2N + DINOv2 <= clean; up to NCT each is strictly above the one before
LINEAR = "linear_top1"
KNN_PREFERRED = 20  # neighbours: the k that public DINOv2 reports


@dataclass
class Run:
    """One run's folder: its config and whatever it has written so far."""

    path: Path
    config: dict
    rows: list[dict] = field(repr=False)
    metrics: list[dict] = field(repr=False)

    @property
    def method(self) -> str:
        return str(self.config.get("method", self.path.name))

    @property
    def noise(self) -> str:
        return str(self.config.get("noise", "none"))

    @property
    def dataset(self) -> str:
        data = self.config.get("data") or {}
        return str(data.get("name") or Path(str(data.get("root") or "?")).resolve().name)

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @property
    def name(self) -> str:
        return METHODS.get(self.method, (self.method, ""))[0]

    @property
    def stages(self) -> list[dict]:
        return (self.config.get("curriculum") or {}).get("stages") or []

    @property
    def restart(self) -> float:
        """Epochs of earlier stages whose weights the last one starts from; 0 for a run from scratch."""
        epochs = 0.0
        for before, stage in pairwise(self.stages):
            start = stage.get("from_epoch") or before.get("stop") or before.get("epochs") or 0
            epochs = 0.0 if (stage.get("init") or "scratch") == "scratch" else epochs + start
        return epochs

    @property
    def view(self) -> str | None:
        """The view that the run is meant to be evaluated on."""
        view = (self.config.get("eval") or {}).get("view") or (self.stages[-1].get("view") if self.stages else None)
        return "noisy" if view == "mix" else view

    def select(self, metric: str) -> list[dict]:
        """Rows of one metric under the run's own noise, view and data, in order of epochs; of equal epochs the last
        written.

        Protocols are never mixed: the one with the most epochs is taken, of equals the exact one.
        """
        protocols: dict[str, dict[float, dict]] = {}
        for row in self.rows:
            own = (
                row["noise"] == self.noise
                and row["dataset"] == self.dataset
                and row["view"] == (self.view or row["view"])
            )
            if row["metric"] == metric and own and isinstance(row["value"], int | float):
                protocols.setdefault(row["protocol"], {})[row["epoch"]] = row
        chosen = max(protocols, key=lambda name: (len(protocols[name]), name == "exact"), default=None)
        return [protocols[chosen][epoch] for epoch in sorted(protocols[chosen])] if chosen else []

    @property
    def trained_noise(self) -> str:
        """The noise of the images that the run trained on: none for the clean ceiling."""
        return "none" if self.view == "clean" else self.noise

    def robustness(self) -> dict[str, dict[str, float]]:
        """{metric: {noise: percent}} of the rows robustness_*, of the last epoch that has them."""
        rows = [row for row in self.rows if row["metric"].startswith("robustness_")]
        last = max((row["epoch"] for row in rows), default=None)
        found: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["epoch"] == last:
                found.setdefault(row["metric"], {})[row["noise"]] = row["value"]
        return found


def read_run(path: Path) -> Run:
    """Raises ValueError, naming the file, when there is no readable config."""
    config_path = path / "config.yaml"
    if not config_path.is_file():
        raise ValueError(f"{path} is no run: it has no config.yaml (name folders that dinov2.train wrote)")
    try:
        config = dict(OmegaConf.to_container(OmegaConf.load(config_path), resolve=True))
    except Exception as error:  # YAML, OmegaConf and the disk each have errors of their own
        raise ValueError(f"{config_path} can't be read: {error}") from error
    return Run(path, config, read_results(path), read_json_lines(path / "metrics.jsonl"))


def find_runs(paths: list[Path]) -> list[Run]:
    """The runs named, and those directly in a named folder that is no run itself; in the order of METHODS."""
    found: dict[Path, Run] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is no folder")
        folders = [path] if (path / "config.yaml").is_file() else sorted(p.parent for p in path.glob("*/config.yaml"))
        if not folders:
            raise ValueError(f"{path} holds no run: no config.yaml in it or directly below it")
        for folder in folders:
            found.setdefault(folder.resolve(), read_run(folder))
    return sorted(found.values(), key=lambda r: (r.dataset, r.noise, RANK.get(r.method, len(RANK)), r.method, r.seed))


def knn_metric(runs: list[Run]) -> str | None:
    """The kNN figure that all runs with kNN rows share: k = 20 where they have it, else the smallest common k."""
    per_run = [{r["metric"] for r in run.rows if re.fullmatch(r"knn\d+_top1", r["metric"])} for run in runs]
    common = set.intersection(*filter(None, per_run)) if any(per_run) else set()
    preferred = f"knn{KNN_PREFERRED}_top1"
    return preferred if preferred in common else min(common, key=lambda m: int(m[3:-5]), default=None)


@dataclass
class Cell:
    """Best or final figure of one method: mean over seeds, their spread, and the epoch (of the only seed)."""

    values: list[float]
    epoch: float | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    def __str__(self) -> str:
        spread = f" ± {np.std(self.values, ddof=1):.1f}" if len(self.values) > 1 else ""
        return f"{self.mean:.1f}{spread}"


@dataclass
class Line:
    """One line of the table: a method with one evaluation view."""

    method: str
    name: str
    pretrained: str
    evaluated: str
    seeds: int
    cells: dict[tuple[str, str], Cell]  # (metric, "best" | "final")


@dataclass
class Table:
    """Methods under one noise on one data set."""

    dataset: str
    noise: str
    runs: list[Run]
    metrics: list[str]  # of LINEAR and one kNN, those at hand
    lines: list[Line]
    val_images: int | None


def make_tables(runs: list[Run]) -> list[Table]:
    """One table for each data set and noise; a ceiling trained on clean images stands in all of its data set's."""
    ceilings = [run for run in runs if run.view == "clean" and run.noise == "none"]
    groups = {(run.dataset, run.noise): [] for run in runs if run not in ceilings}
    groups = groups or {(run.dataset, run.noise): [] for run in runs}
    for (dataset, noise), group in groups.items():
        group += [run for run in runs if run.dataset == dataset and (run.noise == noise or run in ceilings)]
    return [_table(dataset, noise, group) for (dataset, noise), group in groups.items()]


def _table(dataset: str, noise: str, runs: list[Run]) -> Table:
    knn = knn_metric(runs)
    metrics = [m for m in (LINEAR, knn) if m and any(run.select(m) for run in runs)]
    runs = sorted(runs, key=lambda run: (RANK.get(run.method, len(RANK)), run.method, run.seed))
    methods = dict.fromkeys(run.method for run in runs)
    lines = [_line([run for run in runs if run.method == method], metrics) for method in methods]
    sizes = {r["details"].get("images") for run in runs for m in metrics for r in run.select(m)}
    return Table(dataset, noise, runs, metrics, lines, sizes.pop() if len(sizes) == 1 else None)


def _line(runs: list[Run], metrics: list[str]) -> Line:
    cells = {}
    for metric in metrics:
        series = [rows for run in runs if (rows := run.select(metric))]
        if not series:
            continue
        best = [max(rows, key=lambda r: r["value"]) for rows in series]
        for kind, chosen in (("best", best), ("final", [rows[-1] for rows in series])):
            epoch = chosen[0]["epoch"] if len(chosen) == 1 else None
            cells[metric, kind] = Cell([r["value"] for r in chosen], epoch)
    views = sorted({r["view"] for run in runs for metric in metrics for r in run.select(metric)})
    if any(r["protocol"] == "cached" for run in runs for r in run.select(LINEAR)):
        views = [f"{view} (cached probe)" for view in views]
    name, pretrained = METHODS.get(runs[0].method, (runs[0].method, ""))
    return Line(runs[0].method, name, pretrained, ", ".join(views) or "not yet", len({run.seed for run in runs}), cells)


def title_of(metric: str) -> str:
    """ "linear_top1" → "Linear probe", "knn20_top1" → "kNN, k = 20"."""
    match = re.fullmatch(r"knn(\d+)_top1", metric)
    return f"kNN (k = {match[1]})" if match else "Linear probe" if metric == LINEAR else metric


def markdown(table: Table) -> str:
    """The table for a terminal or a README: top-1 in percent, best over the checkpoints and final."""
    head = ["Method", "Pretrained on", "Evaluated on"]
    head += [f"{title_of(m)}, {kind}" for m in table.metrics for kind in ("best", "final")]
    body = [
        [line.name, line.pretrained, line.evaluated]
        + [str(line.cells.get((m, kind), "–")) for m in table.metrics for kind in ("best", "final")]
        for line in table.lines
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [head, *body]]
    rule = "|" + "|".join("-" * (w + 2) if i < 3 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([f"{table.dataset}, {table.noise}: top-1 accuracy in %", "", rows[0], rule, *rows[1:]])


def verdict(table: Table) -> list[str]:
    """Sentences on whether the paper's ordering, DINOv2 < NC < NCT <= N2N + DINOv2 <= clean, shows in this table."""
    by_method = {line.method: line for line in table.lines}
    sentences = []
    for metric in table.metrics:
        cells = {m: by_method[m].cells.get((metric, "best")) for m in METHODS if m in by_method}
        values = {m: value.mean for m, value in cells.items() if value is not None}
        if len(values) > 1:
            sentences.append(f"{title_of(metric)}: {ordering(values)}")
    if not sentences:
        return []
    missing = [METHODS[m][0] for m in METHODS if m not in by_method and not (m == "clean" and table.noise == "none")]
    if missing:
        sentences.append(f"Not among these runs: {', '.join(missing)}.")
    if all(line.seeds == 1 for line in table.lines):
        sentences.append("One seed each: the spread between seeds is not known.")
    if table.val_images:
        margin = 100 * 1.96 * (0.25 / table.val_images) ** 0.5
        sentences.append(
            f"With {table.val_images} validation images a figure near 50\u00a0% is known to about ±{margin:.1f} "
            "points (95\u00a0%): smaller differences say little."
        )
    return sentences


def ordering(values: dict[str, float]) -> str:
    """One sentence on {method: percent}, methods in the paper's order: whether each is where the paper has it."""
    chain, expected, wrong = list(values), SHORT[next(iter(values))], []
    for low, high in pairwise(chain):
        equal = high in EQUAL_ALLOWED and low != "dinov2"
        expected += f" {'≤' if equal else '<'} {SHORT[high]}"
        if values[low] > values[high] or (values[low] == values[high] and not equal):
            than = "is above" if values[low] > values[high] else "equals"
            wrong.append(f"{SHORT[low]} ({values[low]:.1f}) {than} {SHORT[high]} ({values[high]:.1f})")
    if not wrong:
        return f"the paper's ordering, {expected}, shows."
    return f"the paper's ordering, {expected}, does not show: {'; '.join(wrong)}."
