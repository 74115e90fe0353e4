"""A real Slurm of one node: two ranks preempted in the midst of training end where they would have ended anyway."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETUP = ["bash", str(ROOT / "tests/slurm/setup_slurm.sh")]
EPOCHS, EPOCH_LENGTH = 3, 10


@pytest.fixture(scope="module")
def slurm():
    """Environment of a client of the test's own Slurm; skips with the reason where there can be none."""
    # Not below pytest's folder, which nobody but root may enter: munged runs as the user munge.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    started = subprocess.run([*SETUP, "start", folder], check=False, capture_output=True, text=True)
    try:
        if started.returncode == 77:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        yield environment | {"SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    finally:
        subprocess.run([*SETUP, "stop", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def submit(slurm, folder, *arguments):
    command = [sys.executable, "-m", "dinov2.run.submit", "--gpus", "0", "--cpus", "1", "--partition", "test"]
    command += ["--folder", f"{folder}/%j", *map(str, arguments)]
    done = subprocess.run(command, check=False, env=slurm, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def job_field(slurm, job, field):
    shown = subprocess.run(["scontrol", "show", "job", job], env=slurm, capture_output=True, text=True, check=True)
    return re.search(rf"\b{field}=(\S+)", shown.stdout).group(1)


def wait_for(condition, what, logs, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            text = "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in sorted(Path(logs).glob("**/*.out")))
            pytest.fail(f"waited {seconds} s for {what}\n{text}")
        time.sleep(0.3)


def iterations(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["iteration"] for line in lines if "total_loss" in line]


def test_preempted_run_continues_and_ends(slurm, tmp_path):
    data, run, logs = tmp_path / "digits", tmp_path / "run", tmp_path / "logs"
    subprocess.run([sys.executable, ROOT / "exps/make_digits.py", "--output", data], check=True)
    settings = [f"data.root={data}", f"output_dir={run}", "noise=gauss255", "data.storage=on_the_fly"]
    settings += ["model.depth=2", "dino.prototypes=64", "ibot.prototypes=64"]
    settings += ["train.batch_size=16", f"train.epochs={EPOCHS}", f"train.epoch_length={EPOCH_LENGTH}"]
    # No checkpoint before the end but the one that SIGTERM brings about.
    settings += ["train.checkpoint_every=99", "train.eval_every=99", "train.log_every=1"]
    settings += ["optim.warmup_epochs=1", "teacher.warmup_temp_epochs=1"]
    job = submit(slurm, logs, "--tasks", 2, "--", "train", "quickstart", "dinov2", *settings)
    waiting = ["--dependency", f"afterok:{job}"]
    probe = submit(slurm, logs, *waiting, "--", "eval.knn", f"run={run}", "eval.knn.k=[10]")

    def state(number):
        return job_field(slurm, number, "JobState")

    wait_for(lambda: len(iterations(run)) >= 12 or state(job) == "FAILED", "the first iterations", logs)
    subprocess.run(["scontrol", "requeue", job], env=slurm, check=True)
    wait_for(lambda: state(job) in ("COMPLETED", "FAILED"), "the end of the job", logs)

    log = (logs / job / f"{job}_0_log.out").read_text()
    assert state(job) == "COMPLETED", log
    assert job_field(slurm, job, "Restarts") == "1"
    assert job_field(slurm, job, "NumTasks") == "2"
    # It went on where it was stopped: SIGTERM left both ranks the time to save.
    assert int(re.search(r"resumes from .* \(iteration (\d+)\)", log).group(1)) >= 12
    seen = iterations(run)
    assert sorted(seen) == seen and len(seen) == len(set(seen)) == EPOCHS * EPOCH_LENGTH, seen

    wait_for(lambda: state(probe) in ("COMPLETED", "FAILED"), "the dependent job", logs)
    assert state(probe) == "COMPLETED"
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [(row["metric"], row["epoch"]) for row in rows] == [("knn10_top1", EPOCHS)]


def test_sweep_is_one_array(slurm, tmp_path):
    """Two jobs of a tool that refuses its input: both run, and their failure is Slurm's to see."""
    tool = ["utils.generate_noise", "--source", tmp_path / "none", "--noise", "shot3", "--output-root", "{folder}"]
    job = submit(slurm, tmp_path, "--array", "folder=a,b", "--", *tool)
    states = ["squeue", "--array", "--states=all", "--noheader", f"--jobs={job}", "--format=%K %T"]

    def ended():
        shown = subprocess.run(states, env=slurm, capture_output=True, text=True, check=True).stdout.split("\n")
        return sorted(line for line in shown if line) == ["0 FAILED", "1 FAILED"]

    wait_for(ended, "both jobs of the array to fail", tmp_path)
    assert "error:" in (tmp_path / f"{job}_0" / f"{job}_0_0_log.out").read_text()
