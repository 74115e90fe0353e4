"""Curves of the report: what training logged, each plot with a line on what it shows and what a good one does."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from utils.report_check import section as check_section
from utils.report_data import Run
from utils.report_plots import Series, line_chart
from utils.report_style import captioned, heading, key, legend, slot
from utils.report_table import Table, title_of
from utils.results import read_json_lines

INFORMATION = "Do the targets tell images apart?"
FOLDED = "Schedules, gradients and pace"
ANCHORED = "Anchored losses"


@dataclass(frozen=True)
class Plot:
    """One plot for each column of metrics.jsonl that matches."""

    column: str  # regular expression of the whole name
    note: str
    dashed: str = ""  # column drawn dashed in the same plot, "\\1" being the first group of `column`
    title: str = ""  # likewise; "" is the column's name
    maximum: bool = False  # ln K is drawn
    zero: bool = False  # 0 is drawn, and where a run collapsed


ENTROPY_NOTE = (
    "Entropy of the teacher's targets in nats: solid, the mean of each image's; dashed, that of the mean target. Good: "
    "solid falls clearly below dashed, dashed stays near the maximum ln K. Solid at ln K: all targets are uniform."
)
PLOTS: dict[str, list[Plot]] = {
    INFORMATION: [
        Plot(
            r"information_(\w+)_share",
            "What a target tells about its image, I = H(mean target) − mean H(target), as a share of ln K. Good: "
            "leaves 0 early and stays away from it; at 0 every image has the same target, and nothing is learned.",
            title=r"information of the targets, \1",
            zero=True,
        ),
        Plot(
            r"target_entropy_(?!of_mean)(\w+)",
            ENTROPY_NOTE,
            dashed=r"target_entropy_of_mean_\1",
            title=r"entropy of the targets, \1",
            maximum=True,
        ),
        Plot(
            "teacher_entropy",
            ENTROPY_NOTE + " Over the crops of one batch.",
            dashed="teacher_entropy_of_mean",
            maximum=True,
        ),
    ],
    "Accuracy while training": [
        Plot(
            "live_knn_top1",
            "kNN on the teacher's features, top-1 in %. The first point is what training starts from: an untrained "
            "backbone or, after a restart, the denoised run. Good: rises above it.",
            title="live kNN, top-1 in %",
        ),
    ],
    "Losses": [
        Plot("total_loss", "The sum that is minimised. Good: falls; flat near its first value, nothing is learned."),
        Plot("dino_.*loss", "Cross-entropy with the teacher's targets of the other crop. Good: falls, but not to 0."),
        Plot("ibot_loss", "Cross-entropy with the teacher's targets of masked patches. Good: falls, but not to 0."),
        Plot(
            "koleo_loss", "How close the CLS tokens of a batch lie. Good: falls or stays; rising, they draw together."
        ),
        Plot(r"(?!anchor_).*loss", "A further term of the loss. Good: falls."),
    ],
    ANCHORED: [
        Plot(
            "total_loss", "The sum that the anchored runs minimise: those above, and λ times those below. Good: falls."
        ),
        Plot("anchor_.*loss", "Cross-entropy with the frozen teacher's targets of the denoised view. Good: falls."),
    ],
    "Signs of collapse": [
        Plot(
            "student_entropy", "Entropy of the student's outputs in nats. Good: below the maximum ln K.", maximum=True
        ),
        Plot("prototypes_used", "Share of the prototypes that a batch could favour and does. Good: not near 0."),
        Plot(
            "(cls|bottleneck)_effective_rank",
            r"Directions that the features of a batch spread over. Good: many; near 1, all lie on a line.",
        ),
        Plot(
            "(cls|bottleneck)_norm", "Mean length of the features. Good: settles; growing without end or near 0, not."
        ),
    ],
    FOLDED: [
        Plot("lr|.*_lr", "Learning rate, as scheduled."),
        Plot("weight_decay", "Weight decay, as scheduled."),
        Plot(".*momentum.*", "Share of the old teacher in the new one, as scheduled."),
        Plot(".*temp.*", "Temperature of the teacher's targets, as scheduled: lower, they are sharper."),
        Plot("grad_norm.*", "Length of the gradient before it is clipped. Good: settles, without lasting peaks."),
        Plot("images_per_s", "Images trained on in a second. Good: even."),
        Plot("data_wait", "Share of the time spent waiting for images. Good: near 0."),
    ],
}
DENOISER = [
    Plot(
        "loss", "Its own loss on noisy images; the second term's weight grows. Good: falls, then settles.", title="loss"
    ),
    Plot("psnr", "Denoised validation images against the clean ones. Good: rises.", title="PSNR in dB"),
]


def information_curves(runs: list[Run]) -> str:
    """The first curves of the page: without information in the targets nothing else means anything."""
    drawn = "".join(charts_of(INFORMATION, runs))
    return f'<h3>{INFORMATION}</h3>{legend(runs)}<div class="charts">{drawn}</div>' if drawn else ""


def curves_section(runs: list[Run], group: str, number: int) -> str:
    """Columns of metrics.jsonl in small charts with all runs in them; schedules and pace folded away."""
    parts = []
    for name in PLOTS:
        if name != INFORMATION and (drawn := "".join(charts_of(name, runs))):
            block = f'<div class="charts">{drawn}</div>'
            folded = f"<details><summary>{name}</summary>{block}</details>"
            parts.append(folded if name == FOLDED else f"<h3>{name}</h3>{block}")
    title = heading(f"training{number}", "Training curves" + group)
    note = f'<p class="sub">{epochs_note(runs)}</p>' if epochs_note(runs) else ""
    return f"{title}{note}{legend(runs)}{''.join(parts)}" if parts else ""


def charts_of(section: str, runs: list[Run]) -> Iterator[str]:
    """The charts of one section. The sum of an anchored run has terms that the others lack: an axis of its own."""
    columns = dict.fromkeys(column for run in runs for row in run.metrics for column in row)
    drawn = set()
    for plot in PLOTS[section]:
        for column in columns:
            match = re.fullmatch(plot.column, column)
            if match and column not in drawn and not superseded(column, columns):
                drawn.add(column)
                shown = runs
                if column == "total_loss":
                    shown = [run for run in runs if anchored(run) == (section == ANCHORED)]
                yield chart_of(plot, match, shown)


def anchored(run: Run) -> bool:
    return any(column.startswith("anchor_") for row in run.metrics for column in row)


def superseded(column: str, columns: dict) -> bool:
    """The entropies of one batch, where those over many crops are at hand."""
    return column == "teacher_entropy" and "target_entropy_cls" in columns


def chart_of(plot: Plot, match: re.Match, runs: list[Run]) -> str:
    """One captioned chart of the matched column of all runs."""
    column, dashed = match[0], match.expand(plot.dashed)
    series = [curve(run, column) for run in runs]
    series += [curve(run, dashed, dashed=True) for run in runs] if dashed else []
    levels = [(value, f"ln K = {value:.2f}") for value in sorted(maxima(runs))] if plot.maximum else []
    levels += [(0.0, "")] if plot.zero else []
    title = (match.expand(plot.title) if plot.title else column).replace("_", " ").replace("cls", "CLS")
    ends = {found[1] for run in runs if (found := run.collapse())} if plot.zero else set()
    marks = [(epoch, "collapsed") for epoch in sorted(ends)]
    return captioned(line_chart(series, "epoch", title, marks, levels=levels), plot.note)


def curve(run: Run, column: str, dashed: bool = False) -> Series:
    """A column over the epochs, counted on from the restart."""
    points = [
        (run.restart + row["epoch"], row[column])
        for row in run.metrics
        if "epoch" in row and isinstance(row.get(column), int | float)
    ]
    return Series(run.name, slot(run), [x for x, _ in points], [y for _, y in points], dashed)


def maxima(runs: list[Run]) -> set[float]:
    """ln K of the runs' heads: logged, in older runs from their configs."""
    found = set()
    for run in runs:
        logged = next((row["log_prototypes"] for row in run.metrics if row.get("log_prototypes")), None)
        prototypes = (run.config.get("dino") or {}).get("prototypes")
        found |= {logged or math.log(prototypes)} if logged or prototypes else set()
    return {round(value, 4) for value in found}


def epochs_note(runs: list[Run]) -> str:
    """How the epochs are counted, where that needs saying."""
    return (
        "Epochs of NC and NCT go on counting from the denoised epoch that they restarted from, in tables and plots."
        if any(run.restart for run in runs)
        else ""
    )


def accuracy_curves(table: Table) -> str:
    """Top-1 of the evaluated checkpoints over the epochs."""
    runs, charts = table.runs, []
    marks = [(epoch, "restart") for epoch in sorted({run.restart for run in runs} - {0})]
    note = "Every evaluated checkpoint, on the validation images. Good: rises, and ends above the floors of the table."
    for metric in table.metrics:
        series = []
        for run in runs:
            rows = run.select(metric)
            epochs = [run.restart + row["epoch"] for row in rows]
            series.append(Series(run.name, slot(run), epochs, [row["value"] for row in rows]))
        title = f"{title_of(metric)}, top-1 in %"
        charts.append(captioned(line_chart(series, "epoch", title, marks, markers=True), note))
    if not any(charts):
        return ""
    return f'<h3>Accuracy over epochs</h3>{legend(runs)}<div class="charts">{"".join(charts)}</div>'


def denoiser_section(folders: list[Path]) -> str:
    """The trainings of the denoisers, one curve each, and what Neighbor2Neighbor.check wrote into their folders."""
    names = [denoiser_name(folder) for folder in folders]
    logs = [read_json_lines(folder / "metrics.jsonl") for folder in folders]
    charts = []
    for plot in DENOISER:
        series = []
        for i, (name, rows) in enumerate(zip(names, logs, strict=True)):
            points = [(row["epoch"], row[plot.column]) for row in rows if plot.column in row and "epoch" in row]
            series.append(Series(name, i, [x for x, _ in points], [y for _, y in points]))
        charts.append(captioned(line_chart(series, "epoch", plot.title), plot.note))
    keys = "".join(key(i, name) for i, name in enumerate(names))
    block = f'<ul class="legend">{keys}</ul><div class="charts">{"".join(charts)}</div>'
    checks = "".join(check_section(folder) for folder in folders)
    return heading("denoiser", "Denoiser") + (block if any(charts) else "") + checks if any(charts) or checks else ""


def denoiser_name(folder: Path) -> str:
    """The noise that a denoiser was trained under, as its config says; else the folder."""
    try:
        return str(json.loads((folder / "config.json").read_text())["noise"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder.parent.name}/{folder.name}"
