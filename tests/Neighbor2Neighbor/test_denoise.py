"""The denoising pass as a user runs it: padding, tiles, trees, kills, bad input."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from Neighbor2Neighbor import denoise
from Neighbor2Neighbor.data import read_noisy
from Neighbor2Neighbor.denoisers import UNetDenoiser, denoise_images, make_denoiser
from Neighbor2Neighbor.unet import UNet
from tests import killing
from utils import generate_noise, images
from utils.images import read_image, write_image
from utils.noise import NoiseSpec

CPU = torch.device("cpu")
SPEC = NoiseSpec.parse("gauss50")


def make_network(depth: int = 2, seed: int = 0, features: int = 8) -> UNet:
    """Random weights large enough that every layer reaches the output, which lies around 0.5."""
    torch.manual_seed(seed)
    network = UNet(features=features, depth=depth, init_scale=1.0)
    network.nin_c.weight.data *= 0.3
    network.nin_c.bias.data += 0.5
    return network


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def model(tmp_path) -> Path:
    torch.save(make_network().state_dict(), tmp_path / "unet.pth")
    return tmp_path / "unet.pth"


@pytest.fixture
def tree(tmp_path) -> Path:
    """Ten images of four sizes, JPEG and PNG, in two splits."""
    for i in range(10):
        folder = tmp_path / "set" / ("val" if i % 5 == 4 else "train") / f"n{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        height, width = ((20, 31), (31, 20), (17, 40), (8, 8))[i % 4]
        Image.fromarray(random_image(height, width, i)).save(folder / f"x{i}.{'JPEG' if i % 2 else 'png'}")
    return tmp_path / "set"


def run(model, tree, *options, noise: str = "gauss50", workers: int = 0) -> int:
    argv = ["--model", model, "--data", tree, "--noise", noise, "--workers", workers, *options]
    return denoise.main([str(word) for word in argv])


# --- one image ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (32, 32), (33, 31), (40, 72)])
def test_any_size_is_padded_by_reflection_and_rounded(shape):
    network, image = make_network(), random_image(*shape)
    (ours,) = denoise_images(UNetDenoiser(network, CPU, "fp32"), [image], CPU, 1024)
    height, width = shape
    padded = np.pad(image, ((0, -height % 4), (0, -width % 4), (0, 0)), "reflect")
    with torch.no_grad():
        output = network(torch.from_numpy(padded.transpose(2, 0, 1).copy())[None].float() / 255)[0, :, :height, :width]
    expected = np.clip(output.numpy().transpose(1, 2, 0) * 255 + 0.5, 0, 255).astype(np.uint8)
    assert ours.shape == image.shape
    assert np.abs(ours.astype(int) - expected).max() <= 1 and np.mean(ours != expected) < 1e-3


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_reach_covers_every_pixel_that_matters(depth):
    """The gradient of one output pixel is zero beyond the reach, for every place within the pooling grid."""
    network = make_network(depth).double()
    denoiser = UNetDenoiser(network, CPU, "fp32")
    side = 2 * denoiser.reach + 4 * denoiser.multiple
    x = torch.rand(1, 3, side, 8 * denoiser.multiple, dtype=torch.float64, requires_grad=True)
    furthest = 0
    for row in range(side // 2, side // 2 + denoiser.multiple):
        (gradient,) = torch.autograd.grad(network(x)[0, :, row].sum(), x)
        touched = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        furthest = max(furthest, int((touched - row).abs().max()))
    assert denoiser.reach - 2 * denoiser.multiple < furthest <= denoiser.reach


@pytest.mark.parametrize("shape,tile", [((120, 100), 32), ((121, 99), 33), ((300, 40), 64)])
def test_tiles_show_no_seams(shape, tile):
    denoiser = UNetDenoiser(make_network(depth=2), CPU, "fp32")
    image = random_image(*shape)
    (whole,) = denoise_images(denoiser, [image], CPU, 1024)
    (tiled,) = denoise_images(denoiser, [image], CPU, tile)
    difference = np.abs(whole.astype(int) - tiled)
    assert whole.std() > 10 and difference.max() <= 1 and np.mean(difference > 0) < 1e-3


def test_the_inside_is_that_of_the_square_padding_of_the_release():
    """150 x 250 padded to 152 x 256, or to 256 x 256 as in the release: the same up to the reach of the lower edge."""
    denoiser = UNetDenoiser(make_network(depth=3), CPU, "fp32")
    image = random_image(150, 250)
    (ours,) = denoise_images(denoiser, [image], CPU, 1024)
    square = np.pad(image, ((0, 106), (0, 6), (0, 0)), "reflect")
    (release,) = denoise_images(denoiser, [square], CPU, 1024)
    difference = np.abs(ours.astype(int) - release[:150, :250])
    assert ours.std() > 10 and difference[: 152 - denoiser.reach].max() <= 1


def test_batches_of_many_are_those_of_one():
    denoiser = UNetDenoiser(make_network(), CPU, "fp32")
    batch = [random_image(30 + i % 3, 41, i) for i in range(5)]
    together = denoise_images(denoiser, batch, CPU, 1024)
    for image, denoised in zip(batch, together, strict=True):
        (alone,) = denoise_images(denoiser, [image], CPU, 1024)
        assert np.abs(alone.astype(int) - denoised).max() <= 1


# --- trees ----------------------------------------------------------------------------------------------------------
def test_a_tree_has_the_same_relative_paths_and_a_manifest(model, tree):
    assert run(model, tree, workers=2) == 0
    target = tree.parent / "noisy_set-gauss50-denoised"
    relatives = images.list_images(tree)
    assert images.list_images(target) == sorted(str(images.twin("", relative)) for relative in relatives)
    manifest = images.read_manifest(target)
    assert manifest["count"] == 10 and manifest["noise"] == "gauss50" and manifest["denoiser"].startswith("n2n ")
    denoiser = make_denoiser("n2n", SPEC, model, CPU, "fp32")
    for relative in relatives:
        noisy = read_noisy(tree, relative, SPEC, 0)
        (expected,) = denoise_images(denoiser, [noisy], CPU, 1024)
        found = read_image(images.twin(target, relative))
        assert found.shape == noisy.shape and np.abs(found.astype(int) - expected).max() <= 1


def test_noise_while_loading_and_a_noisy_tree_give_the_same_bytes(model, tree, tmp_path):
    generate_noise.main(["--source", str(tree), "--noise", "gauss50", "--workers", "0"])
    run(model, tree, "--output", tmp_path / "loading")
    run(model, tmp_path / "noisy_set-gauss50", noise="none")
    one, two = killing.contents(tmp_path / "loading"), killing.contents(tmp_path / "noisy_set-gauss50-denoised")
    names = [json.loads(content.pop("manifest.json")) for content in (one, two)]
    assert one == two and len(one) == 10
    files = [names[0].pop("images"), names[1].pop("noisy_images")]
    assert names[0] == names[1] and names[0]["noise"] == "gauss50" and files[0] != files[1]
    with pytest.raises(ValueError, match="holds noisy images"):
        run(model, tmp_path / "noisy_set-gauss50")
    with pytest.raises(ValueError, match="holds denoised images"):
        run(model, tmp_path / "noisy_set-gauss50-denoised", noise="none")
    (tmp_path / "noisy_set-gauss50" / images.MANIFEST).rename(tmp_path / "noisy_set-gauss50" / images.BEGUN)
    with pytest.raises(ValueError, match="not finished"):
        run(model, tmp_path / "noisy_set-gauss50", noise="none")


def test_batch_size_does_not_change_what_is_written_but_for_rounding(model, tree, tmp_path):
    for size in (1, 8):
        run(model, tree, "--output", tmp_path / str(size), "--batch-size", size)
    for relative in images.list_images(tmp_path / "1"):
        a, b = (read_image(tmp_path / size / relative).astype(int) for size in "18")
        assert np.abs(a - b).max() <= 1


def test_killed_ten_times_it_ends_with_the_same_tree(tmp_path, model, monkeypatch):
    for i in range(132):
        write_image(tmp_path / f"set/train/x{i}.png", random_image(40, 56, i))
    monkeypatch.setattr(denoise, "BLOCK", 6)  # 22 batches of six
    run(model, tmp_path / "set", "--output", tmp_path / "whole", "--batch-size", 1)
    target = tmp_path / "killed"
    argv = ["--model", model, "--data", tmp_path / "set", "--noise", "gauss50", "--output", target,
            "--batch-size", 1, "--workers", 2]  # fmt: skip
    argv = [str(word) for word in argv]
    kills, calls = 0, []

    def two_batches(*arguments):
        """So that ten runs, however quick, cannot get to the end of 22 batches before the last of them is killed."""
        calls.append(1)
        if len(calls) > 2:
            time.sleep(killing.SECONDS)
        return denoise_images(*arguments)

    for killed in range(10):
        before = sum(1 for _ in target.rglob("*.png"))
        with monkeypatch.context() as patch:
            patch.setattr(denoise, "denoise_images", two_batches)
            child = killing.start(denoise.main, argv, tmp_path / "log")
        more = before + killed % 6  # from the first image of a batch to the last
        alive = killing.wait_for(lambda more=more: sum(1 for _ in target.rglob("*.png")) > more, child)
        kills += killing.end(child, signal.SIGKILL if alive else None) == -signal.SIGKILL
    assert kills == 10, (tmp_path / "log").read_text()
    assert not (target / "manifest.json").exists()
    assert killing.end(killing.start(denoise.main, argv, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert killing.contents(target) == killing.contents(tmp_path / "whole")


def test_shards_share_the_tree_and_the_last_one_finishes_it(model, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(denoise, "BLOCK", 3)
    run(model, tree, "--output", tmp_path / "one")
    run(model, tree, "--output", tmp_path / "many", "--shard", "1/3")
    assert "images of other shards still to come" in capsys.readouterr().out
    assert images.read_manifest(tmp_path / "many") is None
    for rank in ("0", "2"):
        monkeypatch.setitem(os.environ, "RANK", rank)
        monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
        run(model, tree, "--output", tmp_path / "many")
    assert killing.contents(tmp_path / "one") == killing.contents(tmp_path / "many")


def test_finished_trees_are_skipped_and_other_models_refused(model, tree, tmp_path, capsys):
    run(model, tree)
    target = tree.parent / "noisy_set-gauss50-denoised"
    stamps = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    run(model, tree)
    assert "finished already: 10 images" in capsys.readouterr().out
    (tree / "train/n0/new.png").write_bytes((tree / "train/n0/x0.png").read_bytes())
    run(model, tree)
    assert images.read_manifest(target)["count"] == 11
    unchanged = [path for path, stamp in stamps.items() if path.suffix and path.stat().st_mtime_ns == stamp]
    assert len(unchanged) == 7, "only the batch of the new image is done again"
    torch.save(make_network(seed=1).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="was made with denoiser 'n2n .*remove it or choose another output"):
        run(tmp_path / "other.pth", tree)
    with pytest.raises(ValueError, match="noise_seed 0, not 1"):
        run(model, tree, "--noise-seed", 1)


def test_a_finished_tree_of_replaced_images_is_refused(model, tree):
    run(model, tree)
    first = sorted(tree.rglob("*.png"))[0]
    first.write_bytes(first.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"was made from \d+ images \w+, its source now has \d+ images \w+; remove it"):
        run(model, tree)


def test_the_oxford_and_paris_form(model, tmp_path):
    folder = tmp_path / "datasets/roxford5k/jpg"
    folder.mkdir(parents=True)
    Image.fromarray(random_image(30, 41)).save(folder / "all_souls_000013.jpg")
    (tmp_path / "datasets/roxford5k/gnd_roxford5k.pkl").write_bytes(b"left alone")
    assert run(model, tmp_path / "datasets/roxford5k", noise="shot3") == 0
    target = tmp_path / "datasets/noisy_roxford5k-shot3-denoised"
    assert read_image(target / "jpg/all_souls_000013.png").shape == (30, 41, 3)


def test_other_denoisers(tree, tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    smooth = np.tile(np.linspace(60, 180, 48).astype(np.uint8)[:, None, None], (1, 48, 3))
    write_image(tmp_path / "smooth/x.png", smooth)
    for noise in ("gauss25", "shot10"):
        argv = ["--denoiser", "nlm", "--data", tmp_path / "smooth", "--noise", noise, "--workers", 0]
        assert denoise.main([str(word) for word in argv]) == 0
        noisy = read_noisy(tmp_path / "smooth", "x.png", NoiseSpec.parse(noise), 0)
        denoised = read_image(tmp_path / f"noisy_smooth-{noise}-denoised/x.png")
        errors = [np.square(image.astype(float) - smooth).mean() for image in (noisy, denoised)]
        assert errors[1] < errors[0] / 2
    (tmp_path / "mine.py").write_text(
        "class Invert:\n"
        "    channels, multiple, reach, identity = 3, 1, 0, 'invert'\n"
        "    def __init__(self, spec, model, device, precision): pass\n"
        "    def denoise(self, batch): return 1 - batch\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run("-", tree, "--denoiser", "mine:Invert", "--output", tmp_path / "out", noise="none")
    clean = read_image(tree / "train/n0/x0.png")
    assert np.array_equal(read_image(tmp_path / "out/train/n0/x0.png"), 255 - clean)
    for name in ("bm3d", "mine:Missing", "nowhere:Class"):
        with pytest.raises(ValueError, match=f"--denoiser {name} is neither"):
            run("-", tree, "--denoiser", name, "--output", tmp_path / "x")


# --- bad input ------------------------------------------------------------------------------------------------------
def test_broken_images_are_all_named_and_the_rest_is_done(model, tree, capsys):
    whole = (tree / "train/n0/x0.png").read_bytes()
    (tree / "train/n0/cut.png").write_bytes(whole[: len(whole) // 2])
    (tree / "val/n0/empty.jpg").touch()
    (tree / "val/n0/text.png").write_text("hello")
    assert run(model, tree, workers=2) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in ("cut.png", "empty.jpg", "text.png", "3 images could not be denoised"))
    target = tree.parent / "noisy_set-gauss50-denoised"
    assert len(images.existing_images(target)) == 10 and images.read_manifest(target) is None
    for name in ("train/n0/cut.png", "val/n0/empty.jpg", "val/n0/text.png"):
        (tree / name).unlink()
    assert run(model, tree) == 0 and images.read_manifest(target)["count"] == 10


def test_what_cannot_work_is_said_before_anything_is_written(model, tree, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    for path, options, reason in (
        (model, ["--noise", "foo"], "gauss37.5"),
        (tmp_path / "none.pth", [], "none.pth is missing"),
        (model, ["--output", tree], "separate"),
        (model, ["--output", tree / "train" / "x"], "separate"),
        (model, ["--data", tmp_path / "nowhere"], "nowhere is missing"),
        (model, ["--shard", "3/3"], "not i/n"),
        (model, ["--batch-size", "0"], "at least 1"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(path, tree, *options)
    assert sorted(tmp_path.rglob("*")) == before
    (tree / "train/n0/x0.webp").touch()
    with pytest.raises(ValueError, match="x0.png and train/n0/x0.webp|x0.webp and"):
        run(model, tree)


def test_ctrl_c_and_a_full_disk_leave_whole_files_only(model, tmp_path):
    for i in range(200):
        write_image(tmp_path / f"set/x{i}.png", random_image(40, 56, i))
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = ["--model", str(model), "--data", str(tmp_path / "set"), "--noise", "gauss50", "--workers", "2"]
    target = tmp_path / "noisy_set-gauss50-denoised"
    child = killing.start(denoise.main, argv, tmp_path / "log")
    assert killing.wait_for(lambda: sum(1 for _ in target.rglob("*.png")) > 3, child)
    assert killing.end(child, signal.SIGINT) == 130 and "Traceback" not in (tmp_path / "log").read_text()
    assert not (target / "manifest.json").exists() and not list(target.rglob("*.tmp-*"))
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk]).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        argv += ["--output", str(disk / "out")]
        assert killing.end(killing.start(denoise.main, argv, tmp_path / "log")) == 2
        log = (tmp_path / "log").read_text()
        assert "No space left on device" in log and "Traceback" not in log
        assert not list(disk.rglob("*.tmp-*")) and not list(disk.rglob("manifest.json"))
        for path in disk.rglob("*.png"):
            read_image(path)
    finally:
        subprocess.run(["umount", disk])
