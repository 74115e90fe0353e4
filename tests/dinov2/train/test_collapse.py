"""A run in which nothing is learned says so: the information of the targets, the warning, the stop, live kNN."""

import math

import pytest
import torch

from dinov2.config import load_config
from dinov2.train import __main__ as program
from dinov2.train.__main__ import live_knn, main
from dinov2.train.collapse import Collapsed, CollapseMonitor, Information, classify
from dinov2.train.curriculum import plan
from tests.dinov2.train.tiny import make_tree, settings
from utils import distributed
from utils.images import ImageError
from utils.results import read_json_lines

K = 8


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("data") / "tiny")


def information_of(targets: torch.Tensor) -> dict[str, float]:
    information = Information()
    for part in targets.split(3):  # micro-batches
        information.add("cls", part)
    return information.read()["cls"]


def test_information_of_known_targets():
    one_hot = information_of(torch.eye(K))
    assert one_hot["information"] == pytest.approx(math.log(K), rel=1e-6)
    assert one_hot["target_entropy"] == pytest.approx(0, abs=1e-6)
    half = information_of(torch.eye(2).repeat(4, 1) @ torch.eye(K)[:2])  # two prototypes, one image in two
    assert half["information"] == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    ("targets", "kind"),
    [
        (torch.full((4, K), 1 / K), "uniform"),
        (torch.eye(K)[:1].repeat(4, 1), "one prototype"),
        (torch.tensor([[0.5, 0.5] + [0.0] * (K - 2)]).repeat(4, 1), "same for all"),
        (torch.eye(K), ""),
    ],
)
def test_both_collapses_are_told_apart(targets, kind):
    assert classify(information_of(targets)) == kind


def test_a_window_holds_enough_crops_and_starts_anew(tmp_path, tree):
    cfg = load_config(settings(tree, tmp_path, "train.batch_size=40", "train.log_every=10"))
    monitor = CollapseMonitor(cfg)
    measured = [iteration for iteration in range(20) if monitor.window(iteration)]
    assert measured == [6, 7, 8, 9, 16, 17, 18, 19]  # four steps of 80 crops before each row
    monitor.window(9).add("cls", torch.eye(K))
    assert monitor.read(10, 10)["information_cls_ratio"] == pytest.approx(1)
    assert monitor.read(20, 10) == {}  # nothing was added since


COLLAPSING = (
    "teacher.warmup_temp=1",
    "teacher.temp=1",
    "train.batch_size=12",
    "train.epoch_length=11",
    "train.log_every=11",
)


def test_a_run_forced_to_collapse_warns_once_and_at_its_end(tree, tmp_path, capsys):
    main(settings(tree, tmp_path / "run", *COLLAPSING, "train.epochs=8"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(said) == 2 and "same, uniform target since iteration 22" in said[0]
    assert "teacher.temp=1" in said[0] and "dino.prototypes=32" in said[0] and "docs/small_data.md" in said[0]
    rows = [row for row in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "collapsed" in row]
    assert [row["collapsed"] for row in rows] == [""] * 5 + ["uniform"] * 3
    assert rows[-1]["information_cls_ratio"] < 0.01 and rows[-1]["log_prototypes"] == pytest.approx(math.log(32))


def test_a_run_forced_to_collapse_stops_when_told_to(tree, tmp_path):
    with pytest.raises(Collapsed, match="nothing is distilled"):
        main(settings(tree, tmp_path / "run", *COLLAPSING, "train.epochs=8", "train.on_collapse=stop"))
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert rows[-1]["iteration"] == 66 and rows[-1]["collapsed"] == "uniform"  # the row that shows it is written


def test_a_healthy_run_says_nothing(tree, tmp_path, capsys):
    more = ("train.batch_size=12", "train.epoch_length=11", "train.log_every=11", "teacher.temp=0.02")
    main(settings(tree, tmp_path / "run", *more, "teacher.warmup_temp=0.02"))
    assert "warning" not in capsys.readouterr().out


def test_live_knn_starts_with_the_untrained_backbone(tree, tmp_path):
    main(settings(tree, tmp_path / "run", "train.knn_every=2"))
    rows = [row for row in read_json_lines(tmp_path / "run" / "metrics.jsonl") if "live_knn_top1" in row]
    assert [row["epoch"] for row in rows] == [0, 2, 4] and all(0 <= row["live_knn_top1"] <= 100 for row in rows)


def test_live_knn_without_classes_is_left_out_and_said(tree, tmp_path, capsys):
    flat = tmp_path / "flat"
    for split in ("train", "val"):
        (flat / split).mkdir(parents=True)
        for path in (tree / split).glob("*/*.png"):
            (flat / split / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    main(settings(flat, tmp_path / "run", "train.knn_every=1", "train.epochs=2"))
    assert capsys.readouterr().out.count("no live kNN") == 1


def test_live_knn_of_a_broken_image_ends_several_ranks_and_is_left_out_by_one(tree, tmp_path, monkeypatch):
    """The image is read by one rank alone: the others would wait for it."""

    def break_off(*_):
        raise ImageError("val/a/1.png cannot be read")

    monkeypatch.setattr(program, "extract", break_off)
    stage = plan(load_config(settings(tree, tmp_path / "run")))[0]
    assert live_knn(stage)(None) is None
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(ImageError, match="val/a/1.png"):
        live_knn(stage)(None)


def test_no_neighbours_to_evaluate_by_are_no_error_of_the_training(tree, tmp_path):
    live_knn(plan(load_config(settings(tree, tmp_path / "run", "eval.knn.k=[]")))[0])


def test_without_local_crops(tree, tmp_path):
    main(settings(tree, tmp_path / "run", "crops.local_number=0", "train.epochs=2"))
    row = read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert "dino_local_crops_loss" not in row and row["dino_global_crops_loss"] > 0
