"""Processes that die while others wait for them: every run ends, soon, with one sentence that says what to do."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.dinov2.train.tiny import make_tree, settings

# A worker that kills itself while it reads, in each package's loader.
KILLED = {
    "dinov2": """
import os, signal, sys
from dinov2.data.dataset import ImageDataset
from dinov2.data.loader import make_loader
from utils import cli
ImageDataset.read = lambda self, *_: os.kill(os.getpid(), signal.SIGKILL)
cli.run(lambda: next(make_loader(ImageDataset(sys.argv[1], "train", ("clean",)), 4, workers=2)))
""",
    "Neighbor2Neighbor": """
import os, signal, sys
from Neighbor2Neighbor import data, train
from utils import cli
data.Crops.__getitem__ = lambda self, item: os.kill(os.getpid(), signal.SIGKILL)
cli.run(lambda: train.main(["--data", sys.argv[1], "--output", sys.argv[1] + "-run", "--noise", "gauss50",
                            "--crop", "16", "--depth", "2", "--epochs", "1", "--workers", "2"]))
""",
}
# Batches of 6 MB and 1 MB of shared memory.
LARGE = """
import numpy as np, sys
from dinov2.data.dataset import ImageDataset
from dinov2.data.loader import make_loader
from utils import cli
ImageDataset.read = lambda self, *_: [np.zeros((700, 700, 3), np.uint8)]
cli.run(lambda: next(make_loader(ImageDataset(sys.argv[1], "train", ("clean",)), 4, workers=1)))
"""


def one_sentence(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.parametrize("package", KILLED)
def test_a_loader_process_that_is_killed_ends_the_run(package, tmp_path):
    tree = make_tree(tmp_path / "tiny")
    command = [sys.executable, "-c", KILLED[package], str(tree)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert "data.workers=0" in (line := one_sentence(done)) and "--shm-size" in line


def test_a_full_dev_shm_ends_the_run(tmp_path):
    mounted = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    private = ["unshare", "-m", "sh", "-c", mounted, "sh"]
    if os.geteuid() or subprocess.run([*private, "true"]).returncode:
        pytest.skip("only root can give a process a small /dev/shm")
    tree = make_tree(tmp_path / "tiny")
    command = [*private, sys.executable, "-c", LARGE, str(tree)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert "--shm-size" in one_sentence(done)


def test_the_others_end_when_a_rank_is_killed(tmp_path):
    tree = make_tree(tmp_path / "tiny")
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "dinov2.train",
        *settings(tree, run, "train.epoch_length=1000", "train.log_every=5"),
    ]
    ranks = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": "29731", "OMP_NUM_THREADS": "1"}  # fmt: skip
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    end = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert (run / "metrics.jsonl").exists(), "the ranks have not begun"
    ranks[1].send_signal(signal.SIGKILL)
    _, said = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 2 and "error: another rank has ended" in said and "Traceback" not in said, said
    assert not (run / ".lock").exists()
