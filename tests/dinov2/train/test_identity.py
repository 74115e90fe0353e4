"""Is this the same run? Every key of default.yaml, the images, and what a run starts from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dinov2 import checkpoint
from dinov2.config import load_config, load_defaults, load_run_config
from dinov2.train import curriculum, identity
from dinov2.train.__main__ import main
from tests.dinov2.train.test_curriculum import SHORT, write_denoised
from tests.dinov2.train.tiny import make_tree, settings
from utils.nested import flatten

WEIGHTS = "anchor.weights.gauss100=1.0"


def arguments(folder: Path, *more: str, method: str = "nct") -> list[str]:
    """A command. Its settings are written as one overlay: merging them one by one takes most of the time."""
    roots = {"denoised_root": folder / "noisy_tiny-gauss50-denoised", "denoised_dir": folder / "n2n"}
    own = [f"data.denoised_root={roots['denoised_root']}", f"curriculum.denoised_dir={roots['denoised_dir']}"]
    own.append("data.values=full")  # as main() finds it for 8 bits
    words = settings(folder / "tiny", folder / "run", *SHORT, WEIGHTS, "anchor.epoch=2", *own)
    if not (folder / "base.yaml").exists():
        OmegaConf.save(OmegaConf.from_dotlist(words), folder / "base.yaml")
    return [method, str(folder / "base.yaml"), *more]


def forge(folder: Path, *more: str, method: str = "nct") -> None:
    """Finished runs of all stages, without their training."""
    for stage in curriculum.plan(load_config(arguments(folder, *more, method=method))):
        mark = identity.record(stage, curriculum.make_dataset(stage))
        for epoch in {1, *stage.keep}:
            weights = {"backbone.x": torch.full((3,), float(epoch))}
            checkpoint.save(stage.run, {"x": torch.zeros(1)}, 3 * epoch, epoch, weights, 2, mark)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Images, their denoised twins, and a finished nct run with the denoised run that it starts from."""
    folder = tmp_path_factory.mktemp("world")
    write_denoised(make_tree(folder / "tiny", images=2))
    forge(folder)
    for name in ("tiny", "noisy_tiny-gauss50-denoised", "n2n"):
        shutil.copytree(folder / name, folder / "moved" / name)
    return folder


def copied(world: Path, tmp_path: Path) -> Path:
    """The world at another place, its commands too."""
    return shutil.copytree(world, tmp_path / "copy", ignore=shutil.ignore_patterns("base.yaml", "moved"))


# Values of keys whose type does not suggest one; {folder} is the world's.
VALUES = {
    "objective": "dino", "method": "nc", "noise": "gauss100", "data.root": "{folder}/moved/tiny", "data.name": "other",
    "data.storage": "disk", "data.noisy_root": "elsewhere", "data.in_chans": "1 data.mean=[0.5] data.std=[0.5]",
    "data.denoised_root": "{folder}/moved/noisy_tiny-gauss50-denoised", "data.mean": "[0.5,0.5,0.5]",
    "data.std": "[0.5,0.5,0.5]", "data.max_side": "20", "data.values": "range=[0,2]",
    "data.val": "0.5", "data.stack": "pages", "data.mixed": "keep", "train.compile": "true",
    "data.index_cache": "{folder}/cache",
    "crops.global_size": "32", "crops.local_size": "12", "crops.global_scale": "[0.4,1.0]",
    "crops.local_scale": "[0.1,0.3]", "crops.blur.sigma": "[0.1,1.0]", "model.arch": "vit_small", "model.depth": "2",
    "model.patch_size": "8", "model.ffn": "swiglu", "model.pos_embed": "rope", "model.pos_embed_size": "8",
    "model.drop_path": "0.1", "ibot.mask_ratio": "[0.1,0.4]", "teacher.centering": "sinkhorn_knopp",
    "teacher.final_momentum": "0.999", "train.batch_size": "8", "train.accumulate": "2", "train.precision": "bf16",
    "optim.warmup_epochs": "0", "curriculum.denoised_dir": "{folder}/moved/n2n", "curriculum.restart_epoch": "1",
    "curriculum.noisy_epochs": "3", "curriculum.noisy_set": "{{optim.min_lr: 0.1}}", "anchor.head": "frozen",
    "curriculum.stages": "[{{view: noisy, epochs: 4, dir: {folder}/run}}]", "anchor.weights": "{{gauss50: 9.0}}",
    "anchor.weight_end": "0.5", "anchor.run": "{folder}/moved/n2n", "anchor.epoch": "1", "eval.view": "noisy",
    "eval.linear.learning_rates": "[0.5]", "eval.linear.protocol": "cached", "eval.map.method": "umap",
    "train.on_collapse": "stop",
    "eval.retrieval.denoised_root": "x", "eval.retrieval.distractors": "x", "resume.allow": "[seed]",
}  # fmt: skip
# The name that a key has in the refusal, where it is another: what it sets.
NAMED = {"curriculum.noisy_epochs": "train.epochs", "curriculum.noisy_set": "optim.min_lr", "curriculum.stages": "init",
         "anchor.weights": "anchor.weights.gauss50", "train.epochs": "train.epochs"}  # fmt: skip
# Within sections that do not decide as a whole: these do.
DECIDING = ("curriculum.restart_epoch", "curriculum.noisy_epochs", "curriculum.noisy_set", "curriculum.stages",
            "anchor.head", "anchor.weights", "anchor.weight_end", "anchor.epoch")  # fmt: skip


APART = ("output_dir", "model.pretrained", "anchor.pretrained")  # the last two need a file: see below


def keys() -> list[str]:
    defaults = OmegaConf.to_container(load_defaults())
    flat = flatten(defaults)
    return [*(key for key in flat if key not in APART), "curriculum.noisy_set", "anchor.weights"]


def other_value(key: str, now: object) -> str:
    if key in VALUES:
        return VALUES[key]
    if isinstance(now, bool):
        return str(not now).lower()
    if isinstance(now, int | float):
        return str(now + 1) if isinstance(now, int) else str(now * 0.9 if now else 0.3)
    if OmegaConf.is_list(now):
        return str([*now, *now[:1]] or [1]).replace("'", "")
    return f"{now}x"


@pytest.fixture(scope="module")
def configured(world):
    return load_config(arguments(world))


@pytest.mark.parametrize("key", keys())
def test_every_key_is_refused_by_name_or_listed_as_not_deciding(world, configured, key):
    """On finished runs: an option that is ignored would print an old table as the new one's."""
    given = other_value(key, OmegaConf.select(configured, key)).replace("{folder}", str(world))
    given = given.replace("{{", "{").replace("}}", "}")
    value, *others = given.split(" data.") if key == "data.in_chans" else [given]
    cfg = load_config(arguments(world, f"{key}={value}", *(f"data.{other}" for other in others)))
    assert OmegaConf.select(cfg, key) != OmegaConf.select(configured, key)
    if identity.is_within(key, identity.NOT_DECIDING) and key not in DECIDING:
        curriculum.check_inputs(curriculum.plan(cfg))
    else:
        with pytest.raises(ValueError) as raised:
            curriculum.check_inputs(curriculum.plan(cfg))
        sentence = str(raised.value)
        assert NAMED.get(key, key) in sentence and ("holds a run with" in sentence or "did not keep it" in sentence)


@pytest.mark.parametrize(("key", "value"), [("model.pretrained", "weights.pth"), ("anchor.pretrained", True)])
def test_public_weights_decide_too(configured, key, value):
    other = OmegaConf.merge(configured, OmegaConf.from_dotlist([f"{key}={value}"]))
    assert identity.deciding_settings(other)[key] != identity.deciding_settings(configured)[key]


def test_both_values_and_the_way_out_are_said(world):
    with pytest.raises(ValueError, match=r"n2n holds a run with optim\.base_lr=0\.004, this one has 0\.5: .*or use"):
        main(arguments(world, "optim.base_lr=0.5"))
    with pytest.raises(ValueError, match=r"run holds a run with optim\.base_lr=0\.004, .* it is finished, and nothing"):
        main(arguments(world, "optim.base_lr=0.5", "resume.allow=[optim.base_lr]"))
    with pytest.raises(ValueError, match=r"resume\.allow=\['optim\.base_lrr'\]: optim\.base_lrr is no key"):
        main(arguments(world, "resume.allow=[optim.base_lrr]"))


def test_settings_of_the_evaluation_are_taken_over(world, tmp_path, capsys):
    copy = copied(world, tmp_path)
    main(arguments(copy, "eval.crop=32", "data.workers=3"))
    assert "skipped; its config.yaml takes over data.root=" in capsys.readouterr().out  # the copy lies elsewhere
    held = load_run_config(copy / "run")
    assert (held.eval.crop, held.data.workers, held.data.root) == (32, 3, str(copy / "tiny"))


@pytest.mark.parametrize("change", ["added", "removed", "replaced", "denoised", "renamed"])
def test_other_images_are_noticed(world, tmp_path, change):
    copy = copied(world, tmp_path)
    first = copy / "tiny/train/a/0.png"
    if change == "added":
        shutil.copy(first, first.with_name("9.png"))
        shutil.copy(first, copy / "noisy_tiny-gauss50-denoised/train/a/9.png")
    elif change == "removed":
        first.unlink()
    elif change == "replaced":
        first.write_bytes(first.read_bytes() + b"\0")
    elif change == "renamed":
        first.rename(first.with_name("00.png"))
        (copy / "noisy_tiny-gauss50-denoised/train/a/0.png").rename(copy / "noisy_tiny-gauss50-denoised/train/a/00.png")
    else:
        path = copy / "noisy_tiny-gauss50-denoised/train/a/0.png"
        path.write_bytes(path.read_bytes() + b"\0")
    key = "data.denoised_root" if change == "denoised" else "data.root"
    with pytest.raises(ValueError, match=rf"holds a run with {key}=4 images [0-9a-f]+, this one has [345] images "):
        main(arguments(copy))
    shutil.rmtree(copy / "tiny")
    if change == "added":  # the same place, but nothing is there: said, and not compared
        with pytest.raises(ValueError, match="tiny"):
            main(arguments(copy))


def test_other_weights_to_start_from_are_noticed(world, tmp_path):
    copy = copied(world, tmp_path)
    shutil.rmtree(copy / "n2n/checkpoints")
    stage = curriculum.plan(load_config(arguments(copy)))[0]
    for epoch in (1, 2):
        checkpoint.save(stage.run, {"x": torch.zeros(1)}, 3 * epoch, epoch, {"backbone.x": torch.ones(3)}, 2)
    with pytest.raises(ValueError, match=r"run holds a run with curriculum\.denoised_dir=weights \w+, this one has"):
        main(arguments(copy))


def test_the_hash_stands_in_checkpoints_and_tells_runs_apart(world, tmp_path):
    last = checkpoint.latest(world / "run")
    assert len(last.identity) == 12
    record = json.loads((world / "run" / identity.RECORD).read_text())
    assert record["history"] == [] and set(record["facts"]) == {
        "curriculum.restart_epoch", "curriculum.denoised_dir", "anchor.epoch", "anchor.run", "data.root",
        "data.denoised_root",
    }  # fmt: skip
    copy = copied(world, tmp_path)
    shutil.rmtree(copy / "run")
    forge(copy)
    assert checkpoint.latest(copy / "run").identity == last.identity, "wherever it lies"
    shutil.rmtree(copy / "run")
    forge(copy, "anchor.weights={gauss50: 9.0}")
    assert checkpoint.latest(copy / "run").identity != last.identity


def test_a_run_of_before_there_were_records_is_held_to_its_config(world, tmp_path):
    copy = copied(world, tmp_path)
    for run in ("run", "n2n"):
        (copy / run / identity.RECORD).unlink()
    main(arguments(copy))
    with pytest.raises(ValueError, match=r"holds a run with optim\.base_lr=0\.004, this one has 0\.5"):
        main(arguments(copy, "optim.base_lr=0.5"))
    (copy / "run" / identity.RECORD).write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        main(arguments(copy))
