"""The runner of a pipeline: each command once, printed, until the first that fails."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2.run.options import Options, finish, from_root
from dinov2.run.pipeline import CommandFailed, Runner, Step, tree_state
from dinov2.run.stages import check_settings, data_state, evaluate, pretrain, runs_of
from tests.conftest import ROOT

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2]); sys.exit(int(sys.argv[3]))"


def step(log: Path, word: str = "x", code: int = 0, **more) -> Step:
    return Step(["-c", APPEND, str(log), word, str(code)], **more)


def test_a_command_is_run_again_only_for_a_change_or_a_failure(tmp_path, capfd):
    log, runner = tmp_path / "log", Runner(str(tmp_path))
    with pytest.raises(CommandFailed) as failed:
        runner.run([step(log, code=3, name="a"), step(log, "never")])
    assert failed.value.code == 3 and "exit code 3" in str(failed.value) and log.read_text() == "x"
    runner.run([step(log, name="a", state="1")])
    runner.run([step(log, name="a", state="1")])
    assert log.read_text() == "xx" and "finished before: " in capfd.readouterr().out
    for state in ("2", "", "2"):  # what it read, another each time
        runner.run([step(log, name="a", state=state)])
    runner.run([step(log, "y", name="a", state="2")])  # another command
    assert log.read_text() == "xxxxxy"
    (tmp_path / ".done/a").write_text("python -m something\n\n1234 5 file")  # of another form, or damaged
    runner.run([step(log, "z", name="a", state="2"), step(log), step(log)])  # those without a name are run each time
    assert log.read_text() == "xxxxxyzxx"


MEET = """
import os, pathlib, sys, time
here, other = (pathlib.Path(word) for word in sys.argv[1:])
here.write_text(os.environ["OMP_NUM_THREADS"])
for _ in range(400):
    if other.exists():
        print("met", flush=True)
        sys.exit()
    time.sleep(0.05)
sys.exit(4)
"""


def meeting(folder: Path, here: str, other: str, **more) -> Step:
    """A step that ends well only if the other runs at the same time or has run before."""
    return Step(["-c", MEET, str(folder / here), str(folder / other)], here, **more)


def test_steps_that_need_nothing_of_each_other_run_side_by_side(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    log, cores = tmp_path / "log", os.cpu_count() or 1
    steps = [
        meeting(tmp_path, "a", "b", after=()),
        step(log, "c", name="c", after=("a", "d")),
        meeting(tmp_path, "b", "a", after=()),
        step(log, "d", name="d", after=("b",)),
        step(log, "alone"),
    ]
    Runner(str(tmp_path), jobs=2).run(steps)
    assert log.read_text() == "dcalone"  # c waits for d, although it was asked for first
    assert (tmp_path / "a").read_text() == str(max(1, cores // 2))
    said = capfd.readouterr().out
    assert "a | met\n" in said and "b | met\n" in said
    Runner(str(tmp_path), jobs=2).run(steps[:4])
    assert capfd.readouterr().out.count("finished before: ") == 4 and log.read_text() == "dcalone"


def test_steps_of_one_chain_keep_all_cores_and_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    log = tmp_path / "log"
    Runner(str(tmp_path), jobs=3).run([step(log, "x", name="x", after=()), step(log, "y", name="y", after=("x",))])
    meeting_itself = meeting(tmp_path, "z", "z", after=())
    Runner(str(tmp_path), jobs=3).run([meeting_itself, meeting_itself])  # asked for twice, as by --seed 0 --seed 0
    assert log.read_text() == "xy" and (tmp_path / "z").read_text() == "7"


def test_a_failure_ends_what_runs_beside_it(tmp_path, capfd):
    started, slept = tmp_path / "started", tmp_path / "slept"
    sleep = "import sys, time; open(sys.argv[1], 'w'); time.sleep(60); open(sys.argv[2], 'w')"
    wait = """
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.05)
print("why", file=sys.stderr)
sys.exit(3)
"""
    steps = [Step(["-c", sleep, str(started), str(slept)], "long", after=())]
    steps.append(Step(["-c", wait, str(started)], "short", after=()))
    begun = time.monotonic()
    with pytest.raises(CommandFailed, match="stopped: short ended with exit code 3; those beside it") as failed:
        Runner(str(tmp_path), jobs=2).run([*steps, step(tmp_path / "log", name="never", after=("short",))])
    assert failed.value.code == 3 and time.monotonic() - begun < 30
    assert not slept.exists() and not (tmp_path / "log").exists() and not list(tmp_path.glob(".done/*"))
    assert "short | why\n" in capfd.readouterr().out


def test_only_runs_that_share_a_denoised_run_wait_for_each_other(tmp_path):
    options = Options(data=str(tmp_path), output=str(tmp_path / "o"), seeds=[0, 1])
    finish(options)
    after = {step.name: step.after for step in pretrain(options)}
    assert after == {
        "pretrain-gauss100-dinov2": (),
        "pretrain-gauss100-n2n": (),
        "pretrain-gauss100-nc": ("pretrain-gauss100-n2n",),
        "pretrain-gauss100-nct": ("pretrain-gauss100-nc",),
        "pretrain-none-clean": (),
        "pretrain-gauss100-dinov2-seed1": (),
        "pretrain-gauss100-n2n-seed1": (),
        "pretrain-gauss100-nc-seed1": ("pretrain-gauss100-n2n-seed1",),
        "pretrain-gauss100-nct-seed1": ("pretrain-gauss100-nc-seed1",),
        "pretrain-none-clean-seed1": (),
    }
    options.dry = True
    chains = [step.after for step in evaluate(options) if step.name.startswith(("linear", "knn"))]
    assert chains[:2] == [(), ("linear-gauss100-dinov2",)]


def test_what_a_run_refuses_is_refused_before_anything_is_trained(tmp_path):
    options = Options(scale="quickstart", data=str(tmp_path), output=str(tmp_path), methods=["nc", "nct"])
    options.overrides = ["objective=simclr"]
    finish(options)
    with pytest.raises(ValueError, match="objective=simclr learns from no teacher's targets.*take nc"):
        check_settings(options)
    options.methods, options.overrides = ["nc"], ["objective=simdinov2", "dino.prototypes=8"]
    with pytest.raises(ValueError, match="objective=simdinov2 has no prototypes: dino.prototypes=8 must be 0"):
        check_settings(options)
    options.overrides, options.gpus = ["train.accumulate=2"], 3
    with pytest.raises(ValueError, match="batch_size=64 is no multiple of --gpus 3 x train.accumulate=2: give another"):
        check_settings(options)


def test_a_dry_run_prints_and_leaves_no_trace(tmp_path, capsys):
    hostile = f'it\'s $(touch {tmp_path}/run) `x`; "y" *'
    Runner(str(tmp_path / "o"), dry=True).run([step(tmp_path / "log", hostile, name="a"), Step([], note="a note")])
    first, second = capsys.readouterr().out.splitlines()
    assert shlex.split(first)[2:] == step(tmp_path / "log", hostile).command and second == "a note"
    assert list(tmp_path.iterdir()) == []


def code_after_sigterm(folder: Path, call: str, *files: str) -> int:
    """The exit code of a process that handles SIGTERM as the scripts do, and gets one when `files` are written."""
    script = (
        "import signal, sys; from dinov2.run.commands import execute; from dinov2.run.pipeline import Runner, Step\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n{call}"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=folder, env={"PYTHONPATH": str(ROOT)})
    while not all((folder / file).is_file() and (folder / file).read_text() for file in files):
        time.sleep(0.05)
    time.sleep(0.5)  # the last command is known to the process too
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=20)


PID = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"


@pytest.mark.parametrize(
    ("call", "files"),
    [
        (f"execute(['-c', {PID!r}, 'a'])", "a"),
        (f"Runner('.', jobs=2).run([Step(['-c', {PID!r}, name], name, after=()) for name in 'ab'])", "ab"),
    ],
    ids=["one command", "side by side"],
)
def test_sigterm_ends_the_commands_too(tmp_path, call, files):
    assert code_after_sigterm(tmp_path, call, *files) == 143
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / file).read_text()), 0)


def test_ctrl_c_reaches_the_command_and_leaves_no_traceback(tmp_path):
    body = (
        "import time, pathlib; from utils import cli; pathlib.Path('started').touch(); cli.run(lambda: time.sleep(60))"
    )
    script = (  # a shell's background jobs, from which the tests may have been started, ignore SIGINT
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from utils import cli; "
        f"from dinov2.run.commands import execute; cli.run(lambda: execute(['-c', {body!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while not (tmp_path / "started").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and said.count("\n") <= 1 and "Traceback" not in said


@pytest.mark.parametrize("folder", ["train", ".", "train/ant", "a/b/c/d"])
def test_the_state_of_a_tree_changes_with_an_image_wherever_it_lies(tmp_path, folder):
    (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "data" / folder / "a.png").touch()
    before = tree_state(str(tmp_path / "data"))
    (tmp_path / "data/.index-train.json").touch()  # written by a run
    assert tree_state(str(tmp_path / "data")) == before
    (tmp_path / "data" / folder / "b.png").touch()
    assert tree_state(str(tmp_path / "data")) != before


def test_the_state_of_a_tree_ends_where_a_link_leads_back(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/up").symlink_to(tmp_path / "a")
    assert tree_state(str(tmp_path)) == tree_state(str(tmp_path))


def test_the_state_of_the_data_changes_with_labels_that_lie_elsewhere(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "labels.csv").write_text("path,label\na.png,x\n")
    options = Options(data=str(tmp_path / "data"), overrides=[f"data.labels={tmp_path / 'labels.csv'}"])
    before = data_state(options)
    (tmp_path / "labels.csv").write_text("path,label\na.png,y\n")
    assert data_state(options) != before


def test_paths_are_the_callers():
    assert from_root("a b/", "/root/x", "/root") == "x/a b"
    assert from_root("/else/a", "/root", "/root") == "/else/a"
    assert from_root("-x", "/root", "/root") == "./-x"
    assert from_root(".", str(ROOT / "docs"), str(ROOT)) == "docs"


def test_data_without_labels_is_evaluated_by_what_needs_none(tmp_path):
    (tmp_path / "data").mkdir()
    for name in "abc":
        (tmp_path / f"data/{name}.png").touch()
    (tmp_path / "o/none/nct").mkdir(parents=True)
    (tmp_path / "o/none/nct/config.yaml").touch()
    options = Options(data=str(tmp_path / "data"), output=str(tmp_path / "o"), noises=["none"], methods=["nct"])
    finish(options)
    steps = list(evaluate(options))
    assert [step.command[1] for step in steps if step.command] == ["dinov2.eval.label_free", "dinov2.eval.pca"]
    assert steps[0].note.startswith("linear, knn: left out, ") and "has no labels" in steps[0].note


def test_the_oracle_comes_last_and_not_without_a_noise():
    assert list(runs_of(Options(methods=["clean", "nct"])))[-1] == ("none", "clean")
    assert list(runs_of(Options(methods=["clean", "nct"], noises=["none"]))) == [("none", "nct")]
