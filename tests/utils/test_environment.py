"""environment.json: one entry for each start, and the commit of the code alone."""

import json
import shutil
import subprocess

import pytest

from utils import environment
from utils.environment import record_environment

FIELDS = {"time", "command", "commit", "versions", "processor", "cores", "memory", "gpu", "host"}


def test_each_start_is_an_entry(tmp_path):
    run = tmp_path / "run"
    record_environment(run)
    record_environment(run)
    entries = json.loads((run / "environment.json").read_text())
    assert len(entries) == 2 and entries == environment.read_environment(run)
    assert set(entries[0]) == FIELDS and set(entries[0]["versions"]) == {"python", "torch", "numpy", "project"}
    assert "python" in entries[0]["command"] and entries[0]["cores"] >= 1 and entries[0]["processor"]
    assert [file.name for file in run.iterdir()] == ["environment.json"]


@pytest.mark.parametrize("content", ["", "[1, {", '{"time": 1}', "[1, null]", b"\xff"])
def test_an_unreadable_list_is_begun_anew(tmp_path, content):
    (tmp_path / "environment.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert environment.read_environment(tmp_path) == []
    record_environment(tmp_path)
    assert len(environment.read_environment(tmp_path)) == 1


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_of_the_code(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert environment.commit(tmp_path) is None
    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "a")
    commit = environment.commit(tmp_path)
    assert len(commit) == 40
    (tmp_path / "untracked").write_text("1")
    assert environment.commit(tmp_path) == commit
    (tmp_path / "a.py").write_text("2")
    assert environment.commit(tmp_path) == commit + " + changes"
    (tmp_path / "installed").mkdir()  # code within another project's repository
    assert environment.commit(tmp_path / "installed") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit(tmp_path) is None
