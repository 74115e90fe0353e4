"""utils/generate_noise.py as a user runs it: same bytes always, killed at any moment, bad input named."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests import killing
from tests.conftest import ROOT
from utils import generate_noise, images
from utils.feature_table import write_table
from utils.images import read_image, write_image
from utils.noise import ALL_NOISES, NoiseSpec, keyed_noise
from utils.workers import map_unordered

SCRIPT = ROOT / "utils" / "generate_noise.py"


def make_source(root: Path, number: int = 6, side: int = 24) -> Path:
    rng = np.random.default_rng(1)
    for i in range(number):
        split = "val" if i % 3 == 2 else "train"
        shape = side + 3 * (i % 2), side, 3
        write_image(root / split / f"n{i % 2}" / f"img_{i}.v1.png", rng.integers(0, 256, shape, dtype=np.uint8))
    return root


@pytest.fixture
def source(tmp_path) -> Path:
    return make_source(tmp_path / "mini-imagenet")


def run(*argv, workers: int = 0) -> int:
    return generate_noise.main([*map(str, argv), "--workers", str(workers)])


def test_without_an_argument_all_nine_from_the_current_folder(source):
    """As the README of the published work has it, as a script, from a folder that is not the project's."""
    done = subprocess.run([sys.executable, SCRIPT], cwd=source.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in source.parent.iterdir()} == {
        "mini-imagenet", *(f"noisy_mini-imagenet-{name}" for name in ALL_NOISES),
    }  # fmt: skip
    for name in ALL_NOISES:
        tree, spec = source.parent / f"noisy_mini-imagenet-{name}", NoiseSpec.parse(name)
        manifest = images.read_manifest(tree)
        assert manifest["noise"] == name and manifest["count"] == 6 and manifest["noise_seed"] == 0
        assert images.list_images(tree) == images.list_images(source)
        for relative in images.list_images(source):
            clean = read_image(source / relative)
            key = relative.removesuffix(".png")
            assert np.array_equal(read_image(tree / relative), keyed_noise(clean, spec, 0, key))
        assert f"{name}: SNR" in done.stdout


def test_the_bytes_do_not_depend_on_workers_order_or_other_noises(source, tmp_path, monkeypatch):
    run("--source", source, "--noise", "gauss50", "shot1", "--output-root", tmp_path / "a", workers=0)
    run("--source", source, "--noise", "shot1", "--output-root", tmp_path / "b", workers=2)
    listing = images.list_images
    monkeypatch.setattr(images, "list_images", lambda *given: listing(*given)[::-1])
    moved = tmp_path / "elsewhere" / "mini-imagenet"
    shutil.copytree(source, moved)
    run("--source", moved, "--noise", "shot1", "--output-root", tmp_path / "c", workers=0)
    trees = [killing.contents(tmp_path / folder / "noisy_mini-imagenet-shot1") for folder in "abc"]
    assert len(trees[0]) == 7 and trees[0] == trees[1] == trees[2]


def test_formats_channels_and_seeds(source, tmp_path):
    run("--source", source, "--noise", "gauss100", "--output-root", tmp_path / "png", "--channels", 1, "--seed", 3)
    run("--source", source, "--noise", "gauss100", "--output-root", tmp_path / "webp", "--format", "webp", "--seed", 3)
    name = "noisy_mini-imagenet-gauss100/train/n0/img_0.v1"
    clean = read_image(source / "train/n0/img_0.v1.png")
    spec = NoiseSpec.parse("gauss100")
    noisy = keyed_noise(clean, spec, 3, "train/n0/img_0.v1")
    assert np.array_equal(read_image(tmp_path / "webp" / f"{name}.webp"), noisy)
    grey = keyed_noise(read_image(source / "train/n0/img_0.v1.png", 1), spec, 3, "train/n0/img_0.v1")
    assert np.array_equal(read_image(tmp_path / "png" / f"{name}.png", 1), grey)


def test_the_snr_is_the_ratio_of_powers(tmp_path, capsys):
    """A uniform grey of 128 under gauss10, which hardly clips: 20 log10(128 / 10.0) dB, less truncation."""
    write_image(tmp_path / "grey/x.png", np.full((300, 300, 3), 128, np.uint8))
    run("--source", tmp_path / "grey", "--noise", "gauss10")
    printed = capsys.readouterr().out.partition("gauss10: SNR ")[2].split()[0]
    assert abs(float(printed) - 10 * np.log10(128**2 / (100 + 1 / 3))) < 0.05


def test_finished_trees_are_skipped_and_new_images_added(source, capsys):
    run("--source", source, "--noise", "shot3")
    tree = source.parent / "noisy_mini-imagenet-shot3"
    stamps = {path: path.stat().st_mtime_ns for path in tree.rglob("*.png")}
    run("--source", source, "--noise", "shot3")
    assert "finished already: 6 images" in capsys.readouterr().out
    write_image(source / "train/n1/new.png", np.zeros((5, 5, 3), np.uint8))
    run("--source", source, "--noise", "shot3")
    assert images.read_manifest(tree)["count"] == 7 and (tree / "train/n1/new.png").exists()
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    (source / "train/n1/new.png").unlink()
    with pytest.raises(ValueError, match="source lacks.*new.png"):
        run("--source", source, "--noise", "shot3")


def test_killed_ten_times_it_ends_with_the_same_trees(tmp_path, monkeypatch):
    source = make_source(tmp_path / "mini-imagenet", number=150, side=40)
    argv = ["--source", str(source), "--noise", "gauss255", "shot3", "--workers", "2"]
    run(*argv, "--output-root", tmp_path / "whole", workers=0)
    target = tmp_path / "killed"
    argv += ["--output-root", str(target)]
    kills = 0

    def fourteen(items):
        """So that a busy machine cannot let a run get to its end before it is killed."""
        for number, item in enumerate(items):
            if number == 14:
                time.sleep(killing.SECONDS)
            yield item

    for _ in range(10):
        before = sum(1 for _ in target.rglob("*.png"))
        with monkeypatch.context() as patch:
            patch.setattr(
                generate_noise, "map_unordered", lambda pool, function, items, window: map_unordered(
                    pool, function, fourteen(items), window
                )
            )  # fmt: skip
            child = killing.start(generate_noise.main, argv, tmp_path / "log")
        alive = killing.wait_for(lambda more=before + 9: sum(1 for _ in target.rglob("*.png")) > more, child)
        kills += killing.end(child, signal.SIGKILL if alive else None) == -signal.SIGKILL
    assert kills == 10, (tmp_path / "log").read_text()
    assert not list(target.rglob("manifest.json")), "marked as finished too early"
    assert killing.end(killing.start(generate_noise.main, argv, tmp_path / "log")) == 0
    assert killing.contents(target) == killing.contents(tmp_path / "whole")


def test_ctrl_c_ends_at_once_with_whole_files_only(tmp_path):
    source = make_source(tmp_path / "mini-imagenet", number=400, side=60)
    argv = ["--source", str(source), "--noise", "gauss255", "--workers", "2"]
    tree = tmp_path / "noisy_mini-imagenet-gauss255"
    child = killing.start(generate_noise.main, argv, tmp_path / "log")
    assert killing.wait_for(lambda: sum(1 for _ in tree.rglob("*.png")) > 5, child)
    assert killing.end(child, signal.SIGINT) == 130
    assert "interrupted" in (tmp_path / "log").read_text() and "Traceback" not in (tmp_path / "log").read_text()
    names = [path.name for path in tree.rglob("*") if path.is_file()]
    assert ".manifest.json" in names and len(names) < 400 and not [name for name in names if ".tmp-" in name]
    for path in tree.rglob("*.png"):
        read_image(path)


def test_broken_images_are_all_named_and_the_rest_is_done(source, capsys):
    whole = (source / "train/n0/img_0.v1.png").read_bytes()
    (source / "train/n0/cut.png").write_bytes(whole[: len(whole) // 2])
    (source / "val/n0/empty.jpg").touch()
    (source / "val/n0/text.png").write_text("hello")
    assert run("--source", source, "--noise", "shot1", workers=2) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("cut.png", "empty.jpg", "text.png", "3 images could not be read"))
    tree = source.parent / "noisy_mini-imagenet-shot1"
    assert len(images.existing_images(tree)) == 6 and images.read_manifest(tree) is None
    for name in ("train/n0/cut.png", "val/n0/empty.jpg", "val/n0/text.png"):
        (source / name).unlink()
    assert run("--source", source, "--noise", "shot1") == 0 and images.read_manifest(tree)["count"] == 6


def test_odd_images_are_done(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    folder = tmp_path / "odd"
    folder.mkdir()
    for mode in ("L", "P", "RGBA", "1", "LA"):
        Image.fromarray(colour).convert(mode).save(folder / f"{mode}.png")
    Image.fromarray(colour).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(folder / "deep.png")
    Image.fromarray(colour[:1, :1]).save(folder / "one.png")
    assert run("--source", folder, "--noise", "gauss50", "speckle0.4") == 0
    for name in ("L", "P", "RGBA", "1", "LA", "cmyk", "deep", "one"):
        assert read_image(tmp_path / f"noisy_odd-gauss50/{name}.png").shape[2] == 3


def test_what_cannot_work_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    for argv, reason in (
        (["--noise", "gauss"], "gauss37.5"),
        (["--noise", "none"], "adds nothing"),
        (["--source", tmp_path / "nowhere"], "missing"),
        (["--noise", "shot1", "--output-root", source], "separate"),
        (["--noise", "shot1", "--seed", "-1"], "negative"),
    ):
        with pytest.raises(ValueError, match=reason):
            run("--source", source, *argv)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"1.0 kB free, and about \d.*needed"):
        run("--source", source)
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    shutil.copy(source / "train/n0/img_0.v1.png", source / "train/n0/img_0.v1.jpg")
    with pytest.raises(ValueError, match="differ in their extension"):
        run("--source", source)
    (tmp_path / "noisy_mini-imagenet-gauss50").mkdir()
    (tmp_path / "noisy_mini-imagenet-gauss50/x").touch()
    (source / "train/n0/img_0.v1.jpg").unlink()
    with pytest.raises(ValueError, match="gauss50 exists and was not made by this tool"):
        run("--source", source)
    assert not list(tmp_path.glob("noisy_*shot*"))


def test_a_read_only_source_is_enough(source, tmp_path):
    for path in [source, *source.rglob("*")]:
        path.chmod(0o555)
    try:
        assert run("--source", source, "--noise", "shot1", "--output-root", tmp_path / "out") == 0
    finally:
        for path in [source, *source.rglob("*")]:
            path.chmod(0o755)


def test_a_full_disk_is_one_line_and_nothing_half_written(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        source = make_source(tmp_path / "mini-imagenet", number=60, side=60)
        monkeypatch.setattr(generate_noise, "_check_disk", lambda job, missing: None)  # another program fills it
        argv = ["--source", str(source), "--noise", "gauss255", "--output-root", str(disk), "--workers", "2"]
        assert killing.end(killing.start(generate_noise.main, argv, tmp_path / "log")) == 2
        log = (tmp_path / "log").read_text()
        assert "No space left on device" in log and "Traceback" not in log
        written = [path for path in disk.rglob("*") if path.is_file()]
        assert not [path for path in written if ".tmp-" in path.name or path.name == "manifest.json"]
        for path in disk.rglob("*.png"):
            read_image(path)
    finally:
        subprocess.run(["umount", disk])


def test_a_finished_tree_of_other_images_is_refused(source, capsys):
    """Replaced since: neither missing nor left over, and yet another tree."""
    run("--source", str(source), "--noise", "gauss50")
    run("--source", str(source), "--noise", "gauss50")
    assert "finished already: 6 images" in capsys.readouterr().out
    first = next(source.rglob("*.png"))
    first.write_bytes(first.read_bytes() + b"\0")
    with pytest.raises(
        ValueError, match=r"gauss50 was made from 6 images \w+, its source now has 6 images \w+; remove"
    ):
        run("--source", str(source), "--noise", "gauss50")
    write_image(source / "train/n1/new.png", np.zeros((5, 5, 3), np.uint8))
    with pytest.raises(ValueError, match=r"gauss50 was made from 6 images \w+, its source now has 7 images"):
        run("--source", str(source), "--noise", "gauss50")
    first.write_bytes(first.read_bytes()[:-1])  # as it was: an image is added, no other one has changed
    run("--source", str(source), "--noise", "gauss50")
    tree = source.parent / "noisy_mini-imagenet-gauss50"
    next(tree.rglob("*.png")).unlink()
    run("--source", str(source), "--noise", "gauss50")
    assert images.read_manifest(tree)["count"] == 7


def test_names_of_another_encoding_are_taken_to_the_letter(tmp_path):
    (tmp_path / "old").mkdir()
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(tmp_path / "x.png")
    os.rename(os.fsencode(tmp_path) + b"/x.png", os.fsencode(tmp_path) + b"/old/caf\xe9.png")  # latin-1
    assert run("--source", tmp_path / "old", "--noise", "gauss50") == 0
    assert os.path.exists(os.fsencode(tmp_path) + b"/noisy_old-gauss50/caf\xe9.png")
    assert run("--source", tmp_path / "old", "--noise", "gauss50") == 0
    (name,) = images.list_images(tmp_path / "old")
    write_table(tmp_path / "x.npy", [name], np.zeros((1, 2), np.float32))
    assert (tmp_path / "x.names.csv").read_bytes() == b"path\r\ncaf\xe9.png\r\n"
