"""The overlays hold the published numbers, and every scale goes with every method."""

import re
from pathlib import Path

import pytest

from dinov2.config import load_config
from dinov2.train.curriculum import plan

CONFIGS = Path(__file__).resolve().parents[1] / "dinov2" / "configs"
SCALES = ("quickstart", "imagenette", "mstar", "imagenet100", "imagenet1k")
METHODS = ("dinov2", "n2n", "nc", "nct", "clean")


def config(*arguments):
    return load_config([*arguments, "data.root=data", "output_dir=out"])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", METHODS)
def test_every_scale_with_every_method(scale, method):
    cfg = config(scale, method)
    last = cfg.curriculum.stages[-1]
    assert cfg.method == method
    assert last.view == {"n2n": "denoised", "clean": "clean"}.get(method, "noisy")
    assert last.dir == "out"
    assert [stage.view for stage in cfg.curriculum.stages[:-1]] == (["denoised"] if method in ("nc", "nct") else [])
    # Equal epochs: the curriculum spends those of the baseline, split at the restart.
    assert cfg.curriculum.restart_epoch + cfg.curriculum.noisy_epochs == cfg.train.epochs
    assert bool(last.get("anchor")) == (method == "nct")
    # The denoised run, whoever trains it, keeps the checkpoints from which the others start.
    assert cfg.curriculum.restart_epoch % cfg.train.eval_every == cfg.anchor.epoch % cfg.train.eval_every == 0


def test_imagenet100_has_the_published_numbers():
    cfg = config("imagenet100", "nct", "noise=gauss100")
    assert (cfg.model.arch, cfg.model.patch_size, cfg.model.drop_path, cfg.train.batch_size) == ("vit_small", 16, 0, 40)
    assert (cfg.train.epochs, cfg.train.epoch_length, cfg.train.eval_every) == (200, 1250, 5)
    first, second = cfg.curriculum.stages
    assert first.epochs == 200 and plan(cfg)[0].stop_epoch == 140
    assert (second.epochs, second.init, second.from_epoch) == (60, "restart", 140)
    assert cfg.anchor.epoch == 140
    published = {"gauss100": 4.0, "gauss255": 1.1, "shot1": 5.0, "speckle1.0": 2.0}
    assert dict(cfg.anchor.weights) == published | {"none": 2.0}  # the last is ours
    assert (cfg.eval.batch_size, cfg.eval.linear.epochs, cfg.eval.linear.epoch_length) == (128, 10, 1250)
    assert dict(second.set) == {}


def test_imagenet1k_has_the_published_numbers():
    cfg = config("imagenet1k", "nct", "noise=gauss255")
    assert (cfg.model.arch, cfg.model.patch_size, cfg.model.drop_path) == ("vit_base", 16, 0.1)
    train = cfg.train
    assert (train.batch_size, train.epochs, train.epoch_length, train.eval_every) == (512, 100, 2500, 10)
    first, second = cfg.curriculum.stages
    assert first.epochs == 100 and plan(cfg)[0].stop_epoch == 100  # the frozen teacher is its end
    assert (second.epochs, second.init, second.from_epoch) == (70, "restart", 30)
    assert cfg.anchor.epoch == 100
    assert dict(second.set) == {"teacher.warmup_temp_epochs": 15, "optim.warmup_epochs": 5}
    assert dict(cfg.anchor.weights) == {"gauss100": 2.0, "gauss255": 1.6} | {"none": 2.0}  # the last is ours
    assert (cfg.eval.batch_size, cfg.eval.linear.epochs, cfg.eval.linear.epoch_length) == (1024, 20, 1250)
    assert plan(config("imagenet1k", "nc"))[0].stop_epoch == 30


@pytest.mark.parametrize("scale", ("imagenet100", "imagenet1k"))
def test_optimisation_is_the_published_one(scale):
    cfg = config(scale, "dinov2")
    optim, teacher = cfg.optim, cfg.teacher
    assert (optim.base_lr, optim.min_lr, optim.warmup_epochs, optim.clip_grad) == (0.004, 1e-6, 10, 3.0)
    assert (optim.weight_decay, optim.weight_decay_end, optim.beta1, optim.beta2) == (0.04, 0.4, 0.9, 0.999)
    assert (optim.layerwise_decay, optim.patch_embed_lr_mult, optim.freeze_last_layer_epochs) == (0.9, 0.2, 1)
    assert (teacher.momentum, teacher.final_momentum, teacher.warmup_temp, teacher.temp) == (0.992, 1.0, 0.04, 0.07)
    assert (teacher.warmup_temp_epochs, teacher.centering) == (30, "centering")
    assert (cfg.dino.prototypes, cfg.dino.bottleneck, cfg.dino.hidden, cfg.dino.koleo_weight) == (65536, 256, 2048, 0.1)
    crops = cfg.crops
    assert (crops.global_size, crops.local_size, crops.local_number) == (224, 96, 8)
    assert (list(crops.global_scale), list(crops.local_scale)) == ([0.32, 1.0], [0.05, 0.32])
    assert (crops.blur.global1, crops.blur.global2, crops.blur.local) == (0.0, 0.9, 0.5)


def test_missing_lambda_is_an_error_with_the_way_out():
    with pytest.raises(ValueError, match="shot3.*anchor.weights.shot3=NUMBER"):
        config("imagenet100", "nct", "noise=shot3")
    assert config("imagenet100", "nct", "noise=shot3", "anchor.weights.shot3=3").anchor.weights.shot3 == 3
    cfg = config("imagenet100", "nct", "noise=speckle0.4", "anchor.weights.speckle0.4=3")
    assert cfg.anchor.weights["speckle0.4"] == 3


def test_the_clean_oracle_carries_no_noise():
    assert config("imagenet100", "clean").noise == "none"


@pytest.mark.parametrize("name", SCALES)
def test_header_tells_command_time_and_published_figure(name):
    header = "".join(re.findall(r"^#.*\n", (CONFIGS / f"{name}.yaml").read_text().split("\n\n")[0] + "\n", re.M))
    assert re.search(r"python -m dinov2|bash exps/", header)
    assert "Time:" in header
    assert "reported" in header or "Published figure: none" in header


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_commands_in_headers_are_valid(path):
    """Each `python -m dinov2.train` command of a header loads as it stands."""
    text = path.read_text().replace("\\\n#", " ").replace("# ", "", 1)
    for command in re.findall(r"dinov2\.train (.+)|-- train (.+)", text):
        arguments = " ".join(command).split()
        assert load_config(arguments).output_dir
