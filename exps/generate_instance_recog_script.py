"""Writes instance_recog.sh: Revisited Oxford and Paris for the best and the final checkpoint of every run.

    python exps/generate_instance_recog_script.py [RUN...] [--data OXFORD_PARIS_DATASET_PATH/data/datasets]
    sh instance_recog.sh

RUN: run folders, or folders that hold some (default runs/imagenet100). The best checkpoint is the one with the highest
linear probe in the run's results.jsonl; a run without a probe takes part with its final one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils import cli
from utils.files import write_text
from utils.results import FLOORS, read_results
from utils.yaml_files import load_yaml

ROOT = Path(__file__).resolve().parents[1]


def find_runs(folders: list[Path]) -> list[Path]:
    """Run folders among and below the given ones, without floors, which have no checkpoints.

    Raises ValueError when there are none.
    """
    configs = {config for folder in folders for config in folder.glob("**/config.yaml")}
    runs = sorted(config.parent for config in configs if load_yaml(config).get("method") not in FLOORS)
    if not runs:
        raise ValueError(f"no runs in {', '.join(map(str, folders))}: pretrain first (sh exps/linear_probe.sh)")
    return runs


def chosen_checkpoints(run: Path) -> list[str]:
    """What to pass as checkpoints=: the best epoch by linear probe, if there is one, and the final one."""
    probes = [row for row in read_results(run) if row["metric"] == "linear_top1"]
    if not probes:
        return ["last"]
    best = max(probes, key=lambda row: row["value"])["epoch"]
    return [str(best)] if best == max(row["epoch"] for row in probes) else [str(best), "last"]


def main() -> None:
    """Writes the script into the current folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", default=[ROOT / "runs/imagenet100"])
    parser.add_argument("--data", type=Path, default=Path("datasets"), help="holds roxford5k/ and rparis6k/")
    arguments = parser.parse_args()
    lines = ["#!/bin/sh", "# Made by exps/generate_instance_recog_script.py.", "set -eu"]
    lines += [f"cd {shlex.quote(str(ROOT))}", ". exps/env.sh", "use_python requirements.txt"]
    for run in find_runs(arguments.runs):
        for which in chosen_checkpoints(run):
            root = f"eval.retrieval.root={arguments.data.resolve()}"
            settings = shlex.join([f"run={run.resolve()}", f"checkpoints={which}", root])
            lines.append(f'"$PYTHON" -m dinov2.eval.instance_recog {settings}')
    target = Path("instance_recog.sh")
    write_text(target, "\n".join(lines) + "\n")
    print(f"{target}: {len(lines) - 6} evaluations; run it with: sh {target}")


if __name__ == "__main__":
    cli.run(main)
