"""One folder of images, whatever lies in it: the plan, what is refused before anything is trained, the whole path."""

import csv
import json
import os
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import dinov2
from dinov2.data.index import build_index
from dinov2.data.splits import Layout
from dinov2.pretrain import main
from dinov2.run.choices import Hardware, choose, choose_denoiser, choose_scale
from dinov2.run.options import CONFIGS, Options
from dinov2.run.stages import layout
from dinov2.run.subset import link, spread
from dinov2.run.survey import look_at, mean_and_std
from tests.conftest import ROOT
from utils.images import list_images

LAPTOP = Hardware(gpu=False, cores=2)


def make_images(root: Path, number: int = 20, side: int = 32, folders=("",), dtype=np.uint8, channels: int = 1) -> Path:
    """number noisy images in each folder; .png of 8 bits, else .tif, .npy of other channels than 1 and 3."""
    rng = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            top = 4095 if dtype == np.uint16 else 255
            array = rng.integers(0, top, (side, side + i % 3, channels)).astype(dtype)
            if channels in (1, 3):
                array = array[:, :, 0] if channels == 1 else array
                Image.fromarray(array).save(root / folder / f"{i:03d}.{'png' if dtype == np.uint8 else 'tif'}")
            else:
                np.save(root / folder / f"{i:03d}.npy", array)
    return root


def chosen(folder: Path, given=(), weights=None, hardware=LAPTOP) -> dict:
    """Key → value of all that is chosen for a folder."""
    from omegaconf import OmegaConf

    survey = look_at(str(folder), Layout(), None, "auto")
    scale = choose_scale(survey, hardware.gpu, weights)
    base = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{scale.value}.yaml"))
    choices = [
        scale,
        *choose(survey, scale.value, base, hardware, dict(given), base["model"].get("patch_size", 16), weights),
    ]
    assert all(choice.reason for choice in choices)
    return {choice.key: choice.value for choice in choices}


def refused(*argv: object) -> str:
    with pytest.raises(ValueError) as error:
        main([str(word) for word in argv])
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


# --- what is chosen -------------------------------------------------------------------------------------------------
def test_choices_follow_the_size_of_the_images(tmp_path):
    small = chosen(make_images(tmp_path / "small"))
    assert (small["scale"], small["crops.global_size"], small["data.in_chans"]) == ("quickstart", 32, 1)
    assert (small["train.batch_size"], small["train.epoch_length"]) == (8, 10)  # of 20 images
    assert len(small["data.mean"]) == 1 and 0.4 < small["data.mean"][0] < 0.6
    large = chosen(make_images(tmp_path / "large", side=160, channels=3))
    assert (large["scale"], large["crops.global_size"], large["crops.local_size"]) == ("imagenette", 128, 64)
    assert "data.mean" not in large and large["eval.crop"] == 128
    assert chosen(tmp_path / "large", hardware=Hardware(True, 8))["crops.global_size"] == 128  # too small for 224


def test_many_large_images_take_the_published_settings_on_a_gpu_alone(tmp_path, monkeypatch):
    survey = look_at(str(make_images(tmp_path / "d", side=160)), Layout(), None, "auto")
    monkeypatch.setattr("dinov2.run.survey.Survey.count", 30_000)
    assert choose_scale(survey, True, None).value == "imagenet100"
    assert choose_scale(survey, False, None).value == "imagenette"
    assert "no GPU" in choose_scale(survey, False, None).reason


def test_a_yaml_of_the_users_is_filled_up(tmp_path):
    survey = look_at(str(make_images(tmp_path / "d", side=64)), Layout(), None, "auto")
    own = {"crops": {"global_size": 48}, "train": {"epochs": 7}}
    keys = {c.key: c.value for c in choose(survey, "my.yaml", own, LAPTOP, {}, 16, None)}
    assert not {"crops.global_size", "train.epochs"} & keys.keys() and keys["train.batch_size"] == 8
    assert (keys["crops.local_size"], keys["curriculum.restart_epoch"]) == (32, 5)


def test_what_the_user_gives_is_followed(tmp_path):
    folder = make_images(tmp_path / "d", side=100)
    keys = chosen(folder, {"train.epochs": "10", "crops.global_size": "64", "train.batch_size": "2"})
    assert (keys["curriculum.restart_epoch"], keys["curriculum.noisy_epochs"], keys["anchor.epoch"]) == (7, 3, 7)
    assert (keys["crops.local_size"], keys["eval.crop"], keys["train.epoch_length"]) == (32, 64, 10)
    shortest = chosen(folder, {"train.epochs": "2"})
    assert (shortest["curriculum.restart_epoch"], shortest["curriculum.noisy_epochs"]) == (1, 1)


def test_the_denoiser_sees_so_many_crops_as_a_folder_has(tmp_path):
    survey = look_at(str(make_images(tmp_path / "d")), Layout(), None, "auto")
    words, reason = choose_denoiser(survey, None)
    assert words[words.index("--steps") + 1] == "1000" and "rule of thumb" in reason
    assert choose_denoiser(survey, 7)[0][3] == "7"


def test_values_and_channels_are_found(tmp_path):
    deep = look_at(str(make_images(tmp_path / "deep", dtype=np.uint16)), Layout(), None, "auto")
    assert deep.deep and str(deep.rule) == "range=[0,4095]" and deep.channels == 1
    five = look_at(str(make_images(tmp_path / "five", channels=5)), Layout(), None, "auto")
    assert five.channels == 5 and len(mean_and_std(five)[0]) == 5
    make_images(tmp_path / "both/a", number=18, channels=3)
    both = look_at(str(make_images(tmp_path / "both/b", number=3).parent), Layout(), None, "auto")
    assert both.channels == 3 and "3 grey and 18 colour images" in " ".join(both.notes)


def test_folders_of_classes_get_a_val_split_and_flat_ones_do_not(tmp_path):
    survey = look_at(str(make_images(tmp_path / "c", folders=("cat", "dog"))), Layout(), None, "auto")
    assert survey.labelled and len(survey.val.relatives) == 4 and survey.layout.val == 0.1
    survey = look_at(str(make_images(tmp_path / "flat")), Layout(), None, "auto")
    assert not survey.labelled and survey.val is None
    make_images(tmp_path / "s", folders=("train", "val", "test"))
    survey = look_at(str(tmp_path / "s"), Layout(), None, "auto")
    assert survey.count == 40 and "test" in survey.notes[0]


def test_lists_lie_where_the_user_wants_them(tmp_path):
    make_images(tmp_path / "s", folders=("train", "val"))
    look_at(str(tmp_path / "s"), Layout(), None, "auto", cache=str(tmp_path / "lists"))
    assert len(list((tmp_path / "lists").iterdir())) == 2 and not list((tmp_path / "s").glob(".*"))


# --- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number, words", [(0, "holds no images"), (1, "holds one image"), (2, "holds 2 images")])
def test_too_few_images(tmp_path, number, words):
    (tmp_path / "d").mkdir()
    sentence = refused(make_images(tmp_path / "d", number), "--output", tmp_path / "o")
    assert words in sentence and str(tmp_path / "d") in sentence and not (tmp_path / "o").exists()


def test_files_that_cannot_be_read(tmp_path):
    folder = make_images(tmp_path / "d")
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    assert re.search(r"none of the 20 files looked at can be read, the first: .*000\.png", refused(folder))
    make_images(folder)
    (folder / "003.png").write_bytes(b"no image")
    assert re.search(r"1 of the 20 files looked at cannot be read, the first: .*003\.png", refused(folder))


def test_a_broken_file_beside_the_sample_is_named_too(tmp_path, monkeypatch):
    """Its header is whole; the sample, one of three files, does not hold it."""
    folder = make_images(tmp_path / "d", number=200)
    whole = (folder / "038.png").read_bytes()
    (folder / "038.png").write_bytes(whole[: len(whole) // 2])
    assert re.search(r"1 of the 200 files read are of no use, the first: .*038\.png cannot be read", refused(folder))
    monkeypatch.setattr("dinov2.run.survey.READ_S", 0.0)
    assert look_at(str(folder), Layout(), None, "auto").count == 200


def test_mixed_channels_are_counted_and_the_majority_kept_on_request(tmp_path, capsys):
    make_images(tmp_path / "d/five", channels=5)
    folder = make_images(tmp_path / "d/two", number=3, channels=2).parent
    sentence = refused(folder)
    assert re.search(r"20 of 5 \(such as five/\d+.npy\), 3 of 2 \(such as two/\d+.npy\)", sentence)
    assert "--channels majority keeps the most frequent ones" in sentence
    survey = look_at(str(folder), Layout(), "majority", "auto")
    assert (survey.channels, survey.count, survey.layout.only) == (5, 20, 5)
    assert (
        main([str(folder), "--channels", "majority", "--dry-run", "--output", str(tmp_path / "o"), "--val", "0.2"]) == 0
    )
    printed = capsys.readouterr().out
    assert "data.mixed=keep" in printed and printed.count("--mixed keep") == 3 and "--format npy" in printed


def test_a_scale_that_scales_values_is_followed(tmp_path, capsys):
    folder = make_images(tmp_path / "d", side=64)
    assert main([str(folder), "--scale", "mstar", "--dry-run", "--output", str(tmp_path / "o")]) == 0
    printed = capsys.readouterr().out
    assert "data.values = log=[1,255]" in printed and "--values 'log=[1,255]'" in printed
    assert "dinov2.train mstar " in printed


def write_rows(path: Path, rows: list) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["path", "label"], *rows])
    return path


def test_a_scale_that_names_labels_is_followed(tmp_path, capsys):
    folder, own = make_images(tmp_path / "d"), tmp_path / "own.yaml"
    rows = write_rows(tmp_path / "labels.csv", [[path.name, "ab"[i % 2]] for i, path in enumerate(folder.iterdir())])
    own.write_text(f"data: {{labels: {rows}, val: 0.2}}\nmodel: {{patch_size: 8}}\n")
    words = ["--scale", str(own), "--method", "dinov2", "--dry-run", "--output", str(tmp_path / "o")]
    assert main([str(folder), *words]) == 0
    printed = capsys.readouterr().out
    assert "20 images: 16 train, 4 val, 2 classes" in printed and "dinov2.eval.knn" in printed
    assert layout(Options(scale=str(own))) == Layout(0.2, None, str(rows))


def test_the_largest_file_allowed_is_the_same_for_the_survey_and_the_denoiser(tmp_path, capsys):
    folder = make_images(tmp_path / "d")
    assert "more than the limit of 500 px" in refused(folder, "--output", tmp_path / "o", "data.max_pixels=500")
    assert main([str(folder), "--dry-run", "--output", str(tmp_path / "o"), "data.max_pixels=2000"]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if "Neighbor2Neighbor." in line]
    assert commands and all("--max-pixels 2000" in line for line in commands)


def test_tables_of_labels(tmp_path):
    folder = make_images(tmp_path / "d")
    names = sorted(path.name for path in folder.iterdir())
    rows = [[name, "ab"[i % 2]] for i, name in enumerate(names)]
    missing = write_rows(tmp_path / "missing.csv", [*rows, ["gone.png", "a"]])
    assert "names 1 images that" in refused(folder, "--labels", missing) and "gone.png" in refused(
        folder, "--labels", missing
    )
    double = write_rows(tmp_path / "double.csv", [*rows, rows[3]])
    assert "003.png stands there twice" in refused(folder, "--labels", double)
    assert "cannot be read" in refused(folder, "--labels", tmp_path / "none.csv")
    survey = look_at(str(folder), Layout(labels=str(write_rows(tmp_path / "l.csv", rows))), None, "auto")
    assert survey.labelled and len(survey.val.relatives) == 2


def test_a_group_in_both_splits(tmp_path):
    make_images(tmp_path / "d", folders=("train/p1", "train/p2", "val/p2"))
    assert "1 groups have images in train and in val, such as p2" in refused(tmp_path / "d", "--group", "folder")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--nosie", "x"], "unknown option --nosie: did you mean --noise?"),
        (["--noise", "gaus50"], "gaus50"),
        (["--method", "ncct"], "did you mean nct?"),
        (["--eval", "knnn"], "did you mean knn?"),
        (["--scale", "imagenete"], "did you mean imagenette?"),
        (["optim.lr=1"], "did you mean optim.base_lr?"),
        (["train.epochs=many"], "train.epochs"),
        (["--epochs", "0"], "--epochs: takes a whole number of at least 1, not 0"),
        (["--eval", "knn"], "--eval knn needs labels and val images"),
        (["--stack", "page"], "did you mean pages?"),
        (["--from", "no.pth"], "--from no.pth is missing"),
        (["--channels", "some"], "--channels some"),
        (["--values", "wide"], "wide"),
        (["data.in_chans=1"], "give it as --channels"),
        (["crops.global_size=33"], "crops.global_size=33 is no multiple of model.patch_size=8"),
        (["crops.global_size=224"], "crops.global_size=224 would enlarge images of 32 px"),
        (["--scale", "imagenet100"], "crops.global_size=224 would enlarge images of 32 px"),
        (["another folder"], "give one folder of images, not 2"),
        (["--scale", "imagenet100", "--noise", "shot3"], "give anchor.weights.shot3=NUMBER"),
        (["--output", "DIR/runs"], "lies inside"),
    ],
)
def test_words_that_cannot_be(tmp_path, words, message):
    folder = make_images(tmp_path / "d")
    words = [word.replace("DIR", str(folder)) for word in words]
    assert message in refused(folder, *(["--output", tmp_path / "o"] if "--output" not in words else []), *words)


def test_names_that_collide(tmp_path):
    folder = make_images(tmp_path / "d")
    (folder / "003.jpg").write_bytes((folder / "003.png").read_bytes())
    assert "003.jpg and 003.png differ in their extension alone" in refused(folder)


def test_images_too_small_for_crops(tmp_path):
    assert "8 px per side are too small for crops" in refused(make_images(tmp_path / "d", side=8))


def test_a_disk_that_is_too_small(tmp_path, monkeypatch, capsys):
    folder, asked = make_images(tmp_path / "d"), {"verdict": ["independent"], "subsample": 1}
    monkeypatch.setattr("dinov2.pretrain.Plan._ask_denoiser", lambda plan: asked | {"step_s": 3.6, "megapixel_s": 1.0})
    monkeypatch.setattr("dinov2.outlook.measure_training", lambda stage: (1.0, 10**9))
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2 * 10**9))
    refused(folder, "--output", tmp_path / "o")
    sentence = refused(folder, "--output", tmp_path / "o")  # the second time as the first
    # Epochs 20, 40, 60 and 70 of the denoised run, 20 and 30 of the noisy one, and of each one to go on from.
    assert "2 GB free, 8 GB are needed" in sentence and "give --output on another one" in sentence
    assert not (tmp_path / "o/none").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**12))
    monkeypatch.setattr("dinov2.pretrain.Runner.run", lambda runner, steps: None)
    assert main([str(folder), "--output", str(tmp_path / "o")]) == 0
    # 1,000 steps of the denoiser; 70 epochs of 10 iterations, then 30.
    assert re.search(r"time: about 1 h 17 min .*\(denoiser 1 h 00 min, denoised copy 0 s, n2n 12 min, nct 5 min\)",
                     capsys.readouterr().out)  # fmt: skip


def test_a_denoised_copy_of_the_users_takes_the_denoisers_place(tmp_path, monkeypatch, capsys):
    folder, run = make_images(tmp_path / "d"), []
    words = [str(folder), "--output", str(tmp_path / "o"), f"data.denoised_root={tmp_path / 'copy'}"]
    assert main([*words, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "denoiser  none: the denoised copy is" in printed and "Neighbor2Neighbor" not in printed
    assert f"data.denoised_root={tmp_path / 'copy'}" in printed and "dinov2.train" in printed
    monkeypatch.setattr("dinov2.outlook.measure_training", lambda stage: (1.0, 10**6))
    monkeypatch.setattr("dinov2.pretrain.Runner.run", lambda runner, steps: run.append(steps))
    assert main(words) == 0 and len(run) == 3
    assert "denoiser 0 s, denoised copy 0 s, n2n 12 min, nct 5 min" in capsys.readouterr().out


# --- trials and large folders ---------------------------------------------------------------------------------------
def test_a_part_of_a_folder_keeps_its_folders_and_its_labels(tmp_path):
    folder = make_images(tmp_path / "d", folders=("a", "b"))
    names = spread(list_images(folder), 10)
    assert len(names) == 10 and len({name for name in names if name.startswith("a/")}) == 5
    table = write_rows(tmp_path / "l.csv", [[name, "x"] for name in list_images(folder)])
    link(folder, names, tmp_path / "part", str(table))
    assert list_images(tmp_path / "part") == sorted(names)
    assert len((tmp_path / "part/labels.csv").read_text().splitlines()) == 11


@pytest.mark.parametrize("splits", [("train/", "val/"), ("",)])
def test_a_part_of_very_many_folders_is_of_some_of_them_the_same_in_both_splits(splits):
    names = [f"{split}patient{number:04}/{k}.dcm" for split in splits for number in range(5000) for k in range(3)]
    chosen = spread(names, 256)
    assert 256 <= len(chosen) <= 256 * len(splits)
    folders = [{Path(name).parent.name for name in chosen if name.startswith(split)} for split in splits]
    assert all(one == folders[0] and len(one) == 128 for one in folders)


def test_a_part_that_is_there_takes_corrected_labels_and_no_other_images(tmp_path):
    folder, part = make_images(tmp_path / "d", folders=("a", "b")), tmp_path / "part"
    names = spread(list_images(folder), 10)
    link(folder, names, part)
    for label in ("x", "y"):
        rows = [[f".\\{name}".replace("/", "\\"), label] for name in list_images(folder)]
        table = write_rows(tmp_path / "l.csv", rows)
        link(folder, names, part, str(table))
        assert [row[-1] for row in (part / "labels.csv").read_text().splitlines()[1:]] == [label] * 10
    with pytest.raises(ValueError, match=f"part links to other images: a/.* is not that of .*; remove {part}"):
        link(make_images(tmp_path / "e", folders=("a", "b")), names, part)


def test_a_trial_of_a_large_folder_is_made_on_a_part_of_it(tmp_path, monkeypatch, capsys):
    folder = make_images(tmp_path / "d", number=200, folders=("a", "b"))
    write_rows(tmp_path / "labels.csv", [[name, name[0]] for name in list_images(folder)])
    monkeypatch.chdir(tmp_path)  # where the part has a labels.csv of its own, this one names images that it lacks
    monkeypatch.setattr("dinov2.pretrain.Plan.run", lambda plan, subsample: plan)
    plan = dinov2.pretrain("d", output="o", steps=1, labels="labels.csv", group=r"\d+")
    assert plan.o.data == "o/images-256" and len(list_images(plan.o.data)) == 256
    assert plan.survey.labelled and plan.o.given("data.labels") == "o/images-256/labels.csv"
    assert plan.survey.count == 256
    assert len(plan.survey.val.relatives) in (25, 26, 27)
    assert "a trial on 256 of 400 images, linked in" in capsys.readouterr().out


def test_a_folder_of_many_files_is_listed_within_its_bound(tmp_path):
    """20,000 files: at most 1 kB of memory each while they are listed (docs/architecture.md)."""
    folder = make_images(tmp_path / "d", number=1)
    for number in range(20_000):
        os.link(folder / "000.png", folder / f"image_{number:06d}.png")
    started = time.perf_counter()
    tracemalloc.start()
    index = build_index(folder, "train", tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index.relatives) == 20_001 and peak < 20_000 * 1000, peak
    print(f"{peak / 20_001:.0f} bytes a file, {time.perf_counter() - started:.2f} s under tracemalloc")


# --- the whole path -------------------------------------------------------------------------------------------------
def test_help_is_quick_and_loads_no_torch():
    code = "import sys, dinov2.pretrain as p; p.make_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_flat_folder_to_the_report_and_its_features(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("dinov2.outlook.MEASURED_S", 0.0)
    folder = make_images(tmp_path / "my scans")
    words = dict(output=tmp_path / "o", steps=2, seeds=[1], evaluate=["label_free"])
    run = dinov2.pretrain(folder, "model.depth=1", "train.precision=fp32", **words)
    printed = capfd.readouterr().out
    assert run == tmp_path / "o/none/nct-seed1" and (tmp_path / "o/report.html").is_file()
    assert "20 images: all train, no labels" in printed and "time: about" in printed and " GB free" in printed
    assert "noise: independent from pixel to pixel" in printed
    names, values = dinov2.embed(run, folder)
    assert len(names) == 20 and np.isfinite(values).all()
    asked = json.loads((tmp_path / "o/outlook.json").read_text())
    assert dinov2.pretrain(folder, "model.depth=1", "train.precision=fp32", **words) == run
    printed = capfd.readouterr().out
    assert printed.count("finished before: ") == 5 and "time: about" in printed
    assert json.loads((tmp_path / "o/outlook.json").read_text()) == asked
