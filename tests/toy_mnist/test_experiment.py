"""The experiment from end to end on a small set: the shell script, skipping, the sweep, the table, users' errors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy_mnist.conftest import write_mnist
from toy_mnist import experiment, pretrain
from toy_mnist.report import seeds_table, write_report
from utils import cli
from utils.locks import locked
from utils.results import append_result, read_results

TOY = Path(experiment.__file__).parent


def call(monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["experiment", *map(str, args)])
    experiment.main()


def test_shell_script_runs_from_its_folder_and_skips_what_is_finished(tmp_path):
    write_mnist(tmp_path / "mnist", zipped=True)
    command = ["sh", "mlp_exp.sh", "2", "--data", str(tmp_path / "mnist"), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix}

    def start() -> str:
        done = subprocess.run([*command, "--epochs", "5"], cwd=TOY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = start()
    rows = read_results(tmp_path / "out" / "mnist")
    kinds = {(r["method"], r["view"], r["details"]["switch_epoch"], r["seed"]) for r in rows}
    one_seed = [("noisy", "noisy", 0), ("clean_then_noisy", "noisy", 3), ("clean", "noisy", 5), ("clean", "clean", 5)]
    assert kinds == {(*kind, seed) for kind in one_seed for seed in (0, 1)} and len(rows) == 8
    assert all(0 <= row["value"] <= 100 and row["dataset"] == "mnist" for row in rows)
    assert "| clean 3 then noisy 2, on noisy | 2 |" in first and first.count("seed 1, noise") == 4
    table = (tmp_path / "out" / "mnist" / "table.md").read_text()
    assert table in first and (tmp_path / "out" / "mnist" / "seeds.png").stat().st_size > 1000
    again = start()
    assert "seed 1, noise" not in again and table in again
    assert read_results(tmp_path / "out" / "mnist") == rows


def test_sweep_reuses_the_main_experiment_and_draws_its_plot(tmp_path, mnist_folder, monkeypatch, capsys):
    common = ("--data", mnist_folder, "--output", tmp_path, "--epochs", 4)
    call(monkeypatch, *common)
    before = read_results(tmp_path / "mnist")
    assert not (tmp_path / "mnist" / "sweep.png").exists()
    monkeypatch.setattr(experiment, "SWEEP_STDS", (0.2, 0.4))
    monkeypatch.setattr(experiment, "SWEEP_SWITCHES", (0, 2, 3, 4))
    call(monkeypatch, *common, "--sweep")
    rows = read_results(tmp_path / "mnist")
    assert rows[: len(before)] == before
    cells = [(r["noise"], r["details"]["switch_epoch"]) for r in rows]
    wanted = [(noise, s) for noise in ("gauss51", "gauss102") for s in (0, 2, 3, 4)] + [("none", 4)]
    assert sorted(cells) == sorted(wanted)  # each once
    out = capsys.readouterr().out
    assert "| noise std | switch 0 | switch 2 | switch 3 | switch 4 |" in out and "| 0.2 |" in out
    assert (tmp_path / "mnist" / "sweep.png").stat().st_size > 1000


def test_a_figure_does_not_depend_on_what_ran_before_it(tmp_path, mnist_folder, monkeypatch):
    common = ("--data", mnist_folder, "--epochs", 4, "--std", 0.4)
    call(monkeypatch, *common, "--output", tmp_path / "a", "--switch", 2)
    for switch in (4, 3, 2):
        call(monkeypatch, *common, "--output", tmp_path / "b", "--switch", switch)

    def figure(folder: str) -> list[float]:
        rows = read_results(tmp_path / folder / "mnist")
        return [row["value"] for row in rows if row["details"]["switch_epoch"] == 2]

    assert figure("a") == figure("b") and len(figure("a")) == 1


def test_interrupted_experiment_leaves_no_half_written_file_and_goes_on(tmp_path, mnist_folder, monkeypatch, capsys):
    calls = iter(range(7))
    train_epoch = pretrain.train_epoch

    def interrupted(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return train_epoch(*args)

    monkeypatch.setattr(pretrain, "train_epoch", interrupted)
    common = ("--data", mnist_folder, "--output", tmp_path / "out", "--epochs", 5)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: call(monkeypatch, *common))
    assert stop.value.code == 130 and "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.tmp-*"))
    monkeypatch.setattr(pretrain, "train_epoch", train_epoch)
    call(monkeypatch, *common)
    assert len(read_results(tmp_path / "out" / "mnist")) == 4


def test_two_at_once_do_not_count_a_seed_twice(tmp_path, mnist_folder, monkeypatch):
    with locked(tmp_path / "mnist"), pytest.raises(ValueError, match="mnist is in use by process"):
        call(monkeypatch, "--data", mnist_folder, "--output", tmp_path, "--epochs", 1)
    assert not read_results(tmp_path / "mnist")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seeds", 0], "must be at least 1"),
        (["--switch", 60], r"switch epochs in 0\.\.50"),
        (["--std", -1], "gauss-255"),
        (["--data", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_users_errors_are_one_line(tmp_path, mnist_folder, monkeypatch, args, message):
    with pytest.raises(ValueError, match=message) as error:
        call(monkeypatch, "--data", mnist_folder, "--output", tmp_path / "out", *args)
    assert "\n" not in str(error.value)


def test_results_of_other_images_or_epochs_do_not_mix(tmp_path, monkeypatch):
    common = ("--output", tmp_path / "out", "--switch", 1)
    call(monkeypatch, *common, "--data", write_mnist(tmp_path / "a"), "--epochs", 1)
    for folder, epochs in ((write_mnist(tmp_path / "b", train=600), 1), (tmp_path / "a", 2)):
        with pytest.raises(ValueError, match="holds results of other images or other --epochs"):
            call(monkeypatch, *common, "--data", folder, "--epochs", epochs)


def test_table_has_mean_spread_and_published_figures(tmp_path):
    results = {("gauss102", 0): [60.0, 66.0], ("gauss102", 30): [83.0], ("none", 50): [91.0]}
    lines = seeds_table(results, (0, 30, 50), is_mnist=True).splitlines()
    assert lines[2] == "| noisy 50, on noisy | 2 | 63.00 | 4.24 | 60.00 | 66.00 | 64.55 | 67.4 |"
    assert lines[3] == "| clean 30 then noisy 20, on noisy | 1 | 83.00 | - | 83.00 | 83.00 | 83.05 | 83.8 |"
    assert len(lines) == 5 and "64.55" not in seeds_table(results, (0, 30, 50), is_mnist=False)
    for seed, value in ((1, 61.0), (0, 63.0)):
        row = {"method": "noisy", "noise": "gauss102", "dataset": "digits", "seed": seed, "epoch": 50, "iteration": 1}
        row |= {"metric": "linear_top1", "value": value, "view": "noisy", "protocol": "toy"}
        append_result(tmp_path / "results.jsonl", row | {"details": {"switch_epoch": 0}})
    assert "| noisy 50, on noisy | 2 | 62.00 | 1.41 |" in write_report(tmp_path, (0, 30, 50))
