"""The curriculum: plans, what a restart and a continuation carry, shared denoised runs, anchors, what is refused."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dinov2 import checkpoint
from dinov2.config import load_config, load_run_config, save_run_config
from dinov2.data.dataset import Mix
from dinov2.models.vision_transformer import build_backbone
from dinov2.train import curriculum
from dinov2.train.__main__ import build_trainer, main
from dinov2.train.batches import BatchMaker
from dinov2.train.optim import optimizer_state
from dinov2.train.trainer import Trainer
from tests.dinov2.train.tiny import make_tree, settings
from utils.images import denoised_root, list_images, twin
from utils.noise import NoiseSpec
from utils.results import read_json_lines
from utils.trees import TreeWriter

# A denoised schedule of 4 epochs, restarted from its epoch 2 on noisy images for 2 epochs.
SHORT = ["curriculum.restart_epoch=2", "curriculum.noisy_epochs=2", "anchor.weights.gauss50=1.5"]


def write_denoised(tree: Path, noise: str = "gauss50", **fields) -> Path:
    """The denoised twin of a tree, finished: blurred copies that carry the manifest of a real one."""
    root = denoised_root(tree, NoiseSpec.parse(noise))
    made = {"kind": "denoised", "noise": noise, "noise_seed": 0, "format": "png"} | fields
    writer = TreeWriter(tree, root, list_images(tree), made, "png")
    writer.begin()
    for relative in writer.relatives:
        target = twin(root, relative)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(tree / relative).filter(ImageFilter.BoxBlur(1)).save(target)
    assert writer.finish() == 0
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    tree = make_tree(tmp_path_factory.mktemp("data") / "tiny", images=4)
    write_denoised(tree)
    return tree


@pytest.fixture
def own_tree(tmp_path) -> Path:
    """A data set of its own, to be spoilt."""
    tree = make_tree(tmp_path / "data" / "tiny", images=4)
    write_denoised(tree)
    return tree


def config(tree, output, method, *more):
    return load_config([method, *settings(tree, output, *SHORT, *more)])


def train(tree, output, method, *more) -> None:
    main([method, *settings(tree, output, *SHORT, *more)])


def teacher_at(run: Path, epoch: int) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(checkpoint.at_epoch(run, epoch).teacher)["teacher"]


def assert_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def nc_run(tree, tmp_path_factory) -> Path:
    """An nc run that trained its own denoised stage: run, run/denoised."""
    run = tmp_path_factory.mktemp("runs") / "nc"
    train(tree, run, "nc")
    return run


@pytest.fixture(scope="module")
def n2n_run(tree, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "n2n"
    train(tree, run, "n2n")
    return run


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, view",
    [("dinov2", "noisy"), ("clean", "clean")],
)
def test_plan_of_one_stage(method, view):
    (stage,) = curriculum.plan(config("data", "runs/x", method))
    assert (stage.view, stage.cfg.train.epochs, stage.stop_epoch, stage.keep) == (view, 4, 4, (4,))
    assert (stage.run, stage.init, stage.source, stage.anchor) == (Path("runs/x"), "scratch", None, None)
    assert stage.cfg.method == method


def test_denoised_run_keeps_what_later_curricula_start_from():
    def keep(*more):
        (stage,) = curriculum.plan(config("data", "runs/x", "n2n", *more))
        assert (stage.view, stage.stop_epoch, stage.cfg.method) == ("denoised", 4, "n2n")
        return stage.keep

    assert keep() == (2, 4) and keep("anchor.epoch=3") == (2, 3, 4)
    assert keep("curriculum.restart_epoch=5") == (4,), "beyond its schedule"


@pytest.mark.parametrize(
    "method, more, stop, keep, anchor",
    [
        ("nc", [], 2, (2,), None),
        ("nct", [], 2, (2,), ("runs/x/denoised", 2)),
        ("nct", ["anchor.epoch=4"], 4, (2, 4), ("runs/x/denoised", 4)),
        ("nct", ["anchor.epoch=1"], 2, (1, 2), ("runs/x/denoised", 1)),
        ("nct", ["anchor.epoch=4", "anchor.run=runs/n2n"], 2, (2,), ("runs/n2n", 4)),
        ("nct", ["anchor.epoch=4", "anchor.run=runs/x/denoised"], 4, (2, 4), ("runs/x/denoised", 4)),
    ],
)
def test_plan_of_two_stages(method, more, stop, keep, anchor):
    more = [*more, "curriculum.noisy_set={optim.warmup_epochs: 2, teacher.temp: 0.05}"]
    first, second = curriculum.plan(config("data", "runs/x", method, *more))
    assert (first.view, first.cfg.train.epochs, first.stop_epoch, first.keep) == ("denoised", 4, stop, keep)
    assert (first.run, first.init, first.anchor) == (Path("runs/x/denoised"), "scratch", None)
    assert (second.view, second.cfg.train.epochs, second.stop_epoch, second.keep) == ("noisy", 2, 2, (2,))
    assert (second.run, second.init, second.source) == (Path("runs/x"), "restart", first.run)
    assert second.from_epoch == 2 and second.anchor == (anchor and (Path(anchor[0]), anchor[1]))
    # The first is an n2n run by itself; what the noisy stage changes is its own.
    assert (first.cfg.method, first.cfg.output_dir, len(first.cfg.curriculum.stages)) == ("n2n", "runs/x/denoised", 1)
    assert (second.cfg.method, second.cfg.output_dir) == (method, "runs/x")
    assert (first.cfg.optim.warmup_epochs, second.cfg.optim.warmup_epochs, second.cfg.teacher.temp) == (1, 2, 0.05)


def test_published_plan_of_imagenet1k():
    more = ["data.root=imagenet", "output_dir=runs/x", "noise=gauss255", "curriculum.denoised_dir=runs/d"]
    first, second = curriculum.plan(load_config(["imagenet1k", "nct", *more]))
    assert (first.cfg.train.epochs, first.stop_epoch, first.keep) == (100, 100, (30, 100))
    assert (second.cfg.train.epochs, second.from_epoch, second.anchor) == (70, 30, (Path("runs/d"), 100))
    assert (second.cfg.teacher.warmup_temp_epochs, second.cfg.optim.warmup_epochs) == (15, 5)


# -- what a stage starts from -----------------------------------------------------------------------------------------


def held(run: Path, epoch: int, like: Trainer) -> dict:
    """State of a run's checkpoint, read into a trainer of the same shape."""
    state = {"model": like.model.checkpoint_state(), "optimizer": optimizer_state(like.model.student, like.optimizer)}
    return checkpoint.load(checkpoint.at_epoch(run, epoch), state)


def test_restart_carries_student_teacher_and_centres_alone(nc_run, tree, tmp_path):
    denoised = nc_run / "denoised"
    stage = curriculum.plan(config(tree, tmp_path / "new", "nc", f"curriculum.denoised_dir={denoised}"))[1]
    trainer = build_trainer(stage)
    source = held(denoised, 2, build_trainer(curriculum.plan(config(tree, tmp_path / "other", "dinov2"))[0]))
    state = trainer.model.checkpoint_state()
    assert_equal(state, source["model"])
    assert_equal(
        {n.removeprefix("teacher."): v for n, v in state.items() if n.startswith("teacher.")}, teacher_at(denoised, 2)
    )
    assert state["dino_center.center"].any() and state["ibot_center.center"].any()
    name = "backbone.blocks.0.mlp.fc1.weight"
    assert not torch.equal(state[f"student.{name}"], state[f"teacher.{name}"])
    # Fresh: no moments, first iteration, schedules over the epochs of this stage.
    assert not trainer.optimizer.state and trainer.iteration == 0
    assert trainer.schedules.lr.total == 2 * 3 and trainer.schedules(0).lr == 0
    assert trainer.schedules(0).last_layer_lr == 0 and trainer.schedules(6).lr == 1e-6
    assert [c.iteration for c in checkpoint.list_checkpoints(nc_run)][-1] == 6


def two_stages(folder: Path, init: str, **changes) -> str:
    first = f"{{view: denoised, epochs: 4, stop: 2, dir: {folder / 'denoised'}}}"
    second = f"{{view: noisy, epochs: 2, dir: {folder}, init: {init}, set: {changes}}}"
    return f"curriculum.stages=[{first}, {second}]"


def test_continuation_carries_the_optimiser_too(nc_run, tree, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(nc_run / "denoised", run / "denoised")
    stages = two_stages(run, "continue", **{"optim.layerwise_decay": 0.5})
    stage = curriculum.plan(config(tree, run, "dinov2", stages))[1]
    trainer = build_trainer(stage)
    assert "student, teacher, centres and optimiser" in capsys.readouterr().out
    source = held(run / "denoised", 2, build_trainer(curriculum.plan(config(tree, tmp_path / "other", "dinov2"))[0]))
    assert_equal(trainer.model.checkpoint_state(), source["model"])
    own = optimizer_state(trainer.model.student, trainer.optimizer)
    moments = {name: value for name, value in source["optimizer"].items() if name.startswith("state.")}
    assert_equal({name: own[name] for name in moments}, moments)
    assert (
        moments["state.dino_head.mlp.0.weight.exp_avg_sq"].any() and moments["state.dino_head.mlp.0.weight.step"] == 6
    )
    # This stage's own: iteration, schedules, groups.
    assert trainer.iteration == 0 and trainer.schedules(0).lr == 0
    assert min(group["lr_multiplier"] for group in trainer.optimizer.param_groups) == 0.5**2 * 0.2
    train(tree, run, "dinov2", stages)
    assert checkpoint.latest(run).iteration == 6
    restarted = tmp_path / "restarted"
    train(tree, restarted, "dinov2", two_stages(restarted, "restart", **{"optim.layerwise_decay": 0.5}))
    assert_equal(teacher_at(run / "denoised", 2), teacher_at(restarted / "denoised", 2))
    a, b = teacher_at(run, 2), teacher_at(restarted, 2)
    assert not all(torch.equal(a[name], b[name]) for name in a)


# -- shared denoised runs ---------------------------------------------------------------------------------------------


def contents(run: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}


def test_denoised_run_that_is_there_is_used_as_it_is(n2n_run, nc_run, tree, tmp_path, capsys):
    before = contents(n2n_run)
    assert checkpoint.at_epoch(n2n_run, 2)
    train(tree, tmp_path / "nc", "nc", f"curriculum.denoised_dir={n2n_run}")
    assert f"{n2n_run}: finished (epoch 2), skipped" in capsys.readouterr().out
    assert contents(n2n_run) == before
    assert_equal(teacher_at(tmp_path / "nc", 2), teacher_at(nc_run, 2))


def test_denoised_run_of_nc_goes_on_to_be_an_n2n_run(n2n_run, nc_run, tree, tmp_path, capsys):
    """nc stopped it at epoch 2 of 4; n2n goes on there, to the very weights of one that was never stopped."""
    denoised = tmp_path / "denoised"
    shutil.copytree(nc_run / "denoised", denoised)
    assert load_run_config(denoised).method == "n2n" and [c.epoch for c in checkpoint.list_checkpoints(denoised)] == [
        1,
        2,
    ]
    train(tree, denoised, "n2n")
    assert "resumes from" in capsys.readouterr().out
    for epoch in (2, 4):
        assert_equal(teacher_at(denoised, epoch), teacher_at(n2n_run, epoch))
    # So does nct, although its anchor is none of the n2n run's settings: to the anchor's epoch, and no further.
    other = tmp_path / "other"
    shutil.copytree(nc_run / "denoised", other)
    train(tree, tmp_path / "nct", "nct", f"curriculum.denoised_dir={other}", "anchor.epoch=3", "anchor.head=frozen")
    assert checkpoint.latest(other).epoch == 3
    assert f"anchored to the teacher of {checkpoint.at_epoch(other, 3).path} (epoch 3)" in capsys.readouterr().out


def test_three_levels_of_noise_one_after_another(tree, tmp_path, capsys):
    run, levels = tmp_path / "run", ("gauss50", "gauss100", "gauss255")
    folders = [run / "50", run / "100", run]
    stages = [
        f"{{view: noisy, noise: {noise}, epochs: 1, dir: {folder}, init: {'restart' if number else 'scratch'}}}"
        for number, (noise, folder) in enumerate(zip(levels, folders, strict=True))
    ]
    arguments = f"curriculum.stages=[{', '.join(stages)}]", "noise=gauss255"
    train(tree, run, "dinov2", *arguments)
    assert [load_run_config(folder).noise for folder in folders] == list(levels)
    assert [checkpoint.latest(folder).iteration for folder in folders] == [3, 3, 3]
    out = capsys.readouterr().out
    assert f"starts from {folders[0]}" in out and f"starts from {folders[1]}" in out
    planned = curriculum.plan(config(tree, run, "dinov2", *arguments))
    assert [str(curriculum.make_dataset(stage).noise) for stage in planned] == list(levels)
    images = [curriculum.make_dataset(stage)[0][0][0] for stage in planned]
    clean = np.asarray(Image.open(tree / "train" / "a" / "0.png")).astype(float)
    errors = [np.abs(image - clean).mean() for image in images]
    assert errors == sorted(errors) and errors[0] > 10


def test_a_mix_of_views_moves_over_the_stage(tree, tmp_path):
    run = tmp_path / "run"
    stages = f"curriculum.stages=[{{view: mix, mix: [1.0, 0.0], epochs: 4, stop: 2, dir: {run}}}]"
    (stage,) = curriculum.plan(config(tree, run, "dinov2", stages))
    images = curriculum.make_dataset(stage)
    assert images.mix == Mix(1.0, 0.0, 6, 0), "from the stage's first to its last iteration"
    assert {images.choose(index, 0)[0] for index in range(8)} == {"denoised"}
    assert {images.choose(index, 6)[0] for index in range(8)} == {"noisy"}
    train(tree, run, "dinov2", stages)
    assert checkpoint.latest(run).epoch == 2


# -- the anchor -------------------------------------------------------------------------------------------------------


def test_anchor_is_the_teacher_of_another_run_and_epoch(n2n_run, nc_run, tree, tmp_path, capsys):
    run = tmp_path / "nct"
    more = [f"curriculum.denoised_dir={nc_run / 'denoised'}", f"anchor.run={n2n_run}", "anchor.epoch=4"]
    stage = curriculum.plan(config(tree, run, "nct", *more))[1]
    trainer = build_trainer(stage)
    assert f"anchored to the teacher of {checkpoint.at_epoch(n2n_run, 4).path} (epoch 4)" in capsys.readouterr().out
    assert_equal(trainer.model.anchor.state_dict(), teacher_at(n2n_run, 4))
    other = build_trainer(curriculum.plan(config(tree, tmp_path / "other", "dinov2"))[0])
    source = held(n2n_run, 4, other)["model"]
    centres = {
        name: trainer.model.state_dict()[f"anchor_{name}"].clone()
        for name in ("dino_center.center", "ibot_center.center")
    }
    assert_equal(centres, {name: source[name] for name in centres})
    teacher = {name: value for name, value in trainer.model.teacher.state_dict().items()}
    assert_equal(teacher, teacher_at(nc_run / "denoised", 2))
    # Trained, its centres have moved on, and a resumed run has those of its own checkpoint.
    train(tree, run, "nct", *more)
    resumed = build_trainer(stage)
    assert resumed.iteration == 6
    assert_equal(resumed.model.anchor.state_dict(), teacher_at(n2n_run, 4))
    assert not torch.equal(resumed.model.anchor_dino_center.center, centres["dino_center.center"])
    rows = read_json_lines(run / "metrics.jsonl")
    terms = {"anchor_dino_local_crops_loss", "anchor_dino_global_crops_loss", "anchor_ibot_loss"}
    assert len(rows) == 6 and all(terms <= row.keys() for row in rows)


def test_both_views_of_an_anchored_batch_are_cut_alike(tree, tmp_path):
    """With the noisy images in place of the denoised ones, the anchor gets the crops of the student to the bit."""
    stage = curriculum.plan(config(tree, tmp_path / "x", "nct"))[1]
    images = curriculum.make_dataset(stage)
    assert images.views == ("noisy", "denoised")
    trainer = Trainer(stage.cfg, curriculum.build_model(stage), images, stage.stop_epoch)
    data = next(trainer.load_batches(6))
    (batch,) = BatchMaker(stage.cfg)(data)
    assert batch.other_global_crops.shape == batch.global_crops.shape
    assert not torch.equal(batch.other_global_crops, batch.global_crops)
    data.canvases[1] = data.canvases[0]
    (batch,) = BatchMaker(stage.cfg)(data)
    assert torch.equal(batch.other_global_crops, batch.global_crops)


# -- refused, before anything is trained ------------------------------------------------------------------------------


def assert_refused(sentence: str, tree: Path, output: Path, method: str, *more: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        train(tree, output, method, *more)
    assert "\n" not in str(raised.value)
    assert not list(output.rglob("metrics.jsonl")), "nothing was trained"


@pytest.mark.parametrize("method", ["n2n", "nc", "nct"])
def test_denoised_images_that_are_missing_are_counted_and_named(own_tree, tmp_path, method):
    root = denoised_root(own_tree, NoiseSpec.parse("gauss50"))
    for name in ("a/1.png", "b/0.png"):
        (root / "train" / name).unlink()
    sentence = r"lacks 2 of 8 denoised images, the first for train/a/1\.png, train/b/0\.png: write them with python -m"
    assert_refused(sentence, own_tree, tmp_path / "x", method)
    shutil.rmtree(root)
    assert_refused(r"tiny-gauss50-denoised lacks 8 of 8 denoised images", own_tree, tmp_path / "x", method)


def test_only_the_noisy_baseline_needs_no_denoised_images(own_tree, tmp_path):
    shutil.rmtree(denoised_root(own_tree, NoiseSpec.parse("gauss50")))
    cfg = config(own_tree, tmp_path / "x", "dinov2")
    curriculum.check_inputs(curriculum.plan(cfg))


def test_denoised_tree_that_is_not_finished(own_tree, tmp_path):
    (denoised_root(own_tree, NoiseSpec.parse("gauss50")) / "manifest.json").unlink()
    sentence = (
        r"tiny-gauss50-denoised is not finished \(it has no manifest\.json\): run python -m Neighbor2Neighbor\.denoise"
    )
    assert_refused(sentence, own_tree, tmp_path / "x", "nct")


def test_denoised_tree_that_is_older_than_its_source(own_tree, tmp_path):
    manifest = denoised_root(own_tree, NoiseSpec.parse("gauss50")) / "manifest.json"
    before = manifest.stat().st_mtime
    os.utime(own_tree / "train" / "b", (before + 60, before + 60))
    sentence = r"gauss50-denoised is older than its source: .*train/b changed since it was made; .*data\.denoised_root"
    assert_refused(sentence, own_tree, tmp_path / "x", "nc")


def test_denoised_tree_of_another_noise(own_tree, tmp_path):
    other = write_denoised(own_tree, "gauss100")
    sentence = r"was made with noise gauss100, but gauss50 is configured"
    assert_refused(sentence, own_tree, tmp_path / "x", "nc", f"data.denoised_root={other}")


@pytest.mark.parametrize(
    "method, more, sentence",
    [
        ("nct", ["noise=shot3"], r"anchor\.weights has no λ for shot3: give anchor\.weights\.shot3=NUMBER"),
        ("nc", ["curriculum.restart_epoch=5"], r"stages\[0\]\.stop=5 lies beyond its schedule of 4 epochs"),
        ("nct", ["anchor.epoch=5"], r"anchor\.epoch=5 lies beyond the 4 epochs of the schedule in .*denoised"),
        ("nct", ["anchor.run=nowhere"], r"nowhere is no run: it has no config\.yaml"),
        (
            "nc",
            ["curriculum.noisy_set={optim.min_lrr: 0}"],
            r"unknown key optim\.min_lrr in curriculum\.stages\[1\]\.set",
        ),
    ],
)
def test_settings_that_no_stage_can_run_with(tree, tmp_path, method, more, sentence):
    assert_refused(sentence, tree, tmp_path / "x", method, *more)


def test_anchor_that_does_not_fit(n2n_run, tree, tmp_path):
    other = tmp_path / "other"
    cfg = load_config(settings(tree, other, "model.depth=2"))
    save_run_config(cfg, other)
    teacher = {f"backbone.{name}": value for name, value in build_backbone(cfg).state_dict().items()}
    checkpoint.save(other, {"iteration": torch.tensor(6)}, 6, 2, teacher, keep_last=1)
    sentence = r"other was trained with another model section than this run: model\.depth=2 there, 1 here"
    assert_refused(sentence, tree, tmp_path / "x", "nct", f"anchor.run={other}")
    sentence = r"has no kept checkpoint at epoch 3 \(kept: 2, 4\)"
    assert_refused(sentence, tree, tmp_path / "x", "nct", f"anchor.run={n2n_run}", "anchor.epoch=3")


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["model.registers=1"], r"holds a run with model\.registers=0, this one has 1: choose another folder for it$"),
        (["seed=1"], r"holds a run with seed=0, this one has 1"),
        (["noise=gauss100", "anchor.weights.gauss100=1.0"], r"holds a run with noise=gauss50, this one has gauss100"),
    ],
)
def test_denoised_run_of_another_kind(n2n_run, own_tree, tmp_path, more, sentence):
    write_denoised(own_tree, "gauss100")
    for method in ("nc", "nct"):
        assert_refused(sentence, own_tree, tmp_path / "x", method, f"curriculum.denoised_dir={n2n_run}", *more)


def test_folder_that_holds_a_run_of_another_method(nc_run, tree):
    before = contents(nc_run)
    for method, sentence in (
        ("nct", r"nc holds a run with anchor=False, this one has True: it is finished, .*; choose another output_dir"),
        ("dinov2", r"nc holds a run with init=restart, this one has scratch"),
        ("n2n", r"nc holds a run with view=noisy, this one has denoised"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train(tree, nc_run, method)
    assert contents(nc_run) == before


def test_denoised_run_that_did_not_keep_the_epoch(tree, n2n_run, tmp_path):
    run = tmp_path / "n2n"
    shutil.copytree(n2n_run, run)
    shutil.rmtree(checkpoint.at_epoch(run, 2).path)
    sentence = (
        r"n2n is past epoch 2, which this run needs, and did not keep it \(kept: 4\): set curriculum\.restart_epoch"
    )
    assert_refused(sentence, tree, tmp_path / "x", "nc", f"curriculum.denoised_dir={run}")
    shutil.rmtree(checkpoint.at_epoch(run, 4).path)  # only the one for resuming, after epoch 3, is left
    sentence = r"n2n is past epoch 2, which this run needs, and did not keep it \(kept: none\)"
    assert_refused(sentence, tree, tmp_path / "x", "nc", f"curriculum.denoised_dir={run}")
