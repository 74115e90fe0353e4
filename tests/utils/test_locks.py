"""Locks: one holder, named to others; what is left of a process that is gone is taken over."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from utils import locks
from utils.locks import locked


def change(lock, **fields):
    lock.write_text(json.dumps(json.loads(lock.read_text()) | fields))


def left(folder, **fields):
    """A lock as a process that was killed left it."""
    locks.acquire(folder / ".lock")
    change(folder / ".lock", **fields)


def test_a_second_holder_is_told_who_holds_it_and_the_lock_goes_with_its_block(tmp_path):
    with locked(tmp_path / "run"):
        sentence = rf"run is in use by process {os.getpid()} on .* remove .*run/\.lock if"
        with pytest.raises(ValueError, match=sentence) as said, locked(tmp_path / "run"):
            pass
        assert "\n" not in str(said.value)
        with locked(tmp_path / "run", "-1-of-2"):  # another part
            pass
    with pytest.raises(RuntimeError), locked(tmp_path / "run"):
        (tmp_path / "run/kept").touch()
        raise RuntimeError
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]
    with pytest.raises(RuntimeError), locked(tmp_path / "refused"):
        raise RuntimeError
    assert not (tmp_path / "refused").exists(), "a folder of nothing but the lock goes with it"


def test_sweeping_takes_the_lock_of_a_process_that_is_gone_alone(tmp_path):
    left(tmp_path, pid=2**22 + 1)
    locks.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []
    left(tmp_path)
    locks.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("fields", [{"pid": 2**22 + 1}, {"boot": "another", "pid": os.getpid()}, {"start": None}])
def test_the_lock_of_a_process_that_is_gone_is_taken_over(tmp_path, fields):
    left(tmp_path, **fields)
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_the_dead_that_nobody_collects_hold_nothing(tmp_path):
    """As in a container whose first process does not wait for the orphans."""
    child = os.fork()
    if not child:
        try:
            locks.acquire(tmp_path / ".lock")
        finally:
            os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it stays where it is
    try:
        with locked(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    finally:
        os.waitpid(child, 0)


def test_the_lock_of_another_host_stays_unless_its_slurm_job_was_started_again(tmp_path, monkeypatch):
    left(tmp_path, space="another", pid=2**22 + 1)
    with pytest.raises(ValueError, match="in use"), locked(tmp_path):
        pass
    (tmp_path / ".lock").unlink()
    left(tmp_path, host="elsewhere", pid=2**22 + 1, job="77", restarts=0)
    for job, restarts in ((None, None), ("78", "1"), ("77", "0"), ("77", None)):
        for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
        with pytest.raises(ValueError, match="on elsewhere, Slurm job 77"), locked(tmp_path):
            pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\xff"])
def test_what_is_no_lock_of_ours_is_left_alone_and_named(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(ValueError, match=r"remove .*\.lock"), locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == content


def contend(folder, barrier, results, over):
    barrier.wait()
    try:
        with locked(folder):
            results.put(True)
            over.wait(30)
    except ValueError:
        results.put(False)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_holds_it(tmp_path, stale):
    if stale:
        left(tmp_path, pid=2**22 + 1)
    context = multiprocessing.get_context("fork")
    barrier, results, over = context.Barrier(8), context.Queue(), context.Event()
    children = [context.Process(target=contend, args=(tmp_path, barrier, results, over)) for _ in range(8)]
    [child.start() for child in children]
    assert sorted(results.get(timeout=30) for _ in children) == [False] * 7 + [True]
    over.set()
    [child.join() for child in children]
    assert list(tmp_path.iterdir()) == []


def test_without_hard_links_a_file_is_made_exclusively(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    with locked(tmp_path), pytest.raises(ValueError, match="in use"), locked(tmp_path):
        pass


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), FileExistsError(17, "there")])
def test_a_link_whose_answer_was_lost_is_held_and_one_that_fails_is_said(tmp_path, monkeypatch, error):
    signal.alarm(20)  # it was tried again and again
    link = os.link

    def fail(*paths):
        raise error

    def lose_the_answer(*paths):
        link(*paths)
        raise error

    monkeypatch.setattr(os, "link", lose_the_answer)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run/.lock").exists()
    monkeypatch.setattr(os, "link", fail)
    if not isinstance(error, FileExistsError):
        with pytest.raises(OSError, match="I/O error"), locked(tmp_path / "run"):
            pass
    signal.alarm(0)


def test_a_mark_that_goes_while_it_is_looked_at_is_no_error(tmp_path, monkeypatch):
    left(tmp_path, pid=2**22 + 1)
    monkeypatch.setattr(locks, "_create", lambda *_: False)  # another process is taking the lock over
    locks._take_over(tmp_path / ".lock", (tmp_path / ".lock").read_text())


HOLD = """import sys, time; from utils.locks import locked
with locked(sys.argv[1]):
    print('held', flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_releases_it_and_a_kill_leaves_it_to_be_taken_over(tmp_path, number):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=-3)
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=f"process {child.pid}"), locked(tmp_path):
        pass
    child.send_signal(number)
    child.wait()
    assert (tmp_path / ".lock").exists() == (number == signal.SIGKILL)
    with locked(tmp_path):
        pass


def test_a_script_holds_it_by_its_own_process(tmp_path):
    command = [sys.executable, "-m", "utils.locks", str(tmp_path), "quickstart", str(os.getpid())]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    again = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith(f"error: {tmp_path} is in use by process {os.getpid()}")
    change(tmp_path / ".lock-quickstart", pid=2**22 + 1)
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
