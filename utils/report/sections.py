"""Sections of the report beside its tables and curves: each returns what its macro draws, or None for nothing."""

from __future__ import annotations

import re

import numpy as np
from omegaconf import OmegaConf

from utils.environment import read_environment
from utils.report.curves import LABEL_FREE, PLOTS, draw_evaluated
from utils.report.data import Run, label, slot, sort_key
from utils.report.plots import Series, line_chart
from utils.report.table import title_of

LEVELS = ("easy", "medium", "hard")  # of landmarks
SHOWN = r"(linear|knn\d+)_top1|robustness_.*|map_(easy|medium|hard|explained)"  # metrics that other sections show


def robustness(runs: list[Run]) -> dict | None:
    """Rows robustness_*: accuracy against sigma, and every noise in a table with the trained one marked."""
    found = {run.path: run.robustness() for run in runs}  # metric: noise: percent
    present = [run for run in runs if found[run.path]]
    metrics = sorted({metric for values in found.values() for metric in values}, reverse=True)
    charts, tables = [], []
    for metric in metrics:
        values = [found[run.path].get(metric, {}) for run in present]
        title, curves = title_of(metric.removeprefix("robustness_")), []
        for run, percents in zip(present, values, strict=True):
            points = sorted((sigma, value) for noise, value in percents.items() if (sigma := sigma_of(noise)) >= 0)
            curves.append(Series(run.name, slot(run), [x for x, _ in points], [y for _, y in points]))
        marks = [(sigma, "trained") for sigma in sorted({sigma_of(run.trained_noise) for run in present}) if sigma > 0]
        note = "Good: falls slowly to the right, and does not fall to the left of its noise."
        axis, ticks = "σ of the Gaussian noise (0: clean)", sorted({x for one in curves for x in one.x})
        charts += line_chart(curves, axis, f"{title}, top-1 in %", note, marks, markers=True, x_ticks=ticks)
        noises = list(dict.fromkeys(noise for percents in values for noise in percents))
        tables.append((title, noises, list(zip(present, values, strict=True))))
    return {"runs": present, "charts": charts, "tables": tables} if present else None


def sigma_of(noise: str) -> float:
    """Standard deviation of a Gaussian noise, 0 for none, -1 for the other kinds."""
    return 0.0 if noise == "none" else float(noise.removeprefix("gauss")) if noise.startswith("gauss") else -1.0


def label_free(runs: list[Run]) -> dict | None:
    """Figures without labels, and all others that no section of their own shows: the last of each run."""
    last = {
        (run.path, row["metric"], row["view"]): row
        for run in runs
        for row in sorted(run.rows, key=lambda row: row["epoch"])
        if not re.fullmatch(SHOWN, row["metric"])
    }
    known = {plot.column: plot for plot in PLOTS[LABEL_FREE]}
    keys = sorted({key[1:] for key in last}, key=lambda key: (sort_key(known, key[0]), key[1]))
    columns = [(metric, view, known[metric].title if metric in known else metric) for metric, view in keys]
    present = [run for run in runs if any(key[0] == run.path for key in last)]
    plots = [plot for plot in known.values() if plot.column in dict(keys)]
    charts = [chart for plot in plots for chart in draw_evaluated(present, plot.column, plot.title, plot.note)]
    notes = [plot for plot in plots if plot.note not in {chart.note for chart in charts}]
    return {"runs": present, "columns": columns, "last": last, "charts": charts, "notes": notes} if present else None


def retrieval(runs: list[Run]) -> dict | None:
    """mAP and mP@10 of each run on each set of landmarks."""
    entries: dict[tuple, dict] = {}
    for run in runs:
        for row in run.rows:
            if row["metric"] in (f"map_{level}" for level in LEVELS):
                key = (label(run, runs), row["dataset"], run.restart + row["epoch"], row["protocol"])
                precision = row["details"].get("mean_precision_at", {}).get("10")
                entries.setdefault(key, {})[row["metric"].removeprefix("map_")] = (row["value"], precision)
    return {"levels": LEVELS, "entries": entries} if entries else None


def cost(runs: list[Run]) -> dict:
    """What each run took, as its own logs have it; of a curriculum the last stage."""
    lines = []
    for run in runs:
        epochs, rates, memory, seconds = (
            [row[column] for row in run.metrics if column in row]
            for column in ("epoch", "images_per_s", "gpu_memory_gb", "seconds")
        )
        lines.append({
            "epochs": max(epochs, default=None), "training": sum(seconds), "memory": max(memory, default=None),
            "rate": float(np.median(rates)) if rates else None,
            "evaluation": sum(row["details"].get("seconds", 0) for row in run.rows),
        })  # fmt: skip
    return {"runs": runs, "lines": lines}


def environment(runs: list[Run]) -> dict | None:
    """Machine, code and command of each run's latest start."""
    known = [(label(run, runs), entries) for run in runs if (entries := read_environment(run.path))]
    return {"known": known} if known else None


def configs(runs: list[Run]) -> dict:
    return {"shown": [(label(run, runs), run.path, OmegaConf.to_yaml(OmegaConf.create(run.config))) for run in runs]}
