"""Floors on a real run's folder: their rows, when they are made anew, and what each of them is."""

import base64
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.config import load_config, load_run_config, save_run_config
from dinov2.eval import common, floors
from dinov2.eval.features import extract, labelled_dataset
from dinov2.models.vision_transformer import build_backbone
from dinov2.objectives import DINOv2
from tests.dinov2.eval.conftest import SETTINGS, make_run
from utils.results import FIELDS, read_results

QUICK = ("eval.linear.epoch_length=3", "eval.linear.protocol=cached")


def make(run, *arguments):
    return floors.run([f"run={run}", *QUICK, *arguments])


def rows_of(output, view="gauss50-noisy"):
    """{name of the floor: its rows}."""
    return {folder.name: read_results(folder) for folder in sorted((output / "floors" / view).iterdir())}


def test_rows_say_what_they_are(run, tmp_path):
    assert make(run) == 0
    rows = rows_of(tmp_path)  # beside the run: its parent does not have the noise's name
    assert list(rows) == ["pixels", "untrained-0", "untrained-1"]
    for name, own in rows.items():
        assert [row["metric"] for row in own] == ["knn3_top1", "knn10_top1", "linear_top1"]
        method, _, seed = name.partition("-")
        cfg = load_run_config(tmp_path / "floors/gauss50-noisy" / name)
        assert (cfg.method, cfg.seed, [stage.view for stage in cfg.curriculum.stages]) == (
            method, int(seed or 0), ["noisy"]
        )  # fmt: skip
        architecture = "pixels" if method == "pixels" else "vit_tiny, depth 2, patch 8, 3 channels"
        for row in own:
            fields = {"noise": "gauss50", "dataset": "digits", "view": "noisy", "epoch": 0, "iteration": 0}
            assert {field: row[field] for field in fields} == fields and set(FIELDS) < set(row)
            assert (row["method"], row["seed"]) == (method, int(seed or 0))
            details = row["details"]
            assert (details["images"], details["classes"], details["crop"]) == (32, 4, 32)
            assert details["architecture"] == architecture
            bits = np.unpackbits(np.frombuffer(base64.b64decode(details["correct"]), np.uint8))[:32]
            assert bits.mean() * 100 == pytest.approx(row["value"])
    assert rows["untrained-0"][2]["value"] != rows["untrained-1"][2]["value"]
    assert not list(tmp_path.glob("floors/**/.eval-*"))


def test_made_once_and_anew_for_other_settings(run, tmp_path, capsys):
    out = f"output={tmp_path / 'out'}"
    make(run, out)
    before = rows_of(tmp_path / "out")
    capsys.readouterr()
    make(run, out, "data.workers=1")
    assert capsys.readouterr().out.count("there already, skipped") == 3
    other = shutil.copytree(run, tmp_path / "nc")  # another method, seed and training: the same floors
    cfg = load_run_config(run)
    cfg.method, cfg.seed, cfg.optim.base_lr, cfg.data.denoised_root, cfg.trial = "nc", 3, 0.5, "elsewhere", True
    save_run_config(cfg, other)
    make(other, out)
    assert rows_of(tmp_path / "out") == before
    make(run, out, "eval.knn.k=[5]")  # the linear probe's settings are the same
    after = rows_of(tmp_path / "out")
    assert {name: [row["metric"] for row in own[3:]] for name, own in after.items()} == dict.fromkeys(
        after, ["knn5_top1"]
    )
    cfg.model.depth = 1
    save_run_config(cfg, other)
    make(other, out, "evaluators=knn")
    anew = rows_of(tmp_path / "out")
    assert anew["pixels"] == after["pixels"]  # they have no architecture
    assert {row["details"]["architecture"] for row in anew["untrained-1"][4:]} == {
        "vit_tiny, depth 1, patch 8, 3 channels"
    }
    make(run, out, "evaluators=knn", "eval.crop=16")
    assert [row["details"]["crop"] for row in rows_of(tmp_path / "out")["pixels"]] == 4 * [32] + 2 * [16]


def test_pixels_are_the_flattened_crop(run):
    cfg = common.load_settings(run, ["eval.resize=32"])  # the images' own size: the crop is the image
    val = extract(floors.Pixels(32, 3), cfg, "val")
    dataset = labelled_dataset(cfg, "val")
    images = np.stack([dataset[i][0][0] for i in range(len(dataset))]) / 255
    flat = ((images - list(cfg.data.mean)) / list(cfg.data.std)).transpose(0, 3, 1, 2).reshape(32, -1)
    np.testing.assert_allclose(val.values.numpy(), flat, atol=2e-2)  # 8 bits, resized by a factor of one
    train = extract(floors.Pixels(32, 3), cfg, "train")
    a, b = (features.values / features.values.norm(dim=1, keepdim=True) for features in (val, train))
    found = 0
    for similarity, label in zip(a @ b.T, val.labels, strict=True):
        votes = torch.zeros(4)
        for i in similarity.argsort(descending=True)[:3]:
            votes[train.labels[i]] += (similarity[i] / 0.07).exp()
        found += int(votes.argmax() == label)
    make(run, "eval.resize=32", "evaluators=knn")
    rows = rows_of(run.parent)["pixels"]
    assert rows[0]["metric"] == "knn3_top1" and rows[0]["value"] == pytest.approx(100 * found / 32)


def test_untrained_is_where_training_starts(run):
    cfg = common.load_settings(run, [])
    for name, seed in (("untrained-0", 0), ("untrained-1", 1)):
        built = floors.build(floors.floor_config(cfg, name, None)).state_dict()
        torch.manual_seed(seed)
        started = DINOv2(cfg).teacher["backbone"].state_dict()
        assert built.keys() == started.keys() and all(torch.equal(built[key], started[key]) for key in built)


def write_colours(root):
    """Two classes of images, of dark and of light ones."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 20), ("val", 10)):
        for name, level in (("dark", 40), ("light", 180)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                Image.fromarray((level + rng.integers(0, 40, (32, 32, 3))).astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("protocol", ["exact", "cached"])
def test_probe_separates_what_pixels_separate(tmp_path, protocol):
    """The one feature set, pixels; learning rates at which it diverges count as wrong."""
    run = make_run(tmp_path / "none" / "clean", write_colours(tmp_path / "colours"), "clean", epochs=())
    rates = "eval.linear.learning_rates=[0.001,1e38]"
    make(run, "evaluators=linear", rates, "eval.linear.epoch_length=10", f"eval.linear.protocol={protocol}")
    (row,) = rows_of(tmp_path, "none-clean")["pixels"]
    assert row["value"] == 100 and row["protocol"] == protocol and row["view"] == "clean"
    figures = row["details"]["classifiers"]
    assert list(figures.values()) == [100, 0] and all("1_blocks_avgpool_False" in name for name in figures)


def test_large_crops_and_large_sets_are_averaged(run, monkeypatch):
    def side(crop, images):
        monkeypatch.setattr(floors, "labelled_dataset", lambda cfg, split: range(images))
        return floors.pixel_side(common.load_settings(run, [f"eval.crop={crop}"]))

    assert [side(crop, 9469) for crop in (32, 64, 128, 224)] == [32, 64, 64, 56]
    assert side(224, 1_281_167) == 14 and side(64, 10**12) == 1
    images = torch.randn(2, 3, 224, 224)
    expected = images.unflatten(2, (56, 4)).unflatten(4, (56, 4)).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(floors.Pixels(56, 3)(images)["x_norm_clstoken"], expected)


def test_public_weights_are_a_third_floor(run, tmp_path, digits):
    other = make_run(tmp_path / "public", digits, "model.patch_size=16", "model.depth=1", epochs=(1,))
    make(run, f"weights={other}", "evaluators=knn")
    rows = rows_of(tmp_path)
    assert len(rows) == 4 and {row["method"] for row in rows["public"]} == {"public"}
    assert rows["public"][0]["details"]["architecture"] == "vit_tiny, depth 1, patch 16, 3 channels"
    with pytest.raises(ValueError, match=r"eval.crop=24 is no multiple of the patch size 16 of .*eval.crop=16"):
        make(run, f"weights={other}", "evaluators=knn", "eval.crop=24")
    assert all({r["details"]["crop"] for r in own} == {32} for own in rows_of(tmp_path).values())  # before the others
    with pytest.raises(ValueError, match="nowhere.pth"):
        make(run, "weights=nowhere.pth")
    grey = make_run(tmp_path / "grey", digits, "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]", epochs=(1,))
    with pytest.raises(ValueError, match="reads 1 channels, the run data.in_chans=3"):
        make(run, f"weights={grey}")


def test_default_folder_is_shared_by_the_runs_of_a_data_set(tmp_path):
    for name, noise in (("a/gauss255/nct", "gauss255"), ("a/clean", "none"), ("nct-gauss255", "gauss255")):
        cfg = load_config([*SETTINGS, f"noise={noise}", "data.root=x", f"output_dir={tmp_path / name}"])
        save_run_config(cfg, tmp_path / name)
    assert floors.default_output(tmp_path / "a/gauss255/nct") == tmp_path / "a"
    assert floors.default_output(tmp_path / "a/clean") == tmp_path / "a"
    assert floors.default_output(tmp_path / "nct-gauss255") == tmp_path


@pytest.mark.parametrize(("missing", "message"), [("val", "has no val images"), ("classes", "train has no labels")])
def test_data_without_labels_is_kept_out(tmp_path, capsys, missing, message):
    data = write_colours(tmp_path / "colours")
    if missing == "val":
        shutil.rmtree(data / "val")
    else:
        for split in ("train", "val"):
            for folder in list((data / split).iterdir()):
                for file in list(folder.iterdir()):
                    file.rename(data / split / f"{folder.name}-{file.name}")
                folder.rmdir()
    assert make(make_run(tmp_path / "run", data, epochs=())) == 0
    out = capsys.readouterr().out
    assert out.startswith("no floors: ") and message in out and out.count("\n") == 1
    assert not (tmp_path / "floors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seed=3"], "seed= is no argument here"),
        (["evaluators=pca"], "evaluators=pca: choose knn or linear"),
        (["checkpoints=all"], "checkpoints is no key of an evaluation"),
        (["eval.crop=30"], "eval.crop=30 is no multiple"),
        (["data.root=nowhere"], "nowhere"),
    ],
)
def test_errors_of_the_user(run, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(run, *arguments)


def test_architectures_in_words(run):
    cfg = load_run_config(run)
    assert build_backbone(cfg).architecture == "vit_tiny, depth 2, patch 8, 3 channels"
    cfg.data.in_chans, cfg.model.depth = 1, None
    assert build_backbone(cfg).architecture == "vit_tiny, depth 12, patch 8, 1 channel"
