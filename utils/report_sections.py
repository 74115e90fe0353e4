"""Sections of the report beside its tables and curves; each returns markup, or "" when the runs hold nothing for it."""

from __future__ import annotations

import numpy as np
from omegaconf import OmegaConf

from utils.report_data import Run
from utils.report_pictures import rankings
from utils.report_plots import Series, line_chart
from utils.report_style import captioned, cell, esc, head_of, heading, label, legend, slot, table_html
from utils.report_table import title_of


def robustness_section(runs: list[Run], group: str, number: int) -> str:
    """Rows robustness_*: accuracy against sigma, and every noise in a table with the trained one marked."""
    present = [run for run in runs if run.robustness()]
    metrics = sorted({metric for run in present for metric in run.robustness()}, reverse=True)
    if not present:
        return ""
    charts, tables = [], []
    for metric in metrics:
        values = {run.path: run.robustness().get(metric, {}) for run in present}  # noise: percent
        title, curves = title_of(metric.removeprefix("robustness_")), []
        for run in present:
            points = sorted(
                (sigma_of(noise), value) for noise, value in values[run.path].items() if sigma_of(noise) >= 0
            )
            curves.append(Series(run.name, slot(run), [x for x, _ in points], [y for _, y in points]))
        marks = [(sigma, "trained") for sigma in sorted({sigma_of(run.trained_noise) for run in present}) if sigma > 0]
        ticks = sorted({x for one in curves for x in one.x})
        axis = "σ of the Gaussian noise (0: clean)"
        chart = line_chart(curves, axis, f"{title}, top-1 in %", marks, markers=True, x_ticks=ticks)
        charts.append(captioned(chart, "Good: falls slowly to the right, and does not fall to the left of its noise."))
        noises = list(dict.fromkeys(noise for run in present for noise in values[run.path]))
        head = [cell(title, "th"), *[cell("clean" if noise == "none" else noise, "th", "n") for noise in noises]]
        body = []
        for run in present:
            figures = [f"{values[run.path][noise]:.1f}" if noise in values[run.path] else "–" for noise in noises]
            css = ["n trained top" if noise == run.trained_noise else "n" for noise in noises]
            body.append([cell(label(run, present), "th"), *map(cell, figures, ["td"] * len(noises), css)])
        tables.append(table_html([head], body))
    note = "One checkpoint under every noise, read as it comes; shaded: the noise that it was trained with."
    charts = f'{legend(present)}<div class="charts">{"".join(charts)}</div>' if any(charts) else ""
    title = heading(f"robustness{number}", "Robustness to other noises" + group)
    return f'{title}<p class="sub">{note}</p>{charts}{"".join(tables)}'


def sigma_of(noise: str) -> float:
    """Standard deviation of a Gaussian noise, 0 for none, -1 for the other kinds."""
    return 0.0 if noise == "none" else float(noise.removeprefix("gauss")) if noise.startswith("gauss") else -1.0


def retrieval_section(runs: list[Run]) -> str:
    """mAP of each run on each set of landmarks, and the first images of a few rankings."""
    entries: dict[tuple, dict] = {}
    for run in runs:
        for row in run.rows:
            if row["metric"] in ("map_easy", "map_medium", "map_hard"):
                key = (run.path, row["dataset"], row["protocol"], row["epoch"])
                entries.setdefault(key, {"run": run})[row["metric"]] = row
    if not entries:
        return ""
    levels = ("easy", "medium", "hard")
    head = head_of(["Method", "Set", "Epoch", "Protocol"], [(level.title(), ["mAP", "mP@10"]) for level in levels])
    body = []
    for (_, dataset, protocol, epoch), entry in entries.items():
        run = entry["run"]
        line = [cell(label(run, runs), "th"), cell(dataset), cell(f"{run.restart + epoch:g}"), cell(protocol)]
        for level in levels:
            row = entry.get(f"map_{level}")
            precision = row["details"].get("mean_precision_at", {}).get("10") if row else None
            figures = (row["value"] if row else None, precision)
            line += [cell("–" if figure is None else f"{figure:.1f}", css="n") for figure in figures]
        body.append(line)
    pictures = [rankings(label(run, runs), path) for run in runs for path in sorted(run.path.glob("retrieval/*.json"))]
    note = (
        "Revisited Oxford and Paris. Rankings: green easy, blue hard, red wrong; junk is left out, as in the figures."
    )
    title = heading("retrieval", "Instance recognition")
    return f'{title}<p class="sub">{note}</p>' + table_html(head, body) + "".join(pictures)


def cost_section(runs: list[Run]) -> str:
    """What each run took, as its own logs have it; of a curriculum the last stage."""
    head = [cell("Run", "th")]
    head += [cell(text, "th", "n") for text in ("Epochs", "Training", "Images/s", "GPU memory", "Evaluation")]
    body = []
    for run in runs:
        epochs = max((r["epoch"] for r in run.metrics if "epoch" in r), default=None)
        rates = [r["images_per_s"] for r in run.metrics if "images_per_s" in r]
        memory = max((r["gpu_memory_gb"] for r in run.metrics if "gpu_memory_gb" in r), default=None)
        figures = [
            "–" if epochs is None else f"{epochs:g}",
            duration(sum(r.get("seconds", 0) for r in run.metrics)),
            f"{np.median(rates):,.0f}" if rates else "–",
            "–" if memory is None else f"{memory:.1f} GB",
            duration(sum(r["details"].get("seconds", 0) for r in run.rows)),
        ]
        body.append([cell(label(run, runs), "th"), *[cell(figure, css="n") for figure in figures]])
    note = "NC and NCT: the noisy stage alone; the denoised stage before it is the denoised run, which they share."
    note = f'<p class="sub">{note}</p>' if any(run.restart for run in runs) else ""
    return heading("cost", "Cost") + table_html([head], body) + note


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best; nothing measured is a dash."""
    if seconds <= 0:
        return "–"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def configs_section(runs: list[Run]) -> str:
    parts = []
    for run in runs:
        text = esc(OmegaConf.to_yaml(OmegaConf.create(run.config)))
        path = f'<span class="sub">{esc(str(run.path))}</span>'
        parts.append(f"<details><summary>{esc(label(run, runs))} {path}</summary><pre>{text}</pre></details>")
    return heading("configs", "Configurations") + "".join(parts)


def environment_section(runs: list[Run]) -> str:
    """Machine, code and command of each run's latest start."""
    known = [(run, entries) for run in runs if (entries := run.environment)]
    if not known:
        return ""
    head = [cell(text, "th") for text in ("Run", "Started", "Commit", "Processor", "Memory", "GPU", "Versions", "Host")]
    body, commands = [], []
    for run, entries in known:
        last = entries[-1]
        versions = ", ".join(f"{name} {value}" for name, value in (last.get("versions") or {}).items() if value)
        starts = f", start {len(entries)}" if len(entries) > 1 else ""
        figures = [
            f"{str(last.get('time', '–'))[:16].replace('T', ' ')}{starts}",
            short_commit(last.get("commit")),
            f"{last.get('processor') or '–'}, {last.get('cores') or '?'} cores",
            f"{last['memory']} GB" if last.get("memory") else "–",
            last.get("gpu") or "none",
            versions,
            last.get("host") or "–",
        ]
        body.append([cell(label(run, runs), "th"), *map(cell, figures)])
        commands += [f"# {label(run, runs)}, {entry.get('time', '')}\n{entry.get('command', '')}" for entry in entries]
    shown = f"<details><summary>Commands</summary><pre>{esc(chr(10).join(commands))}</pre></details>"
    return heading("environment", "Environment") + table_html([head], body) + shown


def short_commit(commit: str | None) -> str:
    """The first ten digits, and whether the code was changed."""
    return "not in a repository" if not commit else commit[:10] + commit[40:]
