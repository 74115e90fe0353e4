"""How programs end: Ctrl-C while they load and while they work, without a traceback; the device that they choose."""

import os
import resource
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


def programs() -> list[str]:
    """All that `python -m` runs, by its last lines."""
    files = [
        file for room in ("dinov2", "Neighbor2Neighbor", "toy_mnist", "utils") for file in (ROOT / room).rglob("*.py")
    ]
    runs = [
        file
        for file in files
        if "__main__" in (file.name, file.stem) or 'if __name__ == "__main__":' in file.read_text()
    ]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in runs]
    names = [name.removesuffix(".__main__").removesuffix(".__init__") for name in names]
    return sorted(set(names) - {"utils.locks"})  # which scripts alone call


def scripts() -> list[str]:
    """Those of exps/ that users call; the shell scripts there call exps/pipeline.py."""
    files = [f for f in (ROOT / "exps").glob("*.py") if 'if __name__ == "__main__":' in f.read_text()]
    return sorted(f"exps/{file.name}" for file in files if file.name != "pipeline.py")


@pytest.mark.parametrize("program", [*programs(), *scripts()])
def test_help_does_not_wait_for_what_loads_slowly(program):
    command = [program] if program.endswith(".py") else ["-m", program]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, text=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime  # of a core: others may be busy
    assert shown.returncode == 0 and not shown.stderr, shown.stderr
    assert program.removesuffix(".py").replace("/", ".").rpartition(".")[2] in shown.stdout
    assert seconds < 2


@pytest.mark.parametrize("script", ["mstar.sh", "miniature.sh"])
def test_a_script_of_many_runs_explains_itself_once(script):
    shown = subprocess.run(["sh", ROOT / "exps" / script, "--help"], cwd=ROOT, text=True, capture_output=True)
    assert shown.returncode == 0 and shown.stdout.count(f"exps/{script}") == 1 and "set -eu" not in shown.stdout


def test_a_rank_leaves_without_taking_the_interpreter_down(tmp_path):
    """Nothing that is torn down at the interpreter's end runs any more; what was registered and printed is there."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import atexit\nfrom utils import cli, distributed\n\n\nclass Last:\n    def __del__(self):\n"
        "        print('torn down')\n\n\nlast = Last()\natexit.register(print, 'registered')\n\n\n"
        "def main():\n    distributed.joined = True\n    print('done')\n    return 3\n\n\ncli.run(main)\n"
    )
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split("\n")) == (3, ["done", "registered", ""]), done.stderr
