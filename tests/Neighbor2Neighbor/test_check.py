"""The check of the noise: independent, correlated, growing with the brightness; and training on every second pixel."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from Neighbor2Neighbor import check, denoise, outlook
from Neighbor2Neighbor import train as denoiser
from Neighbor2Neighbor.denoisers import NonLocalMeans, PhaseDenoiser, denoise_images
from Neighbor2Neighbor.unet import UNet
from tests.conftest import ROOT
from utils import images
from utils.noise import ALL_NOISES, NoNoise
from utils.report.check import noise_check
from utils.report.page import render_part


def scenes(root: Path, number: int = 6, noise: np.ndarray | float = 0.0) -> Path:
    """Smooth images [128, 128] of all brightnesses, amplitude 1 / f^2; uint8 or, with noise, float32."""
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
    for k in range(number):
        spectrum = np.fft.fft2(rng.normal(size=(128, 128))) / np.maximum(frequency, 1 / 128) ** 2
        image = np.real(np.fft.ifft2(spectrum))
        image = np.clip(0.5 + 0.17 * (image - image.mean()) / image.std(), 0, 1)
        image = (image * 255).astype(np.uint8) if np.isscalar(noise) else np.clip(image + noise[k], 0, 1)
        np.save(root / f"{k}.npy", image if image.dtype == np.uint8 else image.astype(np.float32))
    return root


def box_noise(width: int, number: int = 6) -> np.ndarray:
    """Noise of deviation 0.15, each pixel the mean of a box of independent ones: correlated over width - 1 pixels."""
    white = np.random.default_rng(1).normal(size=(number, 127 + width, 127 + width))
    boxes = np.lib.stride_tricks.sliding_window_view(white, (width, width), (1, 2))
    return boxes.sum((-2, -1)) / width * 0.15


def words(root: Path, *options: str, capsys) -> str:
    assert check.main([str(root), *options]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("noise", ALL_NOISES)
def test_the_nine_noises_are_independent(tmp_path, noise, capsys):
    """Also where values are clipped."""
    text = words(scenes(tmp_path / "set"), "--noise", noise, "--output", str(tmp_path / "out"), capsys=capsys)
    assert "\nindependent from pixel to pixel" in text and "JPEG" not in text
    found = json.loads((tmp_path / "out/check.json").read_text())
    assert found["noise"] == noise and max(abs(v) for row in found["correlation"].values() for v in row) < 0.08


def test_neighbours_that_share_noise_are_found_and_every_second_pixel_is_free_of_it(tmp_path, capsys):
    root = scenes(tmp_path / "set", noise=box_noise(2))
    text = words(root, "--output", str(tmp_path / "out"), capsys=capsys)
    assert "correlated over 1 pixel (0.4" in text and "--subsample 2 makes it independent" in text
    found = json.loads((tmp_path / "out/check.json").read_text())["correlation"]
    assert 0.4 < found["horizontal"][0] < 0.55 and abs(found["vertical"][1]) < 0.1  # 0.5 and 0 by construction
    assert "\nindependent from pixel to pixel" in words(root, "--subsample", "2", capsys=capsys)


def test_noise_of_a_long_reach_wants_another_denoiser(tmp_path, capsys):
    text = words(scenes(tmp_path / "set", noise=box_noise(5)), capsys=capsys)
    assert "correlated over" in text and "choose another one by --denoiser" in text and "--subsample" not in text


def test_how_noise_grows_with_the_brightness(tmp_path, capsys):
    root = scenes(tmp_path / "set")
    assert "the same at every brightness" in words(root, "--noise", "gauss25", capsys=capsys)
    assert "as speckle: values=log makes it alike" in words(root, "--noise", "speckle0.2", capsys=capsys)
    assert "as photon noise" in words(root, "--noise", "shot30", capsys=capsys)


def test_large_images_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(check, "PATCHES", 10)
    image = np.random.default_rng(0).random((64, 100, 2), np.float32)  # 4 x 6 x 2 patches
    patches, means, structure = check.flat_patches(image)
    assert len(patches) == len(means) == len(structure) == 10 and patches.base is None
    monkeypatch.setattr(outlook, "PIXELS", 10_000)
    kept = []
    assert len(list(outlook._keep_some([image] * 5, kept))) == 5 and len(kept) == 2


def test_the_files_and_the_section_of_the_report(tmp_path, capsys):
    assert noise_check(tmp_path) is None
    words(scenes(tmp_path / "set"), "--noise", "gauss50", "--output", str(tmp_path), capsys=capsys)
    section = render_part(noise_check, tmp_path)
    assert "<p>independent from pixel to pixel" in section and "data:image/png;base64," in section
    assert images.read_image(tmp_path / "check.png").std() > 10


def test_what_cannot_be_checked_is_said(tmp_path, capsys):
    (tmp_path / "flat").mkdir()
    np.save(tmp_path / "flat/x.npy", np.full((64, 64), 9, np.uint8))
    (tmp_path / "small").mkdir()
    np.save(tmp_path / "small/x.npy", np.random.default_rng(0).integers(0, 9, (8, 8), dtype=np.uint8))
    for name in ("flat", "small"):
        with pytest.raises(ValueError, match="no image holds a patch of 16 x 16 px"):
            check.main([str(tmp_path / name)])
    with pytest.raises(ValueError, match="nowhere is missing"):
        check.main([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="--values: values 'x' is not known"):
        check.main([str(tmp_path / "flat"), "--values", "x"])
    root = scenes(tmp_path / "set", 2)
    (root / "bad.png").write_bytes(b"")
    assert "bad.png is empty" in words(root, "--noise", "gauss50", capsys=capsys)


# --- every second pixel ---------------------------------------------------------------------------------------------
class Blur:
    """A denoiser whose output can be told by hand: the mean of each 2x2 block, everywhere in the block."""

    channels, multiple, reach, identity = 2, 2, 2, "blur"

    def denoise(self, batch):
        self.shape = tuple(batch.shape)
        return torch.nn.functional.avg_pool2d(batch, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_phases_are_denoised_by_themselves():
    inner = Blur()
    both, batch = PhaseDenoiser(inner, 2), torch.rand(3, 2, 8, 12)
    result = both.denoise(batch)
    assert inner.shape == (12, 2, 4, 6) and (both.multiple, both.reach) == (4, 4) and "subsample 2" in both.identity
    for y in (0, 1):
        for x in (0, 1):
            assert torch.allclose(result[:, :, y::2, x::2], inner.denoise(batch[:, :, y::2, x::2].contiguous()))
    image = np.random.default_rng(0).random((37, 50, 2)).astype(np.float32)
    whole, tiles = (denoise_images(both, [image], torch.device("cpu"), tile, False)[0] for tile in (64, 16))
    assert np.array_equal(whole, tiles) and whole.shape == image.shape


def test_training_on_every_second_pixel_is_remembered_by_the_model(tmp_path, capsys):
    root, out = scenes(tmp_path / "set", 3, box_noise(2)), tmp_path / "n2n"
    options = ["--data", str(root), "--noise", "none", "--channels", "1", "--steps", "2", "--batch-size", "2", "--crop",
               "64", "--depth", "2", "--init-scale", "1", "--precision", "fp32", "--workers", "0"]  # fmt: skip
    denoiser.main([*options, "--output", str(out), "--subsample", "2"])
    with pytest.raises(ValueError, match="holds a run with subsample 2, not 1"):
        denoiser.main([*options, "--output", str(out)])
    model = ["--model", str(out / "unet.pth"), "--data", str(root), "--noise", "none", "--workers", "0"]
    denoise.main([*model, "--output", str(tmp_path / "copy")])
    made = images.read_manifest(tmp_path / "copy")
    assert made["denoiser"].endswith("subsample 2") and made["count"] == 3
    text = words(root, "--model", str(out / "unet.pth"), capsys=capsys)
    assert "residuals of the denoiser: " in text and "(residuals)" in text and (out / "check.json").is_file()


@pytest.mark.parametrize("looked_at,multiple", [(1, 8), (2, 4)])
def test_every_second_pixel_is_not_parted_once_more_for_the_residuals(tmp_path, looked_at, multiple):
    torch.save(UNet(1, 4, 2).state_dict(), tmp_path / "unet.pth")
    (tmp_path / "config.json").write_text(json.dumps({"increase_ratio": 2.0, "subsample": 2}))
    words = ["x", "--model", str(tmp_path / "unet.pth"), "--subsample", str(looked_at)]
    denoiser, _, _ = check._load_denoiser(check.parse_arguments(words), NoNoise())
    assert denoiser.multiple == multiple


def test_the_denoiser_of_the_documentation_works(tmp_path, monkeypatch):
    text = (ROOT / "docs/denoiser.md").read_text()
    (code,) = [part for part in text.split("```python\n")[1:] if "class TotalVariation" in part]
    (tmp_path / "my_denoiser.py").write_text(code.partition("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    root = scenes(tmp_path / "set", 1, box_noise(2))
    denoise.main(["--denoiser", "my_denoiser:TotalVariation", "--data", str(root), "--noise", "none", "--workers", "0",
                  "--output", str(tmp_path / "copy")])  # fmt: skip
    noisy, copy = np.load(root / "0.npy"), np.load(tmp_path / "copy/0.npy")[:, :, 0]
    assert np.diff(copy).std() < 0.5 * np.diff(noisy).std() and copy.shape == noisy.shape


def test_another_denoiser_goes_by_phases_too(tmp_path):
    root = scenes(tmp_path / "set", 1)
    denoise.main(["--denoiser", "nlm", "--data", str(root), "--noise", "gauss50", "--subsample", "2", "--workers", "0",
                  "--output", str(tmp_path / "copy")])  # fmt: skip
    assert NonLocalMeans.channels == 3 and images.read_manifest(tmp_path / "copy")["denoiser"].endswith("subsample 2")


def test_a_plan_costs_the_denoiser_as_it_will_be_trained(tmp_path, monkeypatch, capsys):
    """On every second pixel where the verdict says so, or as asked: crops of half the side."""
    monkeypatch.setattr(outlook, "SECONDS", 0.0)
    monkeypatch.setattr(outlook, "seconds_per_step", lambda training: training.crops.side)
    root = scenes(tmp_path / "scenes", noise=box_noise(2))
    options = ["--data", str(root), "--noise", "none", "--output", "x", "--channels", "1", "--crop", "128"]
    for more, stride in ([], 2), (["--subsample", "4"], 4):
        outlook.main([*options, "--depth", "2", "--batch-size", "2", *more])
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (found["subsample"], found["step_s"]) == (stride, 128 // stride) and found["megapixel_s"] > 0
