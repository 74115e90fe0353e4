"""Does a rank die by a signal? Two ranks on a CPU, run after run, with and without utils.memory.keep_freed_memory.

    python -m tests.attack.abort --runs 300 --output DIR

A run joins gloo, shards a small model (FSDP), trains some steps, writes a checkpoint and reads it, computes features,
and leaves the group. A pair of processes, forked from one that has imported torch, makes EACH of the runs and ends as
the project's ranks do (utils.distributed.leave) or, with --end interpreter, by the interpreter's own end. DIR keeps
what a pair left that did not end well: what its ranks said, with the Python stacks of their threads, and those of
their cores by gdb.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import gc
import os
import shutil
import signal
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import torch

from dinov2.config import load_config
from dinov2.eval.features import extract
from dinov2.objectives import DINOv2
from dinov2.train import curriculum
from dinov2.train.trainer import Trainer
from tests.dinov2.train.tiny import make_tree, settings
from tests.ranks import backtraces, environment, free_port, keep_core
from utils import cli, distributed, memory

MEMORY = ("kept", "glibc's own")  # whether keep_freed_memory is called
KEEP = memory.keep_freed_memory  # which does nothing once a rank has joined others on a CPU
STEPS = 4
SECONDS = 3600  # after which a pair counts as hanging: for machines that are busy


class Job:
    """What the ranks of every pair do; built once, before they are forked."""

    def __init__(self, tree: Path):
        self.cfg = load_config(settings(tree, tree.parent / "run", "model.depth=3"))
        self.images = curriculum.make_dataset(curriculum.plan(self.cfg)[-1])
        self.model = DINOv2(self.cfg)

    def __call__(self, folder: Path, ports: list[int]) -> None:
        for number, port in enumerate(ports):
            os.environ["MASTER_PORT"] = str(port)
            self.cfg.output_dir = str(folder / f"run-{number}")
            distributed.init()
            self.run(Trainer(self.cfg, copy.deepcopy(self.model), self.images, stop_epoch=4))
            distributed.close()
            print(f"run {number} done", flush=True)

    def run(self, trainer: Trainer) -> None:
        for data in islice(trainer.load_batches(STEPS), STEPS):
            terms, _ = trainer.step(data.iteration, trainer.make_batches(data))
            trainer.monitor.put(data.iteration, terms)
            trainer.monitor.read()
        trainer.iteration = STEPS
        trainer.save(evaluate=True)
        assert trainer.resume() == STEPS
        assert extract(trainer.model.teacher["backbone"], self.cfg, "val").values.isfinite().all()


def start_rank(rank: int, job: Job, kept: bool, folder: Path, ports: list[int]) -> int:
    """Fork one of two ranks; its id."""
    child = os.fork()
    if child:
        return child
    (folder / f"rank-{rank}").mkdir()
    os.chdir(folder / f"rank-{rank}")
    output = os.open("output", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    keep_core()
    faulthandler.dump_traceback_later(SECONDS - 10)  # a rank that hangs is killed soon after
    os.environ.update(environment(rank, 2, ports[0]))
    if kept:
        KEEP()
    cli.run(lambda: job(folder, ports))
    sys.exit(0)


def wait(children: list[int]) -> list[str]:
    """How each ended: an exit code, a signal's name, or "hang"."""
    ends, deadline = {}, time.monotonic() + SECONDS
    while len(ends) < len(children):
        for child in children:
            if child not in ends:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    code = os.waitstatus_to_exitcode(status)
                    ends[child] = str(code) if code >= 0 else signal.Signals(-code).name
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    ends[child] = "hang"
        time.sleep(0.02)
    return [ends[child] for child in children]


def hunt(runs: int, each: int, output: Path) -> dict[str, Counter]:
    """So many runs of each setting of MEMORY, their pairs by turns: how pairs ended ("0 0": well), and how often."""
    for module in list(sys.modules.values()):
        if hasattr(module, "keep_freed_memory"):
            module.keep_freed_memory = lambda: None  # the ranks alone choose
    job, begun = Job(make_tree(output / "tiny")), time.monotonic()
    gc.freeze()
    found = {setting: Counter() for setting in MEMORY}
    for pair in range(2 * (runs // each)):
        folder, setting, ports = output / f"pair-{pair}", MEMORY[pair % 2], [free_port() for _ in range(each)]
        folder.mkdir()
        ends = wait([start_rank(rank, job, setting == MEMORY[0], folder, ports) for rank in range(2)])
        found[setting][" ".join(ends)] += 1
        if ends == ["0", "0"]:
            shutil.rmtree(folder)
        else:
            (folder / "backtraces.txt").write_text(backtraces(folder))
        seconds = time.monotonic() - begun
        print(f"pair {pair}, memory {setting}: {' '.join(ends)}; {seconds:.0f} s since the first began", flush=True)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300, help="of each setting (default 300)")
    parser.add_argument("--each", type=int, default=10, help="runs that a pair of processes makes (default 10)")
    parser.add_argument("--end", choices=("leave", "interpreter"), default="leave", help="default leave")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    options = parser.parse_args(argv)
    if options.end == "interpreter":
        distributed.leave = sys.exit
    options.output.mkdir(parents=True)
    torch.set_num_threads(1)
    found = hunt(options.runs, options.each, options.output.resolve())
    for setting, ends in found.items():
        print(f"memory {setting}: of {options.runs} runs in {ends.total()} pairs, pairs by their ends: {dict(ends)}")
    return int(any(set(ends) != {"0 0"} for ends in found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
