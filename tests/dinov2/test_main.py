"""One command for all tools."""

import importlib.util
import subprocess
import sys

import pytest

from dinov2.__main__ import TOOLS


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "dinov2", *words], capture_output=True, text=True)


@pytest.mark.parametrize("module", sorted({module for module, _ in TOOLS.values()}))
def test_every_tool_is_there(module):
    assert importlib.util.find_spec(module)


def test_help_names_the_tools_and_a_wrong_one_the_nearest():
    assert all(f"  {name} " in command("--help").stdout for name in TOOLS)
    wrong = command("denoize")
    assert wrong.returncode == 2 and "did you mean denoise?" in wrong.stderr


def test_a_tool_takes_its_arguments_and_gives_its_exit_code(tmp_path):
    assert "--data" in command("denoise", "--help").stdout
    failed = command("check", str(tmp_path / "none"))
    assert failed.returncode == 2 and "none" in failed.stderr and "Traceback" not in failed.stderr
