"""The training as a user runs it: it learns, it sees noisy pixels alone, it goes on where it was killed."""

import json
import os
import signal
import socket
import subprocess
import time

import numpy as np
import pytest
import torch

from Neighbor2Neighbor import data, train
from Neighbor2Neighbor.denoisers import UNetDenoiser, denoise_images
from Neighbor2Neighbor.metrics import psnr
from Neighbor2Neighbor.unet import UNet, load_unet
from tests import killing
from tests.conftest import ROOT
from utils import generate_noise
from utils.images import write_image
from utils.noise import NoiseSpec
from utils.results import read_json_lines

# Small and quick: 16 px crops, 2 poolings, 3 epochs of 4 steps.
OPTIONS = ["--noise", "gauss50", "--crop", "16", "--depth", "2", "--batch-size", "4", "--epochs", "3", "--steps", "12",
           "--workers", "0", "--precision", "fp32", "--init-scale", "1"]  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    """Ramps of 24 px, all bytes below 100."""
    rng = np.random.default_rng(0)
    for i in range(8):
        ramp = np.add.outer(np.arange(24), np.arange(24))[:, :, None] * rng.random(3) * 2
        write_image(tmp_path / f"set/{'val' if i == 7 else 'train'}/n0/x{i}.png", ramp.astype(np.uint8))
    return tmp_path / "set"


def run(tree, output, *options) -> int:
    return train.main(["--data", str(tree), "--output", str(output), *OPTIONS, *options])


def weights(output) -> dict:
    return torch.load(output / "unet.pth", weights_only=True)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_it_says(tree, tmp_path):
    clean = tmp_path / "clean"
    for i in range(3):
        write_image(clean / f"{'AB'[i % 2]}/{i}.png", np.full((20, 13, 3), 90 + 20 * i, np.uint8))
    assert run(tree, tmp_path / "run", "--val-clean", str(clean), "--val-every", "2") == 0
    rows = read_json_lines(tmp_path / "run/metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3] and [row["step"] for row in rows] == [4, 8, 12]
    assert [row["lambda"] for row in rows] == pytest.approx([2 / 3, 4 / 3, 2])
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss_rec"] + row["lambda"] * row["loss_reg"])
    assert [("psnr" in row) for row in rows] == [False, True, True]
    mean = (2 * rows[-1]["A_psnr"] + rows[-1]["B_psnr"]) / 3
    assert rows[-1]["psnr"] == pytest.approx(mean) and 0 < rows[-1]["ssim"] < 1
    assert rows[-1]["noisy_psnr"] == rows[1]["noisy_psnr"], "the noise of the validation changes"
    assert {path.name for path in (tmp_path / "run/samples").iterdir()} == {"epoch_0002.png", "epoch_0003.png"}
    assert list((tmp_path / "run/tensorboard").glob("events.out.tfevents*"))
    assert json.loads((tmp_path / "run/config.json").read_text())["noise"] == "gauss50"
    assert load_unet(tmp_path / "run/unet.pth").depth == 2


def test_clean_images_are_scaled_as_those_of_the_training(tmp_path):
    """Of 12 bits: read with 16, they were nearly black."""
    deep = np.add.outer(np.arange(24), np.arange(24)).astype(np.uint16) * 80
    for name in ("set/0.npy", "set/1.npy", "clean/0.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, deep)
    args = train.parse_arguments(["--data", str(tmp_path / "set"), "--output", str(tmp_path / "run"), *OPTIONS,
                                  "--channels", "1", "--values", "range=[0,4095]", "--val-clean",
                                  str(tmp_path / "clean")])  # fmt: skip
    training = train.Training(args, ["0.npy", "1.npy"], 16)
    seen = training.crops.read("0.npy", spec=NoiseSpec.parse("none"))
    assert np.array_equal(training.validation.images["0.npy"], seen) and seen.max() > 0.8


def test_it_learns_to_denoise(tree, tmp_path):
    """After some seconds the held-out image is nearer to the clean one than its noisy copy by more than 3 dB."""
    run(tree, tmp_path / "run", "--steps", "300", "--epochs", "10", "--lr", "1e-3")
    clean = data.read_image(tree / "val/n0/x7.png")
    noisy = data.read_noisy(tree, "val/n0/x7.png", NoiseSpec.parse("gauss50"), 0)
    denoiser = UNetDenoiser(load_unet(tmp_path / "run/unet.pth"), torch.device("cpu"), "fp32")
    (denoised,) = denoise_images(denoiser, [noisy], torch.device("cpu"), 1024)
    assert psnr(denoised, clean) > psnr(noisy, clean) + 3


def test_no_clean_pixel_is_read(tree, tmp_path, monkeypatch):
    """The noise function is replaced by one that answers with bytes which no image holds; the network, wherever it is
    called, must see these alone. The images' own bytes lie below 100.
    """
    asked, seen = set(), []

    def marked(image, spec, seed, key):
        assert image.max() < 100 and (str(spec), seed) == ("gauss50", 3)
        asked.add(key)
        return np.full_like(image, 200) + (len(asked) % 50)

    def watched(network, batch):
        seen.append(batch.detach().clone())
        return forward(network, batch)

    forward = UNet.forward
    monkeypatch.setattr(data, "keyed_noise", marked)
    monkeypatch.setattr(UNet, "forward", watched)
    run(tree, tmp_path / "run", "--noise-seed", "3")
    assert asked == {f"train/n0/x{i}" for i in range(7)}
    assert len(seen) == 24 and min(float(batch.min()) for batch in seen) * 255 >= 200


def test_a_noisy_tree_and_noise_while_loading_train_the_same_network(tree, tmp_path):
    generate_noise.main(["--source", str(tree), "--noise", "gauss50", "--workers", "0"])
    run(tree, tmp_path / "loading")
    run(tmp_path / "noisy_set-gauss50", tmp_path / "tree", "--noise", "none")
    assert same(weights(tmp_path / "loading"), weights(tmp_path / "tree"))


def test_seeds_make_a_difference_and_repeat(tree, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run(tree, tmp_path / name, "--seed", seed)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_killed_at_any_step_it_ends_as_if_it_had_not_been(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)  # a checkpoint after every step
    run(tree, tmp_path / "whole", "--workers", "2")
    argv = ["--data", str(tree), "--output", str(tmp_path / "killed"), *OPTIONS, "--workers", "2"]
    step, kills = train.Training.train_step, 0
    for stop in (2, 3, 5, 6, 9, 11):
        reached = tmp_path / f"step_{stop}"

        def halt(training, crops, stop=stop, reached=reached):
            if training.step == stop:
                reached.touch()
                time.sleep(killing.SECONDS)
            return step(training, crops)

        with monkeypatch.context() as patch:
            patch.setattr(train.Training, "train_step", halt)
            child = killing.start(train.main, argv, tmp_path / "log")
        alive = killing.wait_for(reached.exists, child)
        kills += alive and killing.end(child, signal.SIGKILL) == -signal.SIGKILL
        assert alive, (tmp_path / "log").read_text()
    assert kills == 6 and not (tmp_path / "killed/unet.pth").exists()
    assert killing.end(killing.start(train.main, argv, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    rows = [read_json_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert rows[0] == rows[1] and len(rows[0]) == 3


def test_ctrl_c_is_one_line(tree, tmp_path):
    argv = ["--data", str(tree), "--output", str(tmp_path / "run"), *OPTIONS, "--steps", "5000"]
    child = killing.start(train.main, argv, tmp_path / "log")
    assert killing.wait_for(lambda: (tmp_path / "run/config.json").exists(), child)
    assert killing.end(child, signal.SIGINT) == 130
    log = (tmp_path / "log").read_text()
    assert "interrupted" in log and "Traceback" not in log
    assert not (tmp_path / "run/unet.pth").exists() and not list((tmp_path / "run").glob("*.tmp-*"))


def test_a_full_disk_is_one_line_and_nothing_half_written(tree, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        argv = ["--data", str(tree), "--output", str(disk / "run"), *OPTIONS]
        assert killing.end(killing.start(train.main, argv, tmp_path / "log")) == 2
        log = (tmp_path / "log").read_text()
        assert "No space left on device" in log and "Traceback" not in log
        left = {path.name for path in (disk / "run").iterdir() if path.name != "tensorboard"}
        assert left == {"config.json", "metrics.jsonl"}
    finally:
        subprocess.run(["umount", disk])


def test_a_diverged_training_stops(tree, tmp_path):
    with pytest.raises(ValueError, match="no longer finite in epoch 1; use a smaller --lr"):
        run(tree, tmp_path / "run", "--lr", "1e30")
    assert not (tmp_path / "run/checkpoint.pth").exists()


def test_two_processes_train_as_one(tree, tmp_path, monkeypatch):
    run(tree, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = ["--data", str(tree), "--output", str(tmp_path / "two"), *OPTIONS]
    children = []
    for rank in range(2):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                            "MASTER_PORT": port}.items():  # fmt: skip
            monkeypatch.setitem(os.environ, name, str(value))
        children.append(killing.start(train.main, argv, tmp_path / "log"))
    assert [killing.end(child) for child in children] == [0, 0], (tmp_path / "log").read_text()
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4
    losses = [[row["loss"] for row in read_json_lines(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_schedule_is_the_published_one():
    schedule = train.Schedule(steps=1000, epochs=100, lr=3e-4, increase_ratio=2.0)
    assert [schedule.rate(step) / 3e-4 for step in (0, 199, 200, 400, 600, 800, 999)] == [
        1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16,
    ]  # fmt: skip
    assert [schedule.epoch(step) for step in (0, 9, 10, 999)] == [1, 1, 2, 100]
    assert schedule.weight(0) == pytest.approx(0.02) and schedule.weight(999) == 2
    assert [step for step in range(35) if schedule.ends_epoch(step)] == [9, 19, 29] and schedule.ends_epoch(999)


def test_a_finished_run_is_skipped_and_a_changed_one_refused(tree, tmp_path, capsys):
    run(tree, tmp_path / "run")
    stamp = (tmp_path / "run/unet.pth").stat().st_mtime_ns
    run(tree, tmp_path / "run")
    assert "finished already" in capsys.readouterr().out
    assert (tmp_path / "run/unet.pth").stat().st_mtime_ns == stamp
    for options, reason in (
        (["--noise", "shot3"], "noise 'gauss50', not 'shot3'"),
        (["--lr", "1"], "lr 0.0003, not 1.0"),
        (["--steps", "13"], "steps 12, not 13"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with {reason}"):
            run(tree, tmp_path / "run", *options)
    first = tree / "train/n0/x0.png"
    whole = first.read_bytes()
    first.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="holds a run with images '7 images"):
        run(tree, tmp_path / "run")
    first.write_bytes(whole)
    tree.rename(tmp_path / "elsewhere")
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "elsewhere").rename(tmp_path / "moved" / "set")
    run(moved, tmp_path / "run")
    assert "finished already" in capsys.readouterr().out, "the same images at another place"


def test_damaged_weights_are_written_anew_and_a_damaged_checkpoint_is_named(tree, tmp_path, capsys):
    run(tree, tmp_path / "run")
    path, whole = tmp_path / "run/unet.pth", (tmp_path / "run/unet.pth").read_bytes()
    place = whole.index(b"nin_c.weight") // 2
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"unet\.pth can't be read as a torch file: the checksum of its part"):
        load_unet(path)
    run(tree, tmp_path / "run")
    assert "unet.pth can't be read" in capsys.readouterr().err and path.read_bytes() == whole
    state = (tmp_path / "run/checkpoint.pth").read_bytes()
    place = len(state) // 2
    (tmp_path / "run/checkpoint.pth").write_bytes(state[:place] + bytes([state[place] ^ 1]) + state[place + 1 :])
    with pytest.raises(
        ValueError, match=r"checkpoint\.pth cannot be taken up \(.*the checksum of its part .*remove it"
    ):
        run(tree, tmp_path / "run")


def test_config_files(tree, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("epochs: 7\nsides: [16, 512]\ncompile: false\nval_clean: null\n")
    args = train.parse_arguments(["--config", str(config), "--data", "d", "--noise", "shot1", "--output", "o"])
    assert (args.epochs, args.sides, args.crop) == (7, (16, 512), 256)
    args = train.parse_arguments(["--data", "d", "--noise", "shot1", "--output", "o", "--config", str(config),
                                  "--epochs", "9"])  # fmt: skip
    assert args.epochs == 9
    for name in ("published", "imagenet1k"):
        shipped = ROOT / "Neighbor2Neighbor" / f"{name}.yaml"
        args = train.parse_arguments(["--config", str(shipped), "--data", "d", "--noise", "shot1", "--output", "o"])
        assert (args.epochs, args.sides, args.lr, args.depth) == (100, (256, 512), 3e-4, 5)
    assert (args.subset, args.batch_size) == (100_000, 8)
    run(tree, tmp_path / "run")
    again = ["--config", str(tmp_path / "run/config.json"), "--output", str(tmp_path / "again")]
    assert train.main(again) == 0 and same(weights(tmp_path / "run"), weights(tmp_path / "again"))


def test_impossible_options_are_refused(tree, tmp_path):
    for options, reason in (
        (["--noise", "gauss"], "gauss37.5"),
        (["--depth", "5"], "--crop 16 is too small for --depth 5"),
        (["--data", str(tmp_path / "nowhere")], "nowhere is missing"),
        (["--batch-size", "0"], "--batch-size 0 must be above 0"),
        (["--lr", "nan"], "--lr nan must be above 0"),
        (["--val-clean", str(tree), "--noise", "none"], "--val-noise"),
        (["--config", str(tmp_path / "none.yaml")], "cannot be read|no readable"),
        (["--seed", "-1"], "negative"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(tree, tmp_path / "run", *options)
    with pytest.raises(ValueError, match="--output is missing"):
        train.main(["--data", str(tree), "--noise", "gauss50"])


def test_unreadable_images_and_checkpoints_are_named(tree, tmp_path):
    (tree / "train/n0/x3.png").write_bytes((tree / "train/n0/x3.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="x3.png"):
        run(tree, tmp_path / "run")
    assert not (tmp_path / "run/unet.pth").exists()
    (tmp_path / "run/checkpoint.pth").write_bytes(b"cut")
    with pytest.raises(ValueError, match="checkpoint.pth cannot be taken up"):
        run(tree, tmp_path / "run")
