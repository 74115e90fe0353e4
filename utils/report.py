"""The report over any set of runs: a table for the terminal, and one self-contained HTML page of all there is to see.

    python -m utils.report runs/imagenet100 [--output report.html] [--title "..."] [--denoiser runs/n2n-gauss255]

Runs are folders that dinov2.train and dinov2.eval wrote (config.yaml, metrics.jsonl, results.jsonl, pca.npz,
retrieval/), or folders that hold such folders. The page has no script and asks nothing of a network; it reads in light,
dark and on a phone.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from utils import cli
from utils.images import atomic_path
from utils.report_data import Run, Table, find_runs, make_tables, markdown, title_of, verdict
from utils.report_pictures import noise_grid, pca_section, rankings
from utils.report_plots import Series, line_chart
from utils.report_style import CSS, SLOTS, cell, esc, head_of, heading, label, legend, slot, table_html
from utils.results import VERSION, read_json_lines

TITLE = "Self-supervised learning on noisy images, without a denoiser at inference"
FOLDED = "Schedules, gradients and pace"
CURVES = {  # heading: columns of metrics.jsonl
    "Losses": "loss",
    "Signs of collapse": "entropy|rank|prototypes|cls_norm|knn",
    "Denoiser": "$^",  # from the denoiser's own log
    FOLDED: "^lr$|last_layer_lr|weight_decay|momentum|temp|grad_norm|images_per_s|data_wait",
}

# Sections: each returns markup, or "" when the runs hold nothing for it.


def results_section(table: Table) -> str:
    """The table, what it says about the paper's ordering, and accuracy over epochs."""
    groups = [(title_of(metric), ["best", "final"]) for metric in table.metrics]
    head = head_of(["Method", "Pretrained on", "Evaluated on"], groups, "wide")
    contenders = [line for line in table.lines if line.method in ("dinov2", "nc", "nct")]
    rows = []
    for line in table.lines:
        brief = f'<small class="narrow">{esc(line.pretrained)}; read {esc(line.evaluated)}</small>'
        row = [cell(esc(line.name) + brief, "th", raw=True)]
        row += [cell(line.pretrained, css="wide"), cell(line.evaluated, css="wide")]
        for key in [(metric, kind) for metric in table.metrics for kind in ("best", "final")]:
            value = line.cells.get(key)
            top = max((c.cells[key].mean for c in contenders if key in c.cells), default=None)
            css = "n top" if value and line in contenders and value.mean == top else "n"
            epoch = (
                f"<small>ep. {value.epoch:g}</small>" if value and value.epoch is not None and key[1] == "best" else ""
            )
            row.append(cell(esc(str(value or "–")) + epoch, css=css, raw=True))
        rows.append(row)
    caption = (
        "Top-1 accuracy in %. Best: the highest of all evaluated checkpoints; final: the last one. Bold: the best of "
        "the methods that need no denoiser at inference and saw no clean image."
    )
    sentences = "".join(f"<p>{esc(sentence)}</p>" for sentence in verdict(table))
    finding = f'<div class="finding">{sentences}</div>' if sentences else ""
    return table_html(head, rows) + f'<p class="sub">{caption}</p>' + finding + accuracy_curves(table)


def accuracy_curves(table: Table) -> str:
    runs, charts = table.runs, []
    for metric in table.metrics:
        series = []
        for run in runs:
            rows = run.select(metric)
            epochs = [run.restart + row["epoch"] for row in rows]
            series.append(Series(run.name, slot(run), epochs, [row["value"] for row in rows]))
        marks = [(epoch, "restart") for epoch in sorted({run.restart for run in runs} - {0})]
        if any(len(one.x) > 1 for one in series):
            charts.append(line_chart(series, "epoch", f"{title_of(metric)}, top-1 in %", marks, markers=True))
    if not charts:
        return ""
    note = "Epochs of NC and NCT go on counting from the denoised epoch that they restarted from."
    note = f'<p class="sub">{note}</p>' if any(run.restart for run in runs) else ""
    return f'<h3>Accuracy over epochs</h3>{legend(runs)}<div class="charts">{"".join(charts)}</div>{note}'


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
        charts.append(line_chart(curves, axis, f"{title}, top-1 in %", marks, markers=True, x_ticks=ticks))
        noises = list(dict.fromkeys(noise for run in present for noise in values[run.path]))
        head = [cell(title, "th"), *[cell("clean" if noise == "none" else noise, "th", "n") for noise in noises]]
        body = []
        for run in present:
            figures = [f"{values[run.path][noise]:.1f}" if noise in values[run.path] else "–" for noise in noises]
            css = ["n trained top" if noise == run.trained_noise else "n" for noise in noises]
            body.append([cell(label(run, present), "th"), *map(cell, figures, ["td"] * len(noises), css)])
        tables.append(table_html([head], body))
    note = "One checkpoint under every noise, read as it comes; shaded: the noise that it was trained with."
    charts = f'{legend(present)}<div class="charts">{"".join(charts)}</div>'
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
        line = [cell(label(entry["run"], runs), "th"), cell(dataset), cell(f"{epoch:g}"), cell(protocol)]
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


def curves_section(runs: list[Run], denoiser: Path | None, group: str, number: int) -> str:
    """Every numeric column of metrics.jsonl in a small chart with all runs in it; schedules and pace folded away."""
    rows = [row for run in runs for row in run.metrics]
    columns = dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float))
    charts: dict[str, list[str]] = {name: [] for name in CURVES}
    for column in columns:
        name = next((name for name, pattern in CURVES.items() if re.search(pattern, column)), None)
        series = []
        for run in runs:
            points = [(run.restart + r["epoch"], r[column]) for r in run.metrics if column in r and "epoch" in r]
            series.append(Series(run.name, slot(run), [x for x, _ in points], [y for _, y in points]))
        if name and any(len(one.x) > 1 for one in series):
            charts[name].append(line_chart(series, "epoch", column.replace("_", " ")))
    own = read_json_lines(denoiser / "metrics.jsonl") if denoiser else []
    for column, title in (("loss", "loss"), ("psnr", "PSNR in dB")):
        points = [(r["epoch"], r[column]) for r in own if column in r and "epoch" in r]
        if len(points) > 1:
            series = [Series("denoiser", len(SLOTS), [x for x, _ in points], [y for _, y in points])]
            charts["Denoiser"].append(line_chart(series, "epoch", title))
    parts = []
    for name, drawn in charts.items():
        block = f'<div class="charts">{"".join(drawn)}</div>'
        if drawn:
            folded = f"<details><summary>{name}</summary>{block}</details>"
            parts.append(folded if name == FOLDED else f"<h3>{name}</h3>{block}")
    title = heading(f"training{number}", "Training curves" + group)
    names = legend(runs) if any(run.metrics for run in runs) else ""
    return f"{title}{names}{''.join(parts)}" if parts else ""


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


def page(runs: list[Run], title: str, denoiser: Path | None = None) -> str:
    """The whole page as one string of HTML."""
    tables, parts, tail = make_tables(runs), [], []
    for i, table in enumerate(tables):
        name = f"{table.dataset}, {'noisy by nature' if table.noise == 'none' else table.noise}"
        parts += [heading(f"results{i}", name), results_section(table), noise_grid(table), pca_section(table)]
        group = f": {name}" if len(tables) > 1 else ""
        tail += [robustness_section(table.runs, group, i), curves_section(table.runs, denoiser, group, i)]
    parts += [*tail[::2], retrieval_section(runs), *tail[1::2]]
    parts += [cost_section(runs), configs_section(runs)]
    body = "".join(parts)
    links = "".join(f'<a href="#{i}">{name}</a>' for i, name in re.findall(r'<h2 id="(\w+)">(.*?)</h2>', body))
    seeds = sorted({run.seed for run in runs})
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    about = (
        f"{count}, {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}; {time.strftime('%d %B %Y')}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{CSS}</style></head><body>"
        f'<header><h1>{esc(title)}</h1><p class="sub">{esc(about)}</p><nav>{links}</nav></header><main>{body}</main>'
        f"<footer>Made by utils.report, version {esc(VERSION)}, from the runs' own logs.</footer></body></html>\n"
    )


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m utils.report", description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the folder that the runs share)")
    parser.add_argument("--title", default=TITLE)
    parser.add_argument(
        "--denoiser", type=Path, metavar="DIR", help="folder of the Neighbor2Neighbor training: its curves"
    )
    options = parser.parse_args(argv)
    if options.denoiser is not None and not (options.denoiser / "metrics.jsonl").is_file():
        raise ValueError(
            f"--denoiser {options.denoiser}: no metrics.jsonl in it; name the folder of a denoiser's training"
        )
    runs = find_runs(options.runs)
    for table in make_tables(runs):
        print(markdown(table), end="\n\n")
        print("\n".join(verdict(table)), end="\n\n")
    output = options.output or Path(os.path.commonpath([run.path.resolve() for run in runs])) / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as temporary:
        temporary.write_text(page(runs, options.title, options.denoiser), encoding="utf-8")
    print(f"report: {output}")
    return 0


if __name__ == "__main__":
    cli.run(main)
