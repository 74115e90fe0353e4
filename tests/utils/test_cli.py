"""How programs end: Ctrl-C while they load and while they work, without a traceback; the device that they choose."""

import signal
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from utils import cli, distributed


@pytest.mark.parametrize("program", ["dinov2.eval.knn", "Neighbor2Neighbor.train"])
def test_ctrl_c_while_a_program_loads(program):
    started = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", program, "--help"], cwd=ROOT, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as a shell starts it in the foreground
    )  # fmt: skip
    for line in started.stderr:  # a line for each module that is loaded
        if line.rpartition("|")[2].strip() == "utils":
            started.send_signal(signal.SIGINT)
            break
    rest = started.stderr.read()
    assert started.wait(timeout=60) == -signal.SIGINT
    assert "Traceback" not in rest and "KeyboardInterrupt" not in rest


def test_ctrl_c_while_a_program_works(capsys):
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as utils/__init__.py leaves it
    try:
        with pytest.raises(SystemExit) as left:
            cli.run(lambda: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert left.value.code == 130 and capsys.readouterr().err.startswith("interrupted; ")


def test_the_device_is_a_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there, kind in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert distributed.device() == torch.device(kind)
