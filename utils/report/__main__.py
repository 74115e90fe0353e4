"""The report's command line: see utils.report."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from utils import cli, report
from utils.files import write_text
from utils.locks import sweep
from utils.report.data import find_denoisers, find_runs
from utils.report.page import page
from utils.report.table import make_tables, markdown
from utils.report.verdict import verdict

TITLE = "Self-supervised learning on noisy images, without a denoiser at inference"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m utils.report", description=report.__doc__, formatter_class=raw)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    add("--output", type=Path, help="the page (default: report.html in the folder that the runs share)")
    add("--title", default=TITLE)
    denoiser = "folder of a Neighbor2Neighbor training: its curves (those in denoiser/ beside runs are found)"
    add("--denoiser", type=Path, metavar="DIR", action="append", default=[], help=denoiser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
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
    write_text(output, page(runs, options.title, list(denoisers.values())))
    print(f"report: {output}")
    return 0


if __name__ == "__main__":
    cli.run(main)
