"""The plain lines of a progress bar: their pace is recent, and what came before the first unit no part of it."""

import pytest

from utils import progress
from utils.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_time_left_is_not_that_of_the_start(clock, capsys):
    with Progress(1000, "probe", "it") as bar:
        clock[0] += 500  # features are cached
        bar.update(1)
        for _ in range(40):
            clock[0] += 0.5
            bar.update(1)
    first, second = capsys.readouterr().err.splitlines()[:2]
    assert first == "probe: 1/1000 it"
    assert second == "probe: 21/1000 it, 2.0 it/s, 8 min left"


def test_the_pace_is_recent(clock, capsys):
    with Progress(10_000, "training", "img", initial=2000) as bar:
        for seconds in [1.0] * 100 + [10.0] * 60:
            clock[0] += seconds
            bar.update(10, loss=0.5)
    assert "training: 3600/10000 img, 1.0 img/s, 1 h 47 min left loss=0.5" in capsys.readouterr().err


def test_slow_units_have_a_rate_too(clock, capsys):
    with Progress(3, "evaluation", "run") as bar:
        for _ in range(3):
            clock[0] += 40
            bar.update(1)
    assert "evaluation: 2/3 run, 0.025 run/s, 40 s left" in capsys.readouterr().err
