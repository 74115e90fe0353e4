"""The report over any set of runs: a table for the terminal, and one self-contained HTML page of all there is to see.

    python -m utils.report runs/imagenet100 [--output report.html] [--title "..."] [--denoiser runs/n2n-gauss255]

Runs are folders that dinov2.train and dinov2.eval wrote (config.yaml, metrics.jsonl, results.jsonl, pca.npz,
retrieval/), or folders that hold such folders; floors/ and denoiser/ beside them are found. The page has no script and
asks nothing of a network; it reads in light, dark and on a phone.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from utils import cli
from utils.files import atomic_path
from utils.locks import sweep
from utils.report_curves import accuracy_curves, curves_section, denoiser_section, epochs_note, information_curves
from utils.report_data import Run, find_denoisers, find_runs
from utils.report_pictures import noise_grid, pca_section
from utils.report_sections import (
    configs_section,
    cost_section,
    environment_section,
    retrieval_section,
    robustness_section,
)
from utils.report_style import CSS, cell, esc, head_of, heading, table_html
from utils.report_table import KINDS, Line, Table, learned, make_tables, markdown, title_of
from utils.report_verdict import TRIAL, collapses, verdict
from utils.results import VERSION
from utils.significance import difference

TITLE = "Self-supervised learning on noisy images, without a denoiser at inference"
CONTENDERS = ("dinov2", "nc", "nct")  # need no denoiser at inference and saw no clean image


def results_section(table: Table) -> str:
    """The table, what it says about floors and the paper's ordering, and accuracy over epochs."""
    groups = [(title_of(metric), list(KINDS)) for metric in table.metrics]
    head = head_of(["Method", "Pretrained on", "Evaluated on"], groups, "wide")
    head[0].append(cell("", "th", "blank"))
    head[1].append(cell("Learned", "th", "learned"))
    rows = []
    for line in table.all_lines:
        brief = f'<small class="narrow">{esc(line.pretrained)}; read {esc(line.evaluated)}</small>'
        row = [cell(esc(line.name) + brief, "th", raw=True)]
        row += [cell(line.pretrained, css="wide"), cell(line.evaluated, css="wide")]
        row += [figure(line, metric, kind, table) for metric in table.metrics for kind in KINDS]
        rows.append([*row, cell(learned(line, table.metrics), css="learned")])
    sentences = "".join(f"<p>{esc(sentence)}</p>" for sentence in verdict(table))
    finding = f'<div class="finding">{sentences}</div>' if sentences else ""
    quiet = len(table.all_lines) - len(table.lines)
    caption = f'<p class="sub">{CAPTION} {epochs_note(table.runs)}</p>'
    curves = information_curves(table.runs) + accuracy_curves(table)
    return table_html(head, rows, quiet=quiet) + caption + finding + curves


CAPTION = (
    "Top-1 accuracy in %. Final: the last checkpoint; best: the highest of all evaluated ones, chosen on the "
    "validation images themselves. Bold: above every other method that needs no denoiser at inference and saw no clean "
    "image, by more than two standard errors. Learned: above an untrained backbone and the raw pixels of the same "
    "view, by as much, in every final figure."
)


def figure(line: Line, metric: str, kind: str, table: Table) -> str:
    """A cell of the table: the mean over the seeds; of the best checkpoint its epoch; bold where it is ahead."""
    value = line.cells.get((metric, kind))
    best = kind == "best" and value and value.epoch is not None and line in table.lines
    epoch = f"<small>ep. {value.epoch:g}</small>" if best else ""
    css = "n top" if kind == "final" and is_ahead(line, metric, table) else "n"
    return cell(esc(str(value or "–")) + epoch, css=css, raw=True)


def is_ahead(line: Line, metric: str, table: Table) -> bool:
    """Whether a contender's final figure is above that of all others, by more than two standard errors."""
    others = [c for one in table.lines if one.method in CONTENDERS and one is not line and (c := one.final(metric))]
    own = line.final(metric) if line.method in CONTENDERS else None
    return bool(own and others) and all(difference(own.rows, other.rows).sign > 0 for other in others)


def part(make: Callable[..., str], *arguments) -> str:
    """One section; where a run's files do not bear it, a note in its place, so that the others are still there."""
    try:
        return make(*arguments)
    except Exception as error:  # what is read here may have been damaged in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"{make.__name__.replace('_', ' ')} is left out: {reason}"
        print(f"warning: {reason}", file=sys.stderr)
        return f'<p class="sub">{esc(reason)}</p>'


def page(runs: list[Run], title: str, denoisers: Sequence[Path] = ()) -> str:
    """The whole page as one string of HTML."""
    tables, parts, tail = make_tables(runs), [], []
    runs = [run for run in runs if not run.is_floor]
    for i, table in enumerate(tables):
        name = f"{table.dataset}, {'noisy by nature' if table.noise == 'none' else table.noise}"
        parts.append(heading(f"results{i}", name))
        parts += [part(make, table) for make in (results_section, noise_grid, pca_section)]
        group = f": {name}" if len(tables) > 1 else ""
        tail += [part(make, table.runs, group, i) for make in (robustness_section, curves_section)]
    parts += [*tail[::2], part(retrieval_section, runs), *tail[1::2], part(denoiser_section, denoisers)]
    parts += [part(make, runs) for make in (cost_section, environment_section, configs_section)]
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
        f'<header><h1>{esc(title)}</h1><p class="sub">{esc(about)}</p>{banner(runs)}<nav>{links}</nav></header>'
        f"<main>{body}</main>"
        f"<footer>Made by utils.report, version {esc(VERSION)}, from the runs' own logs.</footer></body></html>\n"
    )


def banner(runs: list[Run]) -> str:
    """What must be seen before any figure: a trial, a collapse."""
    said = ([TRIAL] if any(run.trial for run in runs) else []) + collapses(runs)
    return f'<div class="banner">{"".join(f"<p>{esc(sentence)}</p>" for sentence in said)}</div>' if said else ""


def main(argv: list[str] | None = None) -> int:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m utils.report", description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the folder that the runs share)")
    parser.add_argument("--title", default=TITLE)
    parser.add_argument(
        "--denoiser",
        type=Path,
        metavar="DIR",
        action="append",
        default=[],
        help="folder of a Neighbor2Neighbor training: its curves (those in denoiser/ beside runs are found)",
    )
    options = parser.parse_args(argv)
    for folder in options.denoiser:
        if not (folder / "metrics.jsonl").is_file():
            raise ValueError(f"--denoiser {folder}: no metrics.jsonl in it; name the folder of a denoiser's training")
    runs = find_runs(options.runs)
    denoisers = {folder.resolve(): folder for folder in [*options.denoiser, *find_denoisers(runs)]}
    for table in make_tables(runs):
        print(markdown(table), end="\n\n")
        print("\n".join(verdict(table)), end="\n\n")
    shared = os.path.commonpath([run.path.resolve() for run in runs if not run.is_floor])
    output = options.output or Path(shared) / "report.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    sweep(output.parent)
    with atomic_path(output) as temporary:
        temporary.write_text(page(runs, options.title, list(denoisers.values())), encoding="utf-8")
    print(f"report: {output}")
    return 0


if __name__ == "__main__":
    cli.run(main)
