"""The table of methods on its floors: one for each data set and noise."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from utils.report.data import FLOORS, METHODS, Run
from utils.significance import difference

LINEAR = "linear_top1"
KNN_PREFERRED = 20  # neighbours: the k that public DINOv2 reports
KINDS = ("best", "final")
NEEDED = ("untrained", "pixels")  # floors that a method must exceed to have learned
CONTENDERS = ("dinov2", "nc", "nct")  # need no denoiser at inference and saw no clean image


@dataclass
class Cell:
    """Best or final figure of one method: a row for each seed, and the epoch (of the only seed)."""

    rows: list[dict]
    epoch: float | None = None

    @property
    def values(self) -> list[float]:
        return [row["value"] for row in self.rows]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    def __str__(self) -> str:
        spread = f" ± {np.std(self.values, ddof=1):.1f}" if len(self.rows) > 1 else ""
        return f"{self.mean:.1f}{spread}"


@dataclass
class Line:
    """One line of the table: a method, or a floor, with one evaluation view."""

    method: str
    name: str
    pretrained: str
    evaluated: str
    runs: list[Run] = field(repr=False)
    cells: dict[tuple[str, str], Cell]  # (metric, "best" | "final")
    floors: list[Line] = field(default_factory=list, repr=False)  # those of this line's own view

    @property
    def seeds(self) -> int:
        return len({run.seed for run in self.runs})

    @property
    def objective(self) -> str:
        return self.runs[0].objective

    def final(self, metric: str) -> Cell | None:
        return self.cells.get((metric, "final"))


@dataclass
class Table:
    """Methods under one noise on one data set."""

    dataset: str
    noise: str
    runs: list[Run]  # without the floors
    metrics: list[str]  # of LINEAR and one kNN, those at hand
    lines: list[Line]  # of the methods
    floors: list[Line]
    kept_out: list[str]  # sentences on floors that don't belong under these methods

    @property
    def title(self) -> str:
        return f"{self.dataset}, {'noisy by nature' if self.noise == 'none' else self.noise}"

    @property
    def trial(self) -> bool:
        return any(run.trial for run in self.runs)

    @property
    def unlabelled(self) -> bool:
        """Whether the runs were evaluated, and none by an accuracy."""
        return not self.metrics and any(run.rows for run in self.runs)

    def by_objective(self) -> dict[str, list[Run]]:
        """The runs of each objective, whose losses and curves have nothing in common with those of another."""
        names = dict.fromkeys(run.objective for run in self.runs)
        return {name: [run for run in self.runs if run.objective == name] for name in names}

    @property
    def val_images(self) -> int | None:
        sizes = {row["details"].get("images") for line in self.lines for c in line.cells.values() for row in c.rows}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def all_lines(self) -> list[Line]:
        """The methods, the floors under them, and the chance level."""
        runs = self.runs + [run for line in self.floors for run in line.runs]
        classes = next((found for run in runs if (found := run.detail("classes"))), None)
        if not classes:
            return self.lines + self.floors
        chance = Cell([{"value": 100 / classes}])
        cells = {(metric, kind): chance for metric in self.metrics for kind in KINDS}
        return [*self.lines, *self.floors, Line("chance", f"Chance, {classes} classes", "–", "–", [], cells)]


def make_tables(runs: list[Run]) -> list[Table]:
    """One table for each data set and noise; an oracle, trained on clean images, is in every table of its data set."""
    floors, runs = [run for run in runs if run.is_floor], [run for run in runs if not run.is_floor]
    if not runs:
        raise ValueError("there are floors only: name the runs that they belong to as well")
    oracles = [run for run in runs if run.view == "clean" and run.noise == "none"]
    groups = {(run.dataset, run.noise): [] for run in runs if run not in oracles}
    groups = groups or {(run.dataset, run.noise): [] for run in runs}
    for (dataset, noise), group in groups.items():
        group += [run for run in runs if run.dataset == dataset and (run.noise == noise or run in oracles)]
    tables = [make_table(dataset, noise, group, floors) for (dataset, noise), group in groups.items()]
    known = {run.dataset for run in runs}
    strange = dict.fromkeys(floor.dataset for floor in floors if floor.dataset not in known)
    tables[0].kept_out += [f"Floors of another data set, {name}, are kept out." for name in strange]
    return tables


def make_table(dataset: str, noise: str, runs: list[Run], floors: list[Run]) -> Table:
    """The table of these runs; of `floors`, which may belong to any table, those that fit."""
    knn = knn_metric(runs)
    metrics = [m for m in (LINEAR, knn) if m and any(run.select(m) for run in runs)]
    runs = sorted(runs, key=lambda run: run.rank)
    names = dict.fromkeys(run.name for run in runs)
    lines = [make_line([run for run in runs if run.name == name], metrics) for name in names]
    own = [f for f in floors if f.dataset == dataset and (f.noise == noise or f.view == "clean")]
    own.sort(key=lambda floor: floor.noise != noise)  # clean ones may have been made under several noises
    table = Table(dataset, noise, runs, metrics, lines, [], [])
    for line in lines:
        line.floors = find_floors(line, own, table)
    return table


def find_floors(line: Line, floors: list[Run], table: Table) -> list[Line]:
    """The floors of the line's own view that fit its runs, also put into the table, which notes why others do not."""
    found = []
    for method in FLOORS:
        fitting = []
        for floor in floors:
            if floor.method == method and floor.view in {view_of(run) for run in line.runs}:
                reason = next((text for run in line.runs if (text := misfit(floor, run))), None)
                if reason is None:
                    fitting += [] if floor.seed in {one.seed for one in fitting} else [floor]
                elif (sentence := f"{floor.name} ({floor.view}) is kept out: {reason}.") not in table.kept_out:
                    table.kept_out.append(sentence)
        known = next((one for one in table.floors if [f.path for f in one.runs] == [f.path for f in fitting]), None)
        if fitting and known is None:
            known = make_line(fitting, table.metrics)
            table.floors.append(known)
        found += [known] if known else []
    return found


def view_of(run: Run) -> str | None:
    """The view that a run is evaluated on: as configured, in older runs as its rows say."""
    return run.view or next((row["view"] for row in reversed(run.rows)), None)


def misfit(floor: Run, run: Run) -> str | None:
    """Why a floor says nothing about a run, in words; None when it does."""
    if floor.detail("images") == 0 or not floor.rows:
        return "it has no validation images"
    checked = {"validation images": [one.detail("images") for one in (floor, run)]}
    checked["pixels of the evaluation crop"] = [floor.crop, run.crop]
    if floor.method == "untrained":
        checked["as its architecture"] = [one.detail("architecture") for one in (floor, run)]
    for what, (its, other) in checked.items():
        if its and other and its != other:
            return f"it has {its} {what}, the runs have {other}"
    return None


def knn_metric(runs: list[Run]) -> str | None:
    """The kNN figure that all runs with kNN rows share: k = 20 where they have it, else the smallest common k."""
    per_run = [{r["metric"] for r in run.rows if re.fullmatch(r"knn\d+_top1", r["metric"])} for run in runs]
    common = set.intersection(*filter(None, per_run)) if any(per_run) else set()
    preferred = f"knn{KNN_PREFERRED}_top1"
    return preferred if preferred in common else min(common, key=lambda m: int(m[3:-5]), default=None)


def make_line(runs: list[Run], metrics: list[str]) -> Line:
    """The line of runs that differ in their seed alone. Epochs are counted on from where a run restarted."""
    cells, shown = {}, []
    for metric in metrics:
        series = [(run.restart, rows) for run in runs if (rows := run.select(metric))]
        shown += [row for _, rows in series for row in rows]
        for kind in KINDS if series else ():
            chosen = [max(rows, key=lambda r: r["value"]) if kind == "best" else rows[-1] for _, rows in series]
            epoch = series[0][0] + chosen[0]["epoch"] if len(chosen) == 1 else None
            cells[metric, kind] = Cell(chosen, epoch)
    views = sorted({row["view"] for row in shown})
    if any(row["protocol"] == "cached" for row in shown if row["metric"] == LINEAR):
        views = [f"{view} (cached probe)" for view in views]
    marks = ["TRIAL"] * any(run.trial for run in runs) + ["collapsed"] * any(run.collapse() for run in runs)
    name = runs[0].name + (f" ({', '.join(marks)})" if marks else "")
    return Line(runs[0].method, name, runs[0].pretrained, ", ".join(views) or "not yet", runs, cells)


def learned(line: Line, metrics: list[str]) -> str:
    """Whether a method learned, in one word.

    yes: above both floors by more than two standard errors under every metric; no: nowhere so, and below a floor
    somewhere; unclear: anything else; unknown: there are no floors of its view.
    """
    if line.method not in METHODS:
        return "–"
    if not any(floor.method in NEEDED for floor in line.floors):
        return "unknown"
    words = set()
    for metric in metrics:
        final = line.final(metric)
        floors = [c for f in line.floors if f.method in NEEDED and (c := f.final(metric))]
        signs = [difference(final.rows, c.rows).sign for c in floors] if final else []
        words.add("no" if -1 in signs else "yes" if len(signs) == len(NEEDED) and set(signs) == {1} else "unclear")
    return "yes" if words == {"yes"} else "no" if "no" in words and "yes" not in words else "unclear"


def is_ahead(line: Line, metric: str, table: Table) -> bool:
    """Whether a contender's final figure is above that of all others, by more than two standard errors."""
    others = [c for one in table.lines if one.method in CONTENDERS and one is not line and (c := one.final(metric))]
    own = line.final(metric) if line.method in CONTENDERS else None
    return bool(own and others) and all(difference(own.rows, other.rows).sign > 0 for other in others)


def title_of(metric: str) -> str:
    """ "linear_top1" → "Linear probe", "knn20_top1" → "kNN, k = 20"."""
    match = re.fullmatch(r"knn(\d+)_top1", metric)
    return f"kNN (k = {match[1]})" if match else "Linear probe" if metric == LINEAR else metric


def markdown(table: Table) -> str:
    """The table for a terminal or a README: top-1 in percent, best over the checkpoints and final."""
    if table.unlabelled:
        return f"{table.title}: no linear probe and no kNN, which need labels; the page has the other figures"
    head = ["Method", "Pretrained on", "Evaluated on"]
    head += [f"{title_of(metric)}, {kind}" for metric in table.metrics for kind in KINDS] + ["Learned"]
    body = [
        [line.name, line.pretrained, line.evaluated]
        + [str(line.cells.get((metric, kind), "–")) for metric in table.metrics for kind in KINDS]
        + [learned(line, table.metrics)]
        for line in table.all_lines
    ]
    widths = [max(len(row[i]) for row in [head, *body]) for i in range(len(head))]
    rows = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [head, *body]]
    figures = range(3, len(head) - 1)
    rule = "|" + "|".join("-" * (w + 1) + (":" if i in figures else "-") for i, w in enumerate(widths)) + "|"
    trial = " (TRIAL: nothing is meant by these figures)" if table.trial else ""
    return "\n".join([f"{table.dataset}, {table.noise}: top-1 accuracy in %{trial}", "", rows[0], rule, *rows[1:]])
