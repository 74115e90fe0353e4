"""How OpenMP's threads wait is said before torch is loaded, by every package, and a user's own word stands."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PRINT = "import os, sys, {}; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    "package,own,expected",
    [
        ("utils", {}, "1000 False"),
        ("dinov2", {}, "1000 False"),
        ("Neighbor2Neighbor", {}, "1000 False"),
        ("toy_mnist", {}, "1000 False"),
        ("dinov2.run.task", {}, "1000 False"),
        ("dinov2", {"GOMP_SPINCOUNT": "7"}, "7 False"),
        ("dinov2", {"OMP_WAIT_POLICY": "passive"}, "None False"),
    ],
)
def test_a_package_sets_the_spin_before_torch(package, own, expected):
    env = {key: value for key, value in os.environ.items() if key not in OWN} | own
    command = [sys.executable, "-c", PRINT.format(package)]
    printed = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    assert printed.strip() == expected
