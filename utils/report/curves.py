"""Curves of the report: what training and evaluation logged, each plot with a line on what it shows (words.yaml)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from utils.report.data import WORDS, Run, denoiser_name, slot
from utils.report.plots import Chart, Series, line_chart
from utils.report.table import Table, title_of
from utils.results import read_json_lines

INFORMATION, FOLDED = "Do the targets tell images apart?", "Schedules, gradients and pace"
ANCHORED, DENOISER, LABEL_FREE = "Anchored losses", "Denoiser", "Figures without labels"
NOTE = "Every evaluated checkpoint, on the validation images. Good: rises, and ends above the floors of the table."


@dataclass(frozen=True)
class Plot:
    """One entry of words.yaml, which says what the fields are."""

    column: str
    note: str
    dashed: str = ""
    title: str = ""
    maximum: bool = False
    zero: bool = False

    def heading(self, match: re.Match) -> str:
        return (match.expand(self.title) or match[0]).replace("_", " ").replace("cls", "CLS")


PLOTS = {section: [Plot(**entry) for entry in entries] for section, entries in WORDS["plots"].items()}


def training(runs: list[Run]) -> dict | None:
    """Columns of metrics.jsonl in small charts with all runs in them; schedules and pace folded away."""
    shown = {name: list(draw_section(name, runs)) for name in PLOTS if name not in (INFORMATION, DENOISER, LABEL_FREE)}
    shown = {name: charts for name, charts in shown.items() if charts}
    return {"runs": runs, "shown": shown, "folded": FOLDED} if shown else None


def draw_section(section: str, runs: list[Run]) -> Iterator[Chart]:
    """The charts of one section. The sum of an anchored run has terms that the others lack: an axis of its own."""
    columns = dict.fromkeys(column for run in runs for row in run.metrics for column in row)
    if "target_entropy_cls" in columns:
        columns.pop("teacher_entropy", None)  # of one batch, where that over many crops is at hand
    drawn = set()
    for plot in PLOTS[section]:
        for column in columns:
            match = re.fullmatch(plot.column, column)
            if match and column not in drawn:
                drawn.add(column)
                shown = runs
                if column == "total_loss":
                    shown = [run for run in runs if is_anchored(run) == (section == ANCHORED)]
                yield from draw_column(plot, match, shown)


def is_anchored(run: Run) -> bool:
    return any(column.startswith("anchor_") for row in run.metrics for column in row)


def draw_column(plot: Plot, match: re.Match, runs: list[Run]) -> list[Chart]:
    """The chart of the matched column of all runs."""
    dashed = match.expand(plot.dashed)
    series = [run_series(run, match[0]) for run in runs]
    series += [run_series(run, dashed, dashed=True) for run in runs] if dashed else []
    levels = [(value, f"ln K = {value:.2f}") for value in sorted(find_maxima(runs))] if plot.maximum else []
    levels += [(0.0, "")] if plot.zero else []
    ends = {found[1] for run in runs if (found := run.collapse())} if plot.zero else set()
    marks = [(epoch, "collapsed") for epoch in sorted(ends)]
    return line_chart(series, "epoch", plot.heading(match), plot.note, marks, levels=levels)


def make_series(
    name: str, number: int, rows: list[dict], column: str, start: float = 0, dashed: bool = False
) -> Series:
    """A column of rows over their epochs, which go on from `start`."""
    found = [(start + row["epoch"], row[column]) for row in rows if "epoch" in row and column in row]
    return Series(name, number, [x for x, _ in found], [y for _, y in found], dashed)


def run_series(run: Run, column: str, dashed: bool = False) -> Series:
    """A column of the run's log over the epochs, counted on from the restart."""
    return make_series(run.name, slot(run), run.metrics, column, run.restart, dashed)


def find_maxima(runs: list[Run]) -> set[float]:
    """ln K of the runs' heads: logged, in older runs from their configs."""
    found = set()
    for run in runs:
        logged = next((row["log_prototypes"] for row in run.metrics if row.get("log_prototypes")), None)
        prototypes = (run.config.get("dino") or {}).get("prototypes")
        found |= {logged or math.log(prototypes)} if logged or prototypes else set()
    return {round(value, 4) for value in found}


def results(table: Table) -> dict:
    """The table, what it says about floors and the paper's ordering; of each objective, whether its targets tell images
    apart, and its accuracy over epochs."""
    objectives, charts = table.by_objective(), []
    for name, runs in objectives.items():
        accuracy = [draw_evaluated(runs, metric, f"{title_of(metric)}, top-1 in %", NOTE) for metric in table.metrics]
        prefix = f"{name}: " if len(objectives) > 1 else ""
        charts.append((prefix, runs, list(draw_section(INFORMATION, runs)), list(chain(*accuracy))))
    return {"table": table, "charts": charts}


def draw_evaluated(runs: list[Run], metric: str, title: str, note: str) -> list[Chart]:
    """A metric of the evaluated checkpoints over the epochs, with the restarts marked."""
    series = [make_series(run.name, slot(run), run.select(metric), "value", run.restart) for run in runs]
    marks = [(epoch, "restart") for epoch in sorted({run.restart for run in runs} - {0})]
    return line_chart(series, "epoch", title, note, marks, markers=True)


def denoisers(folders: list[Path]) -> dict | None:
    """The trainings of the denoisers, one curve each."""
    names = [denoiser_name(folder) for folder in folders]
    logs = [read_json_lines(folder / "metrics.jsonl") for folder in folders]
    charts = []
    for plot in PLOTS[DENOISER]:
        series = [
            make_series(name, i, rows, plot.column) for i, (name, rows) in enumerate(zip(names, logs, strict=True))
        ]
        charts += line_chart(series, "epoch", plot.title or plot.column, plot.note)
    return {"names": names, "charts": charts} if charts else None
