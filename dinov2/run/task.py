"""What each task of a Slurm job does: one entry point, the same command after every requeue."""

import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from submitit.helpers import TorchDistributedEnvironment

PREEMPTED = 143  # exit code of a run that saved its checkpoint and left because of SIGTERM (128 + 15)


@dataclass(frozen=True)
class Task:
    """Callable that submitit runs in every task (one per GPU): `python -m module arguments`, in this process.

    Two signals end it early. SIGTERM comes from Slurm when the job is requeued or preempted; the entry point saves and
    leaves, and Slurm starts the job again. SIGUSR2 comes 90 s before the time limit; the entry point is made to save
    by a SIGTERM to itself, then the job is put back into the queue here. Started again, the same command goes on from
    the checkpoint.
    """

    module: str
    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Runs the entry point. Raises SystemExit with its exit code if that is not 0."""
        out_of_time = False

        def on_time_limit(*_: object) -> None:
            nonlocal out_of_time
            out_of_time = True
            os.kill(os.getpid(), signal.SIGTERM)

        def leave(*_: object) -> None:
            raise SystemExit(PREEMPTED)

        # These replace submitit's own: it would requeue, or ignore SIGTERM, before anything is saved. The trainer
        # sets its own SIGTERM handler; tools that have none leave through `leave`, their open files cleaned up.
        signal.signal(signal.SIGUSR2, on_time_limit)
        signal.signal(signal.SIGTERM, leave)
        # Each task is a rank; all its GPUs stay visible, the entry point takes the one of LOCAL_RANK as under torchrun.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        sys.argv = [self.module, *self.arguments]
        try:
            runpy.run_module(self.module, run_name="__main__", alter_sys=True)
        except SystemExit as leaving:
            if not leaving.code:
                return
            if out_of_time:
                requeue()
            raise


def requeue() -> None:
    """Puts this job back into the queue (the first task does) and waits for Slurm to end the tasks.

    Waiting matters: a task that left at once with an error would have Slurm kill the first one before it has spoken.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if int(os.environ["SLURM_PROCID"]) == 0:
        print("time limit: saved, back into the queue", file=sys.stderr, flush=True)
        job = os.environ["SLURM_JOB_ID"]
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    time.sleep(60)
