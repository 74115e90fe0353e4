"""Features of a folder: any weights, any layout, bad files, all formats, and a call that goes on after a kill."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dinov2
from dinov2.embed import main
from dinov2.models.vision_transformer import VisionTransformer
from tests.conftest import ROOT, fill_parameters
from tests.dinov2.test_export import write_run
from tests.killing import end, start, wait_for
from utils.feature_table import PartialRows
from utils.results import VERSION


def make_folder(root, number=7):
    """Grey and RGB images of several sizes at several depths, without classes or splits; one of them broken."""
    rng = np.random.default_rng(0)
    for i in range(number):
        folder = root / ("", "patient 1", "patient 2/left")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shape = (20 + i, 24) if i % 2 else (20 + i, 24, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", "model.registers=2", "data.values=full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "scans")


def one_by_one(run, folder, names):
    """What load_backbone and its transform give, an image at a time."""
    backbone = dinov2.load_backbone(run)
    with torch.no_grad():
        outs = [backbone(backbone.transform(folder / name)) for name in names]
    cls = torch.cat([out["x_norm_clstoken"] for out in outs])
    return cls.numpy(), torch.cat([out["x_norm_patchtokens"] for out in outs]).numpy()


def test_the_package_shows_what_it_offers():
    assert dinov2.__version__ == VERSION and {"embed", "load_backbone", "pretrain", "__version__"} <= set(dir(dinov2))
    code = "import sys, dinov2; print('torch' in sys.modules, callable(dinov2.embed), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr
    with pytest.raises(AttributeError, match="no attribute 'embedd'"):
        dinov2.embedd  # noqa: B018
    setup = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert setup.stdout.split()[-1] == VERSION, setup.stderr


def test_every_image_has_the_features_of_its_own_pass(run, folder):
    names, values = dinov2.embed(run, folder, batch_size=3)
    assert len(names) == 7 and names == sorted(names) and "patient 2/left/2.png" in names
    cls, patches = one_by_one(run, folder, names)
    np.testing.assert_allclose(values, cls, atol=1e-5)
    backbone = dinov2.load_backbone(run)
    for tokens, expected in (("mean", patches.mean(1)), ("patches", patches), ("cls+mean", None)):
        again, other = dinov2.embed(backbone, str(folder), tokens=tokens, workers=1)
        expected = np.concatenate((cls, patches.mean(1)), 1) if expected is None else expected
        assert again == names and other.dtype == np.float32
        np.testing.assert_allclose(other, expected, atol=1e-5)
    assert dinov2.embed(run, folder, tokens="patches", size=40, crop=32)[1].shape == (7, 64, 192)


def read(path):
    """(names, values) of a table as its users read it."""
    if path.suffix == ".npy":
        with open(path.with_suffix(".names.csv"), newline="") as file:
            return [row["path"] for row in csv.DictReader(file)], np.load(path)
    if path.suffix == ".csv":
        with open(path, newline="") as file:
            rows = list(csv.reader(file))[1:]
        return [row[0] for row in rows], np.array([row[1:] for row in rows], np.float32)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    return table["path"].to_pylist(), np.array(table["features"].to_pylist(), np.float32)


@pytest.mark.parametrize("suffix", [".parquet", ".npy", ".csv"])
def test_all_formats_hold_the_same_numbers(suffix, run, folder, tmp_path, capsys):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    output = tmp_path / "new" / f"features{suffix}"
    main([str(run), str(folder), "--output", str(output), "--batch-size", "4", "--workers", "0"])
    names, values = dinov2.embed(run, folder, batch_size=4)
    written, numbers = read(output)
    assert written == names and np.array_equal(numbers, values)
    beside = {output.with_suffix(".names.csv").name} if suffix == ".npy" else set()
    assert {path.name for path in output.parent.iterdir()} == {output.name} | beside
    assert f"{output}: 7 images, 192 values each" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"features{suffix} exists already: remove it or name another output"):
        main([str(run), str(folder), "--output", str(output)])


def test_patches_in_tables(run, folder, tmp_path):
    main([str(run), str(folder), "--output", str(tmp_path / "p.npy"), "--tokens", "patches"])
    assert np.load(tmp_path / "p.npy").shape == (7, 16, 192)
    with pytest.raises(ValueError, match=r"p.csv would have 3072 columns: name a .npy or .parquet"):
        main([str(run), str(folder), "--output", str(tmp_path / "p.csv"), "--tokens", "patches"])
    parquet = pytest.importorskip("pyarrow.parquet")
    main([str(run), str(folder), "--output", str(tmp_path / "p.parquet"), "--tokens", "patches"])
    assert parquet.read_schema(tmp_path / "p.parquet").metadata[b"shape"] == b"[16, 192]"
    assert np.array_equal(read(tmp_path / "p.parquet")[1].reshape(7, 16, 192), np.load(tmp_path / "p.npy"))


def test_bad_files_are_named_and_left_out_on_request(run, tmp_path, capsys):
    folder = make_folder(tmp_path / "scans")
    (folder / "1 cut.png").write_bytes((folder / "0.png").read_bytes()[:200])
    np.save(folder / "many.npy", np.zeros((20, 20, 5), np.uint8))
    good, expected = dinov2.embed(run, make_folder(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"1 cut\.png cannot be read.*\(--skip-bad leaves out what cannot be read\)"):
        dinov2.embed(run, folder)
    capsys.readouterr()
    for batch_size in (1, 4):
        names, values = dinov2.embed(run, folder, skip_bad=True, batch_size=batch_size)
        assert names == good
        np.testing.assert_allclose(values, expected, atol=1e-5)
        said = capsys.readouterr().err
        assert "left out: 1 cut.png (" in said and "left out: many.npy (" in said and "has 5 channels" in said
    for name in good:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"scans: none of 2 images can be read, the first: .*1 cut.png"):
        dinov2.embed(run, folder, skip_bad=True)


def test_a_killed_call_goes_on_where_it_was(run, folder, tmp_path, monkeypatch):
    output, append = tmp_path / "features.npy", PartialRows.append
    arguments = [str(run), str(folder), "--output", str(output), "--batch-size", "2", "--workers", "0"]

    def slow(self, values, bad):
        append(self, values, bad)
        if self.next >= 4:
            signal.pause()

    with monkeypatch.context() as patch:
        patch.setattr(PartialRows, "append", slow)
        child = start(main, arguments, tmp_path / "log")
        log = lambda: "".join(path.read_text() for path in tmp_path.glob(".features.npy.*.log"))  # noqa: E731
        assert wait_for(lambda: '"next": 4' in log(), child)
        with pytest.raises(ValueError, match="features.npy is being written by another process"):
            main(arguments)
        assert end(child, signal.SIGKILL) == -signal.SIGKILL
    assert not output.exists() and len(list(tmp_path.glob(".features.npy.*.rows"))) == 1
    (rows,) = tmp_path.glob(".features.npy.*.rows")
    with open(rows, "ab") as file:
        file.write(b"half a row")  # of the batch that was under way
    appended = []
    monkeypatch.setattr(PartialRows, "append", lambda self, v, bad: (appended.append(len(v)), append(self, v, bad)))
    main(arguments)
    assert appended == [2, 1], "the first four images are not computed again"
    assert np.array_equal(np.load(output), dinov2.embed(run, folder, batch_size=2)[1])
    assert not list(tmp_path.glob(".features*"))


def test_other_weights_or_images_begin_anew(run, folder, tmp_path):
    """What lies there under another key is not taken for these rows."""
    backbone = dinov2.load_backbone(run)
    output = tmp_path / "f.npy"
    left = PartialRows(output, (192,), "0123456789abcdef")
    left.append(np.zeros((7, 192)), {})
    names, values = dinov2.embed(backbone, folder, output)
    assert values.any(axis=1).all()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["f.names.csv", "f.npy"], "nothing stale is left"
    os.remove(output)
    with torch.no_grad():
        backbone.norm.bias += 1
    assert not np.allclose(dinov2.embed(backbone, folder, output)[1], values)


def test_weights_without_a_run(folder, tmp_path):
    """A bare .pth of one channel, moved away from its run, below a config.yaml of another program."""
    (tmp_path / "config.yaml").write_text("model: {name: resnet}\ndata: {batch_size: 8}\n")
    vit = fill_parameters(VisionTransformer("vit_tiny", 32, 8, 1, depth=1)).eval()
    torch.save({"teacher": {f"backbone.{name}": value for name, value in vit.state_dict().items()}}, tmp_path / "w.pth")
    names, values = dinov2.embed(tmp_path / "w.pth", folder, size=36, crop=32)
    assert values.shape == (7, 192) and len(np.unique(values.round(4), axis=0)) == 7
    with pytest.raises(ValueError, match="takes \\[H, W, 1\\]"):
        dinov2.load_backbone(tmp_path / "w.pth").transform(np.zeros((8, 8, 3), np.uint8))


def test_values_are_those_of_the_run_or_estimated_for_weights_alone(tmp_path):
    """12 bits in 16: scaled by the rule that the run has saved; without one by the folder's own images."""
    (tmp_path / "deep").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        np.save(tmp_path / f"deep/{i}.npy", rng.integers(0, 4096, (20, 20), dtype=np.uint16))
    np.save(tmp_path / "deep/4.npy", np.full((20, 20), 4095, np.uint16))
    grey = ["data.in_chans=1", "data.mean=[0.5]", "data.std=[0.2]"]
    run = write_run(tmp_path / "run", *grey, "data.values=range=[0,4095]")
    names, values = dinov2.embed(run, tmp_path / "deep")
    cls, _ = one_by_one(run, tmp_path / "deep", names)
    np.testing.assert_allclose(values, cls, atol=1e-5)
    backbone = dinov2.load_backbone(run)
    backbone.settings.data["values"] = "auto"
    np.testing.assert_allclose(dinov2.embed(backbone, tmp_path / "deep")[1], values, atol=1e-5)
    backbone.settings.data["values"] = "full"
    assert np.abs(dinov2.embed(backbone, tmp_path / "deep")[1] - values).max() > 1e-4


@pytest.mark.parametrize(
    "more, sentence",
    [
        (dict(tokens="all"), "tokens=all must be one of cls, mean, cls\\+mean, patches"),
        (dict(crop=18, size=20), "crop=18 is no multiple of the backbone's patch size 4: take 16"),
        (dict(crop=20), "eval.crop=20 is larger than eval.resize=16"),
        (dict(batch_size=0), "batch_size=0 must be at least 1"),
        (dict(device="cuda:77"), "device=cuda:77 can't be used"),
        (dict(precision="int8"), "precision=int8 must be one of fp32, bf16, fp16"),
        (dict(output="f.xlsx"), "f.xlsx must end in one of .parquet, .npy, .csv"),
        (dict(output="{folder}/f.npy"), "f.npy would be taken for an image of"),
        (dict(map="{folder}/m.png"), "m.png would be taken for an image of"),
        (dict(folder="{folder}/none"), "none is missing; name a folder of images"),
        (dict(weights="{folder}/w.pth"), "w.pth is missing: name a run, one of its checkpoints, or a file of weights"),
    ],
)
def test_what_is_refused_is_one_sentence(more, sentence, run, folder):
    given = dict(weights=run, folder=folder)
    given |= {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in more.items()}
    with pytest.raises(ValueError, match=sentence):
        dinov2.embed(**given)


def test_an_image_without_finite_features_is_named(run, folder):
    backbone = dinov2.load_backbone(run)
    with torch.no_grad():
        backbone.norm.bias[0] = torch.nan
    with pytest.raises(ValueError, match="features of 7 of 7 images are not finite, the first of 0.png"):
        dinov2.embed(backbone, folder)


def test_a_map_beside_the_table(run, folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "0.png").write_bytes(b"no image")
    main([str(run), str(broken), "--output", str(tmp_path / "f.npy"), "--skip-bad", "--map", str(tmp_path / "map.png")])
    points = json.loads((tmp_path / "map.json").read_text())["points"]
    assert len(points) == 6 and not any(point[2] == "0.png" for point in points)
    assert (tmp_path / "map.png").exists() and (tmp_path / "map_thumbs.png").exists()
    for arguments in (["--map", "map.jpg"], ["--map", "map.png", "--tokens", "patches"]):
        with pytest.raises(ValueError, match="name a .png, and tokens that give one row per image"):
            main([str(run), str(broken), "--output", str(tmp_path / "g.npy"), *arguments])


def test_the_table_is_the_last_that_is_written(run, folder, tmp_path, monkeypatch):
    """A call that was killed while it drew the map finds no table, which would refuse it, and goes on."""
    drawn = []
    monkeypatch.setattr("dinov2.embed.write_map", lambda *parts: drawn.append((tmp_path / "f.npy").exists()))
    main([str(run), str(folder), "--output", str(tmp_path / "f.npy"), "--map", str(tmp_path / "map.png")])
    assert drawn == [False] and (tmp_path / "f.npy").exists()
