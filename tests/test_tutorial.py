"""Every command of docs/tutorial.md and every cell of its notebook, on a few images of speckle, trained a little."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from utils.images import write_image

SHORT = {"--epochs 12": "--steps 2", "epochs=12": "steps=2"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("walk"), np.random.default_rng(0)
    for i in range(24):
        scene = np.full((64, 64, 1), 20.0)
        scene[20 : 30 + i, 20:40] = 90
        write_image(
            place / f"chips/{i:02}.png", (scene * rng.gamma(4, 0.25, scene.shape)).clip(1, 255).astype(np.uint8)
        )
    return place


def short(text: str) -> str:
    for long, instead in SHORT.items():
        text = text.replace(long, instead)
    return text


def test_every_command_of_the_page(place):
    blocks = re.findall(r"```shell\n(.*?)```", (ROOT / "docs/tutorial.md").read_text(), re.DOTALL)
    commands = [shlex.split(short(line), comments=True) for block in blocks for line in block.splitlines()]
    assert [words[2] for words in commands] == [
        "Neighbor2Neighbor.check", "dinov2.pretrain", "dinov2.eval.label_free", "dinov2.embed",
    ]  # fmt: skip
    for words in commands:
        assert words[0] == "python"
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=place, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (place / "runs/chips/report.html").exists() and (place / "map.json").exists()
    assert len((place / "chips.csv").read_text().splitlines()) == 25


def test_every_cell_of_the_notebook(place, monkeypatch):
    """After the page: what is trained there is not trained anew."""
    import matplotlib

    matplotlib.use("agg")
    monkeypatch.chdir(place)
    cells = [cell for cell in json.loads((ROOT / "docs/tutorial.ipynb").read_text())["cells"]]
    names: dict = {}
    for cell in cells:
        assert cell["cell_type"] != "code" or not cell["outputs"]
        if cell["cell_type"] == "code":
            exec(compile(short("".join(cell["source"])), "tutorial.ipynb", "exec"), names)
    assert len(names["names"]) == 24 and names["places"].shape == (24, 2)
