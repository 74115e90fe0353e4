"""The whole method on images of five channels and 16 bits, which no PNG holds: noise, denoiser, NC, NCT, evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import dinov2
from dinov2.data.dataset import ImageDataset
from dinov2.data.loader import ResidentImages, make_loader
from dinov2.eval import common, knn, linear, pca
from dinov2.export import main as export
from dinov2.train.__main__ import main as pretrain
from Neighbor2Neighbor import denoise
from Neighbor2Neighbor import train as denoiser
from Neighbor2Neighbor.data import Crops, read_noisy
from Neighbor2Neighbor.data import make_loader as crop_loader
from tests.dinov2.train.tiny import settings
from utils import generate_noise, images
from utils.noise import NoiseSpec
from utils.report import __main__ as report
from utils.results import read_json_lines, read_results
from utils.sampler import IterationSampler

GAUSS, NONE = NoiseSpec.parse("gauss50"), NoiseSpec.parse("none")
FIVE = ["data.in_chans=5", "data.mean=[0.5,0.5,0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2,0.2,0.2]"]


def make_tree(root: Path, number: int = 5) -> Path:
    """root/{train,val}/{a,b}/: by turns .npy [H, W, 5], TIFF of five pages and TIFF of five samples a pixel, uint16."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for c, name in enumerate("ab"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(number):
                coarse = rng.integers(0, 1 << 16, (5, 6, 5), dtype=np.uint16).repeat(4, axis=0).repeat(4, axis=1)
                image = coarse // 2 + rng.integers(0, 1 << 14, coarse.shape, dtype=np.uint16) + (c << 14)
                if i % 3 == 0:
                    np.save(folder / f"{i}.npy", image.astype(np.uint16))
                elif i % 3 == 1:
                    tifffile.imwrite(folder / f"{i}.tif", image.astype(np.uint16).transpose(2, 0, 1))
                else:
                    pixels = {"photometric": "minisblack", "planarconfig": "contig"}
                    tifffile.imwrite(folder / f"{i}.tif", image.astype(np.uint16), **pixels)
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("five") / "cells")


def run(tool, *argv) -> int:
    return tool.main([str(word) for word in argv])


def train_denoiser(tree: Path, output: Path, *more) -> Path:
    options = ["--channels", 5, "--steps", 2, "--epochs", 2, "--batch-size", 2, "--crop", 16, "--depth", 2,
               "--init-scale", 1, "--precision", "fp32", "--workers", 0]  # fmt: skip
    run(denoiser, "--data", tree, "--noise", "gauss50", "--output", output, *options, *more)
    return output / "unet.pth"


def test_the_noisy_tree_holds_what_loading_gives(tree, tmp_path):
    run(generate_noise, "--source", tree, "--noise", "gauss50", "shot3", "--channels", 5, "--format", "npy",
        "--output-root", tmp_path, "--workers", 0)  # fmt: skip
    for name in ("gauss50", "shot3"):
        spec, noisy = NoiseSpec.parse(name), tmp_path / f"noisy_cells-{name}"
        assert images.read_manifest(noisy)["format"] == "npy"
        loading = ImageDataset(tree, "train", ("noisy", "clean"), spec, channels=5)
        disk = ImageDataset(tree, "train", ("noisy",), spec, channels=5, storage="disk", noisy=noisy)
        for i, relative in enumerate(loading.relatives):
            stored = np.load(images.twin(noisy, relative, ".npy"))
            (drawn, clean), _ = loading[i]
            assert stored.dtype == drawn.dtype == np.float32 and np.array_equal(stored, drawn)
            assert np.array_equal(stored, disk[i][0][0]) and stored.shape == (20, 24, 5)
            assert np.array_equal(stored, read_noisy(tree, relative, spec, 0, 5))
            assert np.array_equal(stored, read_noisy(noisy, relative.rpartition(".")[0] + ".npy", NONE, 0, 5))
            assert len(np.unique(clean)) > 2000, "an 8-bit round trip would leave 256 values"


def test_deep_images_are_rounded_after_the_noise_where_the_format_has_8_bits(tmp_path):
    deep = np.arange(20 * 24, dtype=np.uint16).reshape(20, 24) * 130
    (tmp_path / "grey").mkdir()
    tifffile.imwrite(tmp_path / "grey/x.tif", deep)
    for form in ("png", "npy"):
        run(generate_noise, "--source", tmp_path / "grey", "--noise", "gauss50", "--channels", 1, "--format", form,
            "--output-root", tmp_path / form, "--workers", 0)  # fmt: skip
    exact = images.read_image(tmp_path / "npy/noisy_grey-gauss50/x.npy", 1, "native")
    rounded = images.read_image(tmp_path / "png/noisy_grey-gauss50/x.png", 1, "native")
    assert rounded.dtype == np.uint8 and np.array_equal(rounded, np.rint(exact * 255))


def test_crops_stay_deep_and_mix_with_8_bits(tree, tmp_path):
    crops = Crops(tree, ["train/a/0.npy", "train/a/1.tif"], GAUSS, 0, 16, 5)
    (batch,) = crop_loader(crops, IterationSampler(2, 2, stop_iteration=1), 0, False)
    assert batch.dtype == torch.float32 and batch.shape == (2, 5, 16, 16)
    assert 0 <= batch.min() and batch.max() <= 1 and len(batch.unique()) > 1500
    np.save(tmp_path / "deep.npy", np.full((16, 16, 5), 257 * 60, np.uint16))
    np.save(tmp_path / "flat.npy", np.full((16, 16, 5), 60, np.uint8))
    crops = Crops(tmp_path, ["deep.npy", "flat.npy"], NONE, 0, 16, 5)
    (batch,) = crop_loader(crops, IterationSampler(2, 2, stop_iteration=1), 0, False)
    assert torch.allclose(batch, torch.tensor(60 / 255))


def test_wrong_channels_are_said_before_anything_is_written(tree, tmp_path, capsys):
    for tool in (generate_noise, denoise):
        more = ["--channels", 5] if tool is generate_noise else ["--model", train_denoiser(tree, tmp_path / "n2n")]
        place = ["--source", tree] if tool is generate_noise else ["--data", tree, "--output", tmp_path / "out"]
        before = sorted(tree.parent.rglob("*"))
        with pytest.raises(ValueError, match="--format webp holds 1 or 3 channels, not 5; use --format npy"):
            run(tool, *place, "--noise", "gauss50", "--format", "webp", "--workers", 0, *more)
        assert sorted(tree.parent.rglob("*")) == before and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="has 5 channels of 20 x 24 px, not 3; set data.in_chans .*--channels"):
        run(denoiser, "--data", tree, "--noise", "gauss50", "--output", tmp_path / "three", "--crop", 16, "--depth", 2,
            "--workers", 0)  # fmt: skip
    with pytest.raises(ValueError, match="--channels 0 must be"):
        run(denoiser, "--data", tree, "--noise", "gauss50", "--output", tmp_path / "none", "--channels", 0)


def test_the_denoiser_goes_on_bit_for_bit_and_writes_float(tree, tmp_path, monkeypatch):
    """Two steps at once, and two with a kill between them; then the denoised tree, 8-bit and deep validation."""
    validation = ["--val-clean", tree, "--val-every", 1]
    whole = train_denoiser(tree, tmp_path / "whole", *validation)
    rows = read_json_lines(tmp_path / "whole/metrics.jsonl")
    assert len(rows) == 2 and 5 < rows[1]["noisy_psnr"] < 25 and np.isfinite(rows[1]["psnr"])
    assert (tmp_path / "whole/samples/epoch_0002.png").is_file()
    step = denoiser.Training.train_step

    def once(training, crops):
        if training.step == 1:
            raise KeyboardInterrupt
        return step(training, crops)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(denoiser.Training, "train_step", once)
        train_denoiser(tree, tmp_path / "again", *validation)
    again = train_denoiser(tree, tmp_path / "again", *validation)
    one, two = (torch.load(path, weights_only=True) for path in (whole, again))
    assert one["enc_conv0.weight"].shape[1] == 5 and all(torch.equal(one[name], two[name]) for name in one)
    assert rows == read_json_lines(tmp_path / "again/metrics.jsonl")
    out = tmp_path / "denoised"
    assert run(denoise, "--model", whole, "--data", tree, "--noise", "gauss50", "--output", out, "--format", "npy",
               "--workers", 0) == 0  # fmt: skip
    written = [np.load(out / name) for name in images.list_images(out)]
    assert len(written) == 20 and all(array.dtype == np.float32 and array.shape == (20, 24, 5) for array in written)
    assert all(0 <= array.min() and array.max() <= 1 for array in written)
    assert max(len(np.unique(array)) for array in written) > 500


def test_pretraining_evaluation_and_report(tree, tmp_path):
    """The denoised copy first, then NC and NCT on the noisy images, kNN, PCA and the report."""
    model = train_denoiser(tree, tmp_path / "n2n")
    copy = tmp_path / "copy"
    run(denoise, "--model", model, "--data", tree, "--noise", "gauss50", "--output", copy, "--format", "npy",
        "--workers", 0)  # fmt: skip
    trial = ["train.epochs=2", "train.epoch_length=1", "train.eval_every=1", "curriculum.restart_epoch=1",
             "curriculum.noisy_epochs=1", "anchor.epoch=1", "teacher.warmup_temp_epochs=1", "optim.warmup_epochs=0",
             "curriculum.noisy_set.teacher.warmup_temp_epochs=1", "curriculum.noisy_set.optim.warmup_epochs=0",
             "anchor.weights.gauss50=1", f"data.denoised_root={copy}",
             f"curriculum.denoised_dir={tmp_path / 'n2n_run'}", "eval.pca.images=2",
             "eval.linear.epochs=1", "eval.linear.epoch_length=2"]  # fmt: skip
    for method in ("nc", "nct"):
        folder = tmp_path / "gauss50" / method
        assert pretrain([method, *settings(tree, folder, *FIVE, *trial)]) in (0, None)
        for name, evaluate in (("knn", knn.evaluate), ("linear", linear.evaluate), ("pca", pca.evaluate)):
            assert common.run(name, evaluate, "", lambda cfg: [cfg], [f"run={folder}"]) == 0
        assert {"knn2_top1", "linear_top1", "patch_similarity_noisy"} <= {row["metric"] for row in read_results(folder)}
        backbone = dinov2.load_backbone(folder)
        assert backbone(torch.rand(2, 5, 16, 16))["x_norm_clstoken"].shape == (2, 192)
    for form in ("huggingface", "timm"):
        export([f"run={folder}", f"format={form}", f"output={tmp_path / form}"])
        assert '": 5' in (tmp_path / form / "config.json").read_text()
    with np.load(tmp_path / "gauss50/nct/pca.npz") as file:
        assert file["images"].shape == (2, 2, 16, 16, 3)
    assert run(report, tmp_path, "--output", tmp_path / "report.html") == 0
    page = (tmp_path / "report.html").read_text()
    assert "What the models see" in page and "No pictures" not in page and ">denoised<" in page


def test_resident_images_are_those_of_the_files(tree, tmp_path):
    dataset = ImageDataset(tree, "train", ("noisy", "clean"), GAUSS, channels=5)
    resident = ResidentImages(dataset)
    for batch in make_loader(dataset, 4, stop_iteration=2):
        same = resident.batch(batch.iteration, batch.indices.tolist())
        for held, read in zip(same.canvases, batch.canvases, strict=True):
            assert held.dtype == torch.float32 and torch.equal(held, read)
