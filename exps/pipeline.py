"""Runs a script of this folder or of Neighbor2Neighbor/, called by its .sh: its stages, with its defaults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from denoisers import instance_recog_n2n, linear_probe_n2n
from denoisers import parse as parse_denoisers

from dinov2.eval import FLOORED
from dinov2.run.commands import say
from dinov2.run.options import PYTHON, Options, help_text, parse
from dinov2.run.pipeline import CommandFailed, Runner
from dinov2.run.stages import (
    SHARING,
    STAGES,
    check_settings,
    denoise_command,
    denoised_tree,
    denoiser_command,
    evaluate_arguments,
    floor_arguments,
    prepare,
    run_folder,
    train_arguments,
    view_of,
)
from utils import cli
from utils.locks import locked

ROOT = Path(__file__).resolve().parents[1]
NINE = "gauss50 gauss100 gauss255 speckle0.4 speckle0.7 speckle1.0 shot10 shot3 shot1".split()
IMAGENET100 = {"scale": "imagenet100", "evals": ["linear"], "checkpoints": "all"}
IMAGENET1K = {"noises": ["gauss255", "gauss100"], "methods": ["dinov2", "n2n", "nc", "nct"], "evals": ["linear"]}
DENOISERS = {"linear_probe_n2n": linear_probe_n2n, "instance_recog_n2n": instance_recog_n2n}
DEFAULTS = {
    "linear_probe": Options(noises=NINE, methods=["dinov2", "n2n", "nc"], **IMAGENET100),
    # The four noises whose λ was published.
    "linear_probe_nct": Options(noises=["gauss255", "gauss100", "shot1", "speckle1.0"], methods=["nct"], **IMAGENET100),
    "imagenet1k/submit": Options(scale="imagenet1k", checkpoints="all", gpus=4, **IMAGENET1K),
}


def main(script: str, caller: str, argv: list[str]) -> int:
    """Runs the script of that name with the words given to it in the folder `caller`; returns the exit code."""
    defaults = DEFAULTS.get(script, Options())
    if {"-h", "--help"} & set(argv):
        published = script in DENOISERS
        print(about(script, "Neighbor2Neighbor") if published else help_text(about(script), defaults))
        return 0
    try:
        if script in DENOISERS:
            run_denoisers(script, caller, argv)
        else:
            run_stages(script, parse(argv, defaults, caller, str(ROOT)))
    except CommandFailed as failure:
        print(failure, file=sys.stderr)
        return failure.code
    return 0


def run_denoisers(script: str, caller: str, argv: list[str]) -> None:
    """A script of Neighbor2Neighbor/."""
    options = parse_denoisers(argv)
    os.chdir(ROOT)
    Runner("", options.dry).run(DENOISERS[script](options, caller, str(ROOT)))


def run_stages(script: str, options: Options) -> None:
    """A script of this folder: one stage, or several."""
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the command is ended too
    run = Runner(options.output, options.dry, options.jobs).run
    if not options.dry and script.startswith(("quickstart", "5_pretrain", "linear_probe")):
        check_settings(options)
    if script == "imagenet1k/submit":
        submit(options)
    elif script == "quickstart":
        with nullcontext() if options.dry else locked(options.output, "-quickstart"):
            quickstart(options, run)
    elif script.startswith("linear_probe"):
        run(prepare(options))
        for noise in options.noises:  # the first table is there before the last denoised run has begun
            for stage in ("5_pretrain", "6_evaluate"):
                run(STAGES[stage](replace(options, noises=[noise])))
        run(STAGES["7_report"](options))
    else:
        run(prepare(options))
        run(STAGES[script](options))


def about(script: str, folder: str = "exps") -> str:
    """The comment that a script begins with."""
    lines = (ROOT / folder / f"{script}.sh").read_text().splitlines()[1:]
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line[2:] for line in lines[:end])


def quickstart(options: Options, run) -> None:
    """All stages. Noisy copies are written where the scale reads them from disk."""
    started = time.monotonic()
    run(prepare(options))
    for name, stage in STAGES.items():
        if name != "1_generate_noise" or options.of_scale("data.storage") == "disk":
            print(f"== {name}", flush=True)
            run(stage(options))
    print(f"== {time.monotonic() - started:.0f} s; the report: {options.output}/report.html")
    if options.data == f"{options.output}/digits" and not (options.dry or options.steps or options.per_class):
        print("== for comparison, five seeds of ours (docs/results.md): mean and standard deviation of top-1 in %")
        table = (ROOT / "docs/results.md").read_text().partition("<!-- five seeds")[2].partition("<!-- end")[0]
        print("\n".join(line for line in table.splitlines() if line.startswith("|")))


# --- Slurm ----------------------------------------------------------------------------------------------------------
@dataclass
class Queue:
    """Submits jobs; ids holds the id of each by its name."""

    options: Options
    ids: dict[str, str] = field(default_factory=dict)

    def submit(self, name: str, after: Iterator[str] | list[str], gpus: int, command: list[str]) -> None:
        """A job that starts when those called `after`, as far as they were submitted, have ended well."""
        o, waits = self.options, ":".join(self.ids[job] for job in after if job in self.ids)
        slurm = [*(["--partition", o.partition] if o.partition else []), *(["--time", o.time] if o.time else [])]
        slurm += ["--name", name, *(["--dependency", f"afterok:{waits}"] if waits else [])]
        words = ["-m", "dinov2.run.submit", "--nodes", "1", "--gpus", str(gpus), *slurm]
        words += ["--folder", f"{o.output}/slurm/%j", "--", *command]
        say("+", words)
        self.ids[name] = f"<{name}>"
        if not o.dry:
            done = subprocess.run([PYTHON, *words], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise CommandFailed(done.returncode)
            self.ids[name] = done.stdout.strip()


def submit(o: Options) -> None:
    queue = Queue(o)
    for noise in o.noises:
        if not os.path.exists(f"{denoised_tree(o, noise)}/manifest.json"):
            queue.submit(f"denoiser-{noise}", [], 1, denoiser_command(o, noise))
            queue.submit(f"denoise-{noise}", [f"denoiser-{noise}"], o.gpus, denoise_command(o, noise))
        first, views = "", set()
        for method in o.methods:
            folder, name = run_folder(o, noise, method, None), f"{method}-{noise}"
            # The first of those that begin on denoised images trains the denoised run, which the others share.
            needs = [f"denoise-{noise}", first] if method in SHARING else []
            queue.submit(name, needs, o.gpus, ["train", *train_arguments(o, noise, method, None)])
            first = first or (name if needs else "")
            for evaluator in o.evals:
                queue.submit(
                    f"{evaluator}-{name}", [name], o.gpus, [f"eval.{evaluator}", *evaluate_arguments(o, folder)]
                )
            view = view_of(method)
            if set(FLOORED) & set(o.evals) and view not in views:
                views.add(view)
                queue.submit(f"floors-{view}-{noise}", [name], o.gpus, ["eval.floors", *floor_arguments(o, folder)])


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1], sys.argv[2], sys.argv[3:]))
