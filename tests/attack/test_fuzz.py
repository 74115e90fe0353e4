"""A short hunt with fixed damage, and that the hunt itself sees what it looks for."""

import os
import signal
import time

import pytest

from tests.attack import fuzz
from tests.attack.samples import image_files
from utils.images import read_image


def test_whole_samples_are_read(tmp_path):
    for name, content in image_files().items():
        (tmp_path / name).write_bytes(content)
        channels = 5 if name in ("deep.npy", "float.npy", "channels.tif", "planes.tiff", "pages.tif") else 3
        assert read_image(tmp_path / name, channels).shape[2] == channels


def test_damaged_files_are_read_or_refused_by_name():
    figures = fuzz.hunt(seconds=20, cases=400)
    assert figures.findings == [] and figures.files >= 100
    assert set(figures.refused) == set(fuzz.TOOLS), "a tool that refused nothing was not attacked"


def raises(error):
    def tool(root, relative):
        raise error

    return tool


TROUBLES = {
    "crash": raises(KeyError("x")),
    "unnamed": raises(ValueError("a file is bad")),
    "hang": lambda root, relative: time.sleep(60),
    "dies": lambda root, relative: os.kill(os.getpid(), signal.SIGKILL),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_hunt_counts_what_goes_wrong_and_goes_on(monkeypatch, trouble):
    monkeypatch.setattr(fuzz, "TOOLS", {"tool": TROUBLES[trouble]})
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 0.5)
    figures = fuzz.hunt(seconds=30, cases=2)
    assert figures.count({"dies": "crash"}.get(trouble, trouble)) == len(figures.findings) == 2


def test_the_damage_is_a_function_of_seed_and_case():
    samples = image_files()
    assert fuzz.damaged(0, 5, samples) == fuzz.damaged(0, 5, samples) != fuzz.damaged(1, 5, samples)
