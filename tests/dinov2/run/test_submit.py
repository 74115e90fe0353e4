"""Submission to Slurm: what a command becomes, what is refused, how a task ends. Slurm itself is in tests/slurm."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2.run import submit
from dinov2.run.task import PREEMPTED

ROOT = Path(__file__).resolve().parents[3]


def dry_run(capsys, *arguments):
    submit.main(["--dry-run", *arguments])
    first, *commands = capsys.readouterr().out.splitlines()
    return first, [command.strip() for command in commands]


def test_one_task_a_gpu_and_the_same_command(capsys):
    command = "train imagenet1k nct noise=gauss255 data.root=d output_dir=o".split()
    first, commands = dry_run(capsys, "--nodes", "2", "--gpus", "4", "--partition", "P", "--", *command)
    for part in ("nodes=2", "ntasks_per_node=4", "gpus_per_node=4", "partition=P", "'requeue': True"):
        assert part in first
    assert commands == ["python -m dinov2." + " ".join(command)]


def test_cpu_run_asks_for_no_gpu(capsys):
    command = ["Neighbor2Neighbor.train", "--data", "my data"]
    first, commands = dry_run(capsys, "--gpus", "0", "--tasks", "2", "--", *command)
    assert "ntasks_per_node=2" in first and "gpus" not in first
    assert commands == ["python -m Neighbor2Neighbor.train --data 'my data'"]


def test_sweep_is_a_grid_with_a_folder_each(capsys):
    command = "train imagenet100 nc data.root=d output_dir=runs/{noise}/{seed}".split()
    _, commands = dry_run(capsys, "--array", "noise=gauss50,shot1", "--array", "seed=0,1", "--", *command)
    folders = [f"output_dir=runs/{n}/{s} noise={n} seed={s}" for n in ("gauss50", "shot1") for s in (0, 1)]
    assert commands == [f"python -m dinov2.train imagenet100 nc data.root=d {folder}" for folder in folders]


def test_swept_value_of_an_option_is_not_appended():
    assert submit.sweep(["x", "--noise", "{noise}"], ["noise=a,b"]) == [["x", "--noise", "a"], ["x", "--noise", "b"]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpus", "1"], "no command"),
        (["--"], "nothing after --"),
        (["--", "trian", "imagenet100"], "unknown command 'trian'"),
        (["--", "os", "path"], "unknown command 'os'"),
        (["--gpus", "-1", "--", "train"], "--gpus -1"),
        (["--array", "seed", "--", "train"], "--array seed: must be KEY=VALUE"),
        (["--sbatch", "qos", "--", "eval.knn", "run=r"], "--sbatch qos: must be KEY=VALUE"),
        (["--array", "seed=0,1", "--", "train", "imagenet100", "output_dir=o"], "jobs would write to output_dir=o"),
        # The trainer would refuse these a day later, when the job starts.
        (["--gpus", "3", "--", "train", "imagenet100", "data.root=d", "output_dir=o"], "no multiple of 3 tasks"),
        (["--", "train", "imagenet100", "nosie=gauss255", "data.root=d", "output_dir=o"], "nosie"),
        (["--", "train", "imagenet100", "nct", "noise=shot3", "data.root=d", "output_dir=o"], "anchor.weights"),
    ],
)
def test_what_no_job_could_run_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        submit.main(["--dry-run", *arguments])


def test_machine_without_slurm_is_told_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="srun is not on this machine"):
        submit.main(["--folder", str(tmp_path), "--", "eval.knn", "run=r"])


TOOL = """
import signal, sys, time
{handler}
open("started", "w").close()
while True:
    time.sleep(0.05)
"""
SAVES = 'def save(*_):\n    print("saved", flush=True)\n    sys.exit(143)\nsignal.signal(signal.SIGTERM, save)'


@pytest.mark.parametrize("handler", [SAVES, ""], ids=["saves", "no handler"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGUSR2, signal.SIGTERM])
def test_task_saves_then_asks_for_the_queue_at_its_time_limit(tmp_path, handler, rank, sent):
    """SIGUSR2 (time limit): saved first, requeued by rank 0 alone. SIGTERM: Slurm requeues by itself."""
    (tmp_path / "tool.py").write_text(TOOL.format(handler=handler))
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\nif [ "$1" = requeue ]; then echo "$@" >requeued; kill -TERM $PPID; fi\n')
    scontrol.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "77", "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": str(rank), "SLURM_JOB_NODELIST": "localhost",
    }  # fmt: skip
    code = "from dinov2.run.task import Task; Task('tool', ())()"
    command, pipe = [sys.executable, "-c", code], subprocess.PIPE
    task = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert task.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        task.send_signal(sent)
        if sent == signal.SIGUSR2 and rank == 1:
            # It waits for Slurm, lest its leaving ends the step before rank 0 has asked for the queue.
            with pytest.raises(subprocess.TimeoutExpired):
                task.wait(1.0)
            task.terminate()
        printed, _ = task.communicate(timeout=30)
    finally:
        task.kill()
    assert (printed == "saved\n") == bool(handler)
    assert task.returncode == (PREEMPTED if sent == signal.SIGTERM else -signal.SIGTERM)
    requeued = tmp_path / "requeued"
    assert requeued.exists() == (sent == signal.SIGUSR2 and rank == 0)
    assert not requeued.exists() or requeued.read_text() == "requeue 77\n"
