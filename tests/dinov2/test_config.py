"""Overlays, key=value, types, impossible combinations: each refused in a sentence that names the key."""

import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from dinov2.config import (
    config_hash,
    load_config,
    load_defaults,
    load_run_config,
    overlay_names,
    parse_value,
    save_run_config,
)
from dinov2.train.curriculum import plan
from tests.conftest import ROOT

BASE = ["data.root=images", "output_dir=runs/x"]
METHODS = ("clean", "dinov2", "n2n", "nc", "nct")
SCALES = tuple(name for name in overlay_names() if name not in METHODS)
STAGE = "curriculum.stages=[{{view: noisy, epochs: 20, dir: runs/x{more}}}]"
DENOISED = "curriculum.stages=[{{view: denoised, epochs: 20, dir: runs/d{first}}}"
TWO = DENOISED + ", {{view: noisy, epochs: 20, dir: runs/x{more}}}]"


def refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        load_config([*BASE, *arguments])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("model.arhc=vit_base", r"unknown key model\.arhc; did you mean model\.arch\?"),
        ("trian.epochs=3", r"unknown key trian; did you mean train\?"),
        ("optim.lr=1", r"unknown key optim\.lr; did you mean optim\.base_lr\?"),
        ("bse_lr=1", r"unknown key bse_lr; did you mean optim\.base_lr\?"),
        ("eval.linear.cached_share=1", r"unknown key eval.*cached_share; did you mean eval\.linear\.cached_fraction\?"),
        ("xyzzy=1", r"unknown key xyzzy$"),
        ("imagenet10", r"no overlay 'imagenet10': did you mean imagenet100\? overlays are clean, dinov2"),
        ("runs/none.yaml", r"overlay runs/none\.yaml is no file"),
        ("optim.base_lr=[0.1", r"'optim\.base_lr=\[0\.1' is not key=value"),
        ("curriculum.stages.0.stop=3", r"curriculum\.stages=.* must be a list"),
    ],
)
def test_unknown_names_say_the_nearest_one(argument, sentence):
    refused([argument], sentence)


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("train.epochs=1.5", r"train\.epochs=1\.5 must be a whole number"),
        ("train.epochs=ten", r"train\.epochs=ten must be a whole number"),
        ("train.epochs=", r"train\.epochs=null must be a whole number"),
        ("train.epochs=true", r"train\.epochs=True must be a whole number"),
        ("optim.base_lr=fast", r"optim\.base_lr=fast must be a number"),
        ("train.compile=1", r"train\.compile=1 must be true or false"),
        ("noise=", r"noise=null must be a text"),
        ("noise=[gauss255]", r"noise '\[gauss255\]' is not known"),
        ("data.mean=0.5", r"data\.mean=0\.5 must be a list, each entry a number"),
        ("data.mean=[a,b,c]", r"data\.mean=\['a', 'b', 'c'\] must be a list, each entry a number"),
        ("model.depth=deep", r"model\.depth=deep must be a whole number"),
        ("anchor.weight_end=none", r"anchor\.weight_end=none must be a number"),
        ("curriculum.restart_epoch=2.5", r"curriculum\.restart_epoch=2\.5 must be a whole number"),
        ("model=vit_small", r"model is a section: give model\.KEY=VALUE"),
        ("anchor.weights=[1]", r"anchor\.weights is a section"),
        ("anchor.weights.gauss50=much", r"anchor\.weights\.gauss50=much must be a number"),
        ("curriculum.stages=noisy", r"curriculum\.stages=noisy must be a list, each entry \{key: value\}"),
        (STAGE.format(more=", stop: ten"), r"curriculum\.stages\[0\]\.stop=ten must be a whole number"),
        (STAGE.format(more=", anchor: maybe"), r"curriculum\.stages\[0\]\.anchor=maybe must be true or false"),
        (STAGE.format(more=", set: {optim.lr: 1}"), r"unknown key optim\.lr in curriculum\.stages\[0\]\.set"),
        (STAGE.format(more=", set: {train.compile: 1}"), r"train\.compile=1 in curriculum\.stages\[0\]\.set must be"),
    ],
)
def test_values_of_another_type(argument, sentence):
    refused([argument], sentence)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["method=simclr"], r"method=simclr must be one of dinov2, n2n, nc, nct, clean"),
        (["noise=gaussian"], r"noise 'gaussian' is not known"),
        (["data.storage=ram"], r"data\.storage=ram must be one of on_the_fly, disk"),
        (["model.arch=vit_huge"], r"model\.arch=vit_huge must be one of vit_tiny, vit_small"),
        (["model.ffn=glu"], r"model\.ffn=glu must be one of mlp, swiglu"),
        (["teacher.centering=mean"], r"teacher\.centering=mean must be one of centering, sinkhorn_knopp"),
        (["train.precision=fp8"], r"train\.precision=fp8 must be one of fp32, bf16, fp16"),
        (["anchor.head=student"], r"anchor\.head=student must be one of ema, frozen"),
        (["data.in_chans=1"], r"data\.mean has 3 values for data\.in_chans=1"),
        (["data.in_chans=1", "data.mean=[0.5]"], r"data\.std has 3 values for data\.in_chans=1"),
        (["data.in_chans=0"], r"data\.in_chans=0 must be at least 1"),
        (["crops.global_size=100"], r"crops\.global_size=100 is no multiple of model\.patch_size=16"),
        (["crops.local_size=100"], r"crops\.local_size=100 is no multiple of model\.patch_size=16"),
        (["crops.local_number=-1"], r"crops\.local_number=-1 must be at least 0"),
        (["crops.global_scale=[0.5]"], r"crops\.global_scale=\[0\.5\] must be two numbers that rise within 0 and 1"),
        (["model.patch_size=0"], r"model\.patch_size=0 must be at least 1"),
        (["model.pos_embed_size=100"], r"model\.pos_embed_size=100 is no multiple of model\.patch_size=16"),
        (["model.depth=0"], r"model\.depth=0 must be at least 1"),
        (["model.registers=5"], r"model\.registers=5 must lie in \[0, 4\]"),
        (["model.drop_path=1.0"], r"model\.drop_path=1\.0 must lie in \[0, 1\)"),
        (["train.epochs=0"], r"train\.epochs=0 must be at least 1"),
        (["train.batch_size=10", "train.accumulate=4"], r"train\.batch_size=10 is no multiple of train\.accumulate=4"),
        (["teacher.momentum=1.2"], r"teacher\.momentum=1\.2 must lie in \[0, 1\]"),
        (["ibot.mask_ratio=[0.5,0.1]"], r"ibot\.mask_ratio=\[0\.5, 0\.1\] must be two numbers that rise"),
        (["ibot.mask_ratio=[0.5]"], r"ibot\.mask_ratio=\[0\.5\] must be two numbers"),
        (["optim.warmup_epochs=101"], r"optim\.warmup_epochs=101 is longer than curriculum\.stages\[0\]\.epochs=100"),
        (["curriculum.stages=[]"], r"curriculum\.stages is empty"),
        (["nc"], r"curriculum\.stages\[1\]\.epochs is not set \(a scale's overlay sets the curriculum's epochs\)"),
        ([STAGE.format(more=", speed: 1")], r"key of curriculum\.stages\[0\]=speed must be one of view"),
        ([STAGE.format(more=", init: warm")], r"curriculum\.stages\[0\]\.init=warm must be one of scratch, restart"),
        ([STAGE.format(more=", init: restart")], r"curriculum\.stages\[0\]\.init=restart needs a stage before it"),
        ([STAGE.format(more=", stop: 21")], r"curriculum\.stages\[0\]\.stop=21 lies beyond its schedule of 20 epochs"),
        ([STAGE.format(more=", stop: 0")], r"curriculum\.stages\[0\]\.stop=0 lies beyond"),
        ([STAGE.format(more=", mix: [1, 0]")], r"curriculum\.stages\[0\]\.mix: \[start, end\] belongs to view mix"),
        (
            [STAGE.format(more=", anchor: true"), "anchor.weights.gauss255=1"],
            r"curriculum\.stages\[0\]\.anchor needs a denoised stage before it or anchor\.run",
        ),
        (
            ["curriculum.stages=[{view: mix, epochs: 20, dir: runs/x}]"],
            r"curriculum\.stages\[0\]\.mix: \[start, end\] belongs to view mix, and to it alone",
        ),
        (
            ["curriculum.stages=[{view: mix, mix: [1, 2], epochs: 20, dir: runs/x}]"],
            r"curriculum\.stages\[0\]\.mix=\[1, 2\] must lie in \[0, 1\]",
        ),
        (["curriculum.stages=[{view: dim, epochs: 20, dir: runs/x}]"], r"curriculum\.stages\[0\]\.view=dim must be"),
        (["curriculum.stages=[{view: noisy, epochs: 20, dir: y}]"], r"the last stage must train in output_dir=runs/x"),
        (
            [TWO.format(first=", stop: 10", more=", init: restart, from_epoch: 11")],
            r"curriculum\.stages\[1\]\.from_epoch=11 must lie within the stage before it, which ends at epoch 10",
        ),
        (
            [TWO.format(first="", more=", from_epoch: 5")],
            r"curriculum\.stages\[1\]\.from_epoch=5 must lie within",  # of a stage from scratch
        ),
        (
            [TWO.format(first="", more=", init: restart").replace("runs/d", "runs/x")],
            r"two curriculum\.stages have dir=runs/x: give each a folder of its own",
        ),
        (
            [TWO.format(first="", more=", init: restart, anchor: true")],
            r"anchor\.weights has no λ for gauss255: give anchor\.weights\.gauss255=NUMBER",
        ),
        (
            [TWO.format(first="", more=", anchor: true").replace("noisy", "denoised"), "anchor.weights.gauss255=1"],
            r"curriculum\.stages\[1\]\.anchor needs view noisy",
        ),
        (
            [TWO.format(first="", more=", anchor: true"), "anchor.weights.gauss255=1", "anchor.epoch=21"],
            r"anchor\.epoch=21 lies beyond the 20 epochs of the schedule in runs/d",
        ),
        (
            [STAGE.format(more=", anchor: true"), "anchor.weights.gauss255=1", "anchor.run=runs/a"],
            r"anchor\.epoch is not set: give the epoch of anchor\.run=runs/a",
        ),
    ],
)
def test_impossible_combinations(arguments, sentence):
    refused(arguments, sentence)


@pytest.mark.parametrize("missing", ["output_dir", "data.root"])
def test_what_has_no_default_must_be_given(missing):
    with pytest.raises(ValueError, match=f"{missing} is not set: give {missing}=FOLDER"):
        load_config([argument for argument in BASE if not argument.startswith(missing)])


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("train: {epochs: [", "is no YAML: .*expected node content"),
        ("- 1\n- 2\n", "must hold keys and values"),
        ("train: {epoch: 3}", r"unknown key train\.epoch in overlay .*own\.yaml; did you mean train\.epochs\?"),
        ("train: {epochs: x}", r"train\.epochs=x in overlay .*own\.yaml must be a whole number"),
    ],
)
def test_broken_overlay_names_the_file(tmp_path, content, sentence):
    (tmp_path / "own.yaml").write_text(content)
    refused([str(tmp_path / "own.yaml")], sentence)


def test_overlays_by_name_and_path_and_the_later_one_wins(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("train: {epochs: 33, batch_size: 8}\n")
    cfg = load_config([*BASE, "imagenet100", str(own), "train.batch_size=16"])
    assert (cfg.train.epochs, cfg.train.batch_size, cfg.train.epoch_length) == (33, 16, 1250)
    assert cfg.curriculum.stages[0].epochs == 33 and cfg.curriculum.stages[0].dir == "runs/x"
    assert load_config([*BASE, str(own), "imagenet100"]).train.epochs == 200


def test_noise_names_with_a_dot_are_keys():
    cfg = load_config([*BASE, "imagenet100", "nct", "noise=speckle0.7", "anchor.weights.speckle0.7=1.5"])
    assert cfg.anchor.weights["speckle0.7"] == 1.5


def test_a_saved_config_of_before_a_key_was_renamed_keeps_its_value(tmp_path):
    cfg = load_config(["quickstart", "dinov2", "data.root=x", f"output_dir={tmp_path}"])
    save_run_config(cfg, tmp_path)
    saved = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(saved.replace("cached_fraction: 0.1", "cached_share: 0.3"))
    linear = load_run_config(tmp_path).eval.linear
    assert linear.cached_fraction == 0.3 and "cached_share" not in linear


def test_saved_config_is_the_loaded_one(tmp_path):
    cfg = load_config([*BASE, "imagenette", "nct", "noise=shot3", "seed=3", f"output_dir={tmp_path}"])
    save_run_config(cfg, tmp_path)
    loaded = load_run_config(tmp_path)
    assert loaded == cfg and config_hash(loaded) == config_hash(cfg)
    assert "${" not in (tmp_path / "config.yaml").read_text()
    # It is an overlay itself: the same run by one argument.
    assert load_config([str(tmp_path / "config.yaml")]) == cfg
    (tmp_path / "config.yaml").write_text("train: {epochs: [")
    with pytest.raises(ValueError, match=r"config\.yaml is no YAML"):
        load_run_config(tmp_path)
    with pytest.raises(ValueError, match="is no run: it has no config.yaml"):
        load_run_config(tmp_path / "none")


def test_keys_of_later_versions_have_their_defaults(tmp_path):
    cfg = load_config(BASE)
    old = OmegaConf.to_container(cfg)
    del old["train"]["knn_every"], old["anchor"]
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(old)))
    assert load_run_config(tmp_path) == cfg


def test_hash_is_of_what_decides_the_result():
    def hash_of(*arguments):
        return config_hash(load_config([*BASE, *arguments]))

    assert re.fullmatch("[0-9a-f]{12}", hash_of())
    assert hash_of() == hash_of("data.workers=0", "data.resident=true", "trial=true")
    assert len({hash_of(), hash_of("seed=1"), hash_of("noise=gauss100"), hash_of("optim.base_lr=0.001")}) == 4


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", METHODS)
def test_every_scale_with_every_method(scale, method):
    cfg = load_config([*BASE, scale, method, *([] if method == "clean" else ["noise=gauss255"])])
    assert cfg.method == method and cfg.noise == ("none" if method == "clean" else "gauss255")
    assert cfg.curriculum.stages[-1].dir == cfg.output_dir == "runs/x"
    assert len(cfg.curriculum.stages) == (2 if method in ("nc", "nct") else 1)
    if method in ("nc", "nct"):
        noisy = cfg.curriculum.stages[1]
        assert noisy.epochs + noisy.from_epoch == cfg.train.epochs and noisy.init == "restart"


@pytest.mark.parametrize(
    "scale, noises",
    [
        ("imagenet100", ("gauss50", "shot10", "shot3", "speckle0.4", "speckle0.7")),
        ("imagenet1k", ("gauss50", "shot1", "speckle1.0")),
    ],
)
def test_anchored_noise_without_published_weight_is_refused(scale, noises):
    for noise in noises:
        refused([scale, "nct", f"noise={noise}"], rf"anchor\.weights has no λ for {noise}: give")
        load_config([*BASE, scale, "nct", f"noise={noise}", f"anchor.weights.{noise}=2.0"])
        load_config([*BASE, scale, "nc", f"noise={noise}"])


def test_help_lists_the_overlays():
    command = [sys.executable, "-m", "dinov2.train", "--help"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in overlay_names():
        assert re.search(rf"^  {name} +\S", text, re.MULTILINE), name
    assert "default.yaml" in text


def test_defaults_resolve_by_themselves():
    cfg = OmegaConf.merge(load_defaults(), {"output_dir": "o", "data": {"root": "d"}})
    stage = OmegaConf.to_container(cfg, resolve=True)["curriculum"]["stages"][0]
    assert stage == {"view": "noisy", "epochs": 100, "dir": "o"}
    cfg.train.epochs = 3
    assert load_defaults().train.epochs == 100, "each caller has its own copy"


# --- values to the letter -------------------------------------------------------------------------------------------
ODD = ("007", "1e3", "0x10", "1_000", "a: b", "/x/a #b", " blanks ", "${oc.env:HOME}", "${seed}", "a\\${b}", "\\", "${",
       "true", "~", "[1, 2]", "{a: b}", "- x", "'quoted'", '"q"', "*x", "&x", "!!python/name:x", "ünï", "x=y", "%",
       "2024-01-01", "a\\\\${b}", "on", "1:30", ".inf", "null/", "@", "`ls`", "|", ">")  # fmt: skip


def test_texts_are_taken_to_the_letter():
    for text in ODD:
        content = OmegaConf.create({"seed": 3, "root": parse_value("data.root", text)})
        for kept in (content, OmegaConf.create(OmegaConf.to_yaml(content)), OmegaConf.merge({"root": "x"}, content)):
            assert kept.root == text
    assert parse_value("train.epochs", "7 # days") == 7 and parse_value("eval.knn.k", "[1, 2]") == [1, 2]


def test_texts_are_kept_by_a_run_and_its_stages(tmp_path):
    texts = {
        "data.root": "/x/a #b", "output_dir": "${oc.env:HOME}/o", "curriculum.denoised_dir": " a: ${seed}",
        "data.name": "007", "data.noisy_root": "1e3", "data.denoised_root": "~", "data.index_cache": "a\\${b}",
    }  # fmt: skip
    cfg = load_config(["quickstart", "nc", *[f"{key}={text}" for key, text in texts.items()]])
    save_run_config(cfg, tmp_path)
    for kept in (cfg, load_run_config(tmp_path)):
        assert {key: OmegaConf.select(kept, key) for key in texts} == texts
        denoised, noisy = plan(kept)
        assert (str(denoised.run), str(noisy.run)) == (" a: ${seed}", "${oc.env:HOME}/o")
        assert (denoised.cfg.output_dir, noisy.cfg.output_dir) == (" a: ${seed}", "${oc.env:HOME}/o")
        assert noisy.cfg.data.index_cache == "a\\${b}"


def test_null_is_null_where_a_key_may_be_null():
    cfg = load_config([*BASE, "data.name=x", "data.name=null", "anchor.run=x", "anchor.run=", "model.depth=null"])
    assert (cfg.data.name, cfg.anchor.run, cfg.model.depth) == (None, None, None)
    refused(["noise=null"], "noise=null must be a text")
    refused(["output_dir="], "output_dir=null must be a text")


def test_an_overlay_refers_to_keys_and_quotes_its_numbers(tmp_path):
    overlay = tmp_path / "own.yaml"
    overlay.write_text('data: {name: "007", index_cache: "${output_dir}/${seed}"}')
    cfg = load_config([*BASE, str(overlay), "seed=3"])
    assert (cfg.data.name, cfg.data.index_cache) == ("007", "runs/x/3")
    overlay.write_text("data: {name: 007}")
    refused([str(overlay)], r"data\.name=7 in overlay .* quote it")


@pytest.mark.parametrize("reference", ["${oc.env:SECRET}", r"\\\\${oc.env:SECRET}", "${output_dir}${output_dir}"])
def test_a_saved_config_refers_to_nothing(reference, tmp_path, monkeypatch):
    """Backslashes before it, if even in number, are themselves alone; a few lines of twofold ones fill the memory."""
    monkeypatch.setenv("SECRET", "hidden")
    save_run_config(load_config(BASE), tmp_path)
    saved = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(saved.replace("name: null", f"name: {reference}"))
    with pytest.raises(ValueError, match=r"config.yaml: data\.name refers to something else"):
        load_run_config(tmp_path)
