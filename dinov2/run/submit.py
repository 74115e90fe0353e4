"""Submits the entry points of the project to Slurm: one task per GPU, requeued jobs resume from their checkpoint.

    python -m dinov2.run.submit --nodes 1 --gpus 4 --partition P -- train imagenet1k nct noise=gauss255 \\
        data.root=imagenet output_dir=runs/nct-gauss255
    python -m dinov2.run.submit --gpus 1 --partition P --dependency afterok:1234 -- eval.linear run=runs/nct-gauss255

The job's id is printed on stdout, alone, so that a shell can chain: id=$(python -m dinov2.run.submit ...).
A sweep is one job array; `{key}` in the command stands for the swept value:

    python -m dinov2.run.submit --gpus 1 --partition P --array noise=gauss100,gauss255 --array seed=0,1,2 -- \\
        train imagenet100 nc data.root=mini-imagenet output_dir=runs/{noise}/nc-{seed}
"""

import argparse
import importlib.util
import itertools
import shlex
import sys
from collections.abc import Sequence

import submitit

from dinov2.config import check_ranks
from dinov2.run.options import number
from dinov2.run.stages import load_settings
from dinov2.run.task import Task
from utils import cli

PACKAGES = ("dinov2", "Neighbor2Neighbor", "toy_mnist", "utils")


def main(argv: Sequence[str]) -> None:
    """Submits what argv says, or prints it (--dry-run). Raises ValueError for what no job could run."""
    options, command = parse(argv)
    ranks = options.nodes * (options.gpus or options.tasks)
    tasks = [task_of(one, ranks) for one in sweep(command, options.array)]
    parameters = slurm_parameters(options, tasks[0])
    if options.dry_run:
        print(" ".join(f"{key}={value}" for key, value in parameters.items()))
        for task in tasks:
            print("  python -m", shlex.join([task.module, *task.arguments]))
        return
    try:
        executor = submitit.SlurmExecutor(folder=options.folder)
    except RuntimeError as error:
        raise ValueError("srun is not on this machine: submit from a node of the cluster, or use torchrun") from error
    executor.update_parameters(**parameters)
    try:
        if len(tasks) == 1:
            jobs = [executor.submit(tasks[0])]
        else:
            with executor.batch():
                jobs = [executor.submit(task) for task in tasks]
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"sbatch refused the job: {error}") from error
    for job, task in zip(jobs, tasks, strict=True):
        print(f"job {job.job_id}: {shlex.join([task.module, *task.arguments])}", file=sys.stderr)
    print(f"logs: {jobs[0].paths.stdout}", file=sys.stderr)
    print(jobs[0].job_id.split("_")[0])


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits argv at `--` into Slurm's options and the command."""
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.run.submit",
        usage="%(prog)s [options] -- train|eval.linear|...|MODULE arguments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=number, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="per node, a task each; 0: a CPU run of --tasks")
    parser.add_argument("--tasks", type=number, default=1, help="tasks per node, for --gpus 0")
    parser.add_argument("--cpus", type=number, default=8, help="per task: loader workers and the training process")
    parser.add_argument("--partition")
    parser.add_argument("--time", default="1-00:00:00", help="limit in Slurm's form; reached, the job is requeued")
    parser.add_argument("--mem", help="memory per node, such as 128G")
    parser.add_argument("--dependency", help="such as afterok:1234")
    parser.add_argument("--array", action="append", default=[], metavar="KEY=A,B", help="sweep; several make a grid")
    parser.add_argument("--parallel", type=number, default=256, help="jobs of a sweep that run at a time")
    parser.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch")
    parser.add_argument("--name", help="of the job; default: the command's")
    parser.add_argument("--folder", default="runs/slurm/%j", help="of logs, seen by all nodes; %%j is the job's id")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted")
    argv = list(argv)
    if "--" not in argv:
        parser.parse_args(argv)  # --help
        raise ValueError("no command: end the options with -- and add one, such as -- eval.knn run=DIR")
    cut = argv.index("--")
    options, command = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    if options.gpus < 0:
        raise ValueError(f"--gpus {options.gpus}: must be 0 or more")
    if not command:
        raise ValueError("nothing after --: add a command, such as eval.knn run=DIR")
    return options, command


def key_value(text: str, option: str) -> tuple[str, str]:
    """Splits `key=value`. Raises ValueError that names the option."""
    key, equals, value = text.partition("=")
    if not (key and equals and value):
        raise ValueError(f"{option} {text}: must be KEY=VALUE")
    return key, value


def sweep(command: Sequence[str], arrays: Sequence[str]) -> list[list[str]]:
    """The commands of a grid: `{key}` replaced by the value, and `key=value` appended for each swept key.

    A key that is an argument by itself, as in `--noise {noise}`, is not appended.
    Raises ValueError if several jobs of the grid would write into one output_dir.
    """
    grid = [[(key, value) for value in values.split(",")] for key, values in (key_value(a, "--array") for a in arrays)]
    commands = []
    for choice in itertools.product(*grid):
        one = list(command)
        for key, value in choice:
            appended = [] if f"{{{key}}}" in one else [f"{key}={value}"]
            one = [argument.replace(f"{{{key}}}", value) for argument in one] + appended
        commands.append(one)
    folders = [argument for one in commands for argument in one if argument.startswith("output_dir=")]
    if len(set(folders)) < len(folders):
        raise ValueError(f"--array: several jobs would write to {folders[0]}; put {{key}} of each swept key into it")
    return commands


def task_of(command: Sequence[str], ranks: int) -> Task:
    """The task of a command whose first word is a module, within dinov2 or in full.

    Raises ValueError for an unknown module, and for a configuration that the trainer would refuse: better now than
    after a day in the queue.
    """
    name, arguments = command[0], list(command[1:])
    module = next((m for m in (f"dinov2.{name}", name) if m.split(".")[0] in PACKAGES and is_module(m)), None)
    if module is None:
        raise ValueError(f"unknown command {name!r}: name a module, as train, eval.linear or Neighbor2Neighbor.train")
    if module == "dinov2.train":
        check_ranks(load_settings(arguments), ranks, f"{ranks} tasks")
    return Task(module, tuple(arguments))


def is_module(name: str) -> bool:
    """Whether `python -m name` would find something."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def slurm_parameters(options: argparse.Namespace, task: Task) -> dict[str, object]:
    """submitit's parameters for the options given."""
    parameters: dict[str, object] = {
        "job_name": options.name or task.module.replace("dinov2.", ""),
        "nodes": options.nodes,
        "ntasks_per_node": options.gpus or options.tasks,
        "cpus_per_task": options.cpus,
        "signal_delay_s": 90,
        "stderr_to_stdout": True,
        "array_parallelism": options.parallel,
        # When a task fails, the others wait for it in a collective: end the step instead.
        "srun_args": ["--kill-on-bad-exit=1"],
        "additional_parameters": {"time": options.time, "requeue": True}
        | dict(key_value(text, "--sbatch") for text in options.sbatch),
    }
    if options.gpus:
        parameters["gpus_per_node"] = options.gpus
    for key in ("partition", "mem", "dependency"):
        if getattr(options, key):
            parameters[key] = getattr(options, key)
    return parameters


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
