"""What scales the values of files to [0, 1]: the rules, what is estimated, and trees that keep their depth."""

import json
import re

import numpy as np
import pytest
import tifffile
from omegaconf import OmegaConf
from PIL import Image

from dinov2.config import load_config, load_run_config
from dinov2.data.dataset import dataset_from_config, resolve_values
from Neighbor2Neighbor import denoise
from Neighbor2Neighbor import train as denoiser
from tests.dinov2.train.tiny import settings
from utils import generate_noise
from utils import values as values_module
from utils.images import ImageError, list_images, read_image, read_manifest
from utils.values import Values, is_deep, resolve, rule_for_reading

RNG = np.random.default_rng(0)
SCENE = np.add.outer(np.arange(32), np.arange(40)) / 70  # [0, 1]


def save(root, arrays) -> list[str]:
    root.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        tifffile.imwrite(root / f"{number}.tif", array)
    return list_images(root)


def test_a_rule_reads_back_from_its_text():
    for text in ("full", "range=[0,4095]", "range=[-1000,3000.5]", "log=[0.001,20]", "range=[0,1048575]",
                 "range=[-0.123456789,1e+22]", "log=[1e-07,1.04858e+06]"):  # fmt: skip
        assert str(Values.parse(text)) == text
    for text in ("fll", "range", "range=[3,3]", "range=[a,b]", "range=[1,inf]", "log=[0,4]", "log=[2,1]", "range=[1]"):
        with pytest.raises(ValueError, match="values '.*(write auto, full|must be finite)"):
            Values.parse(text)


@pytest.mark.parametrize("array", [
    (SCENE * 4000).astype(np.uint16), (SCENE * 3000 - 1000).astype(np.int16), (SCENE * 1e9).astype(np.int32),
    (SCENE * 7e-3 - 2e-3).astype(np.float32), SCENE * 1e12 + 1e14,
])  # fmt: skip
def test_range_keeps_the_depth_and_gives_the_units_back(array):
    values = Values("range", float(array.min()), float(array.max()))
    scaled = values(array)
    assert scaled.dtype == np.float32 and scaled.min() == 0 and scaled.max() == 1
    step = (float(array.max()) - float(array.min())) * 1e-6
    assert np.abs(values.restore(scaled).astype(np.float64) - array).max() <= max(step, np.abs(array).max() * 1e-7)


def test_log_makes_products_sums():
    values, x = Values("log", 1.0, 1000.0), np.geomspace(1, 1000, 31, dtype=np.float32)
    assert np.allclose(np.diff(values(x)), 1 / 30, atol=1e-6)
    assert np.allclose(values.restore(values(x)), x, rtol=1e-5) and values(np.zeros((2, 2), np.uint8)).max() == 0


def test_nan_is_the_median_and_infinity_the_end():
    x = np.array([[0.0, np.nan, 4.0], [2.0, np.inf, -np.inf]])
    assert np.array_equal(Values("range", 0, 4)(x), np.float32([[0, 0.5, 1], [0.5, 1, 0]]))
    with pytest.raises(ValueError, match="all of its values are NaN"):
        Values("range", 0, 4)(x * np.nan)


AUTO = {
    "eight": ((SCENE * 255).astype(np.uint8), "full", "8 bits"),
    "twelve": ((SCENE * 4000).astype(np.uint16), "range=[0,4095]", "uint16 up to 4000, 12 bits"),
    "sixteen": ((SCENE * 65535).astype(np.uint16), "full", "16 bits"),
    "unit": (SCENE.astype(np.float32), "full", r"floats in \[0, 1\]"),
    "signed": ((SCENE * 2000 - 1000).astype(np.int16), "range=", "int.* from -1000 to 1000"),
    "float": ((SCENE * 30 - 5).astype(np.float32), "range=", "float32 from -5 to 25"),
    "holes": (np.where(SCENE > 0.5, np.nan, SCENE).astype(np.float32), "range=", "48.* NaN"),
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_decides_and_says_why(tmp_path, name):
    array, text, reason = AUTO[name]
    names = save(tmp_path / "set", [array, array[::-1].copy()])
    values, sentence = resolve("auto", tmp_path / "set", names, 1)
    assert str(values).startswith(text)
    assert re.search(f"^values: .*auto: .*{reason}.*, by 2 images", sentence), sentence
    image = read_image(tmp_path / "set" / names[0], 1, "native", values)
    assert image.min() < 0.01 and image.max() > 0.97 and is_deep(tmp_path / "set", names, 1) == (name != "eight")
    if name == "eight":
        assert image.dtype == np.uint8 and np.array_equal(image[:, :, 0], array)


def test_a_given_range_of_many_digits_is_that_of_the_trees_made_with_it(tmp_path):
    names = save(tmp_path / "scans", [(SCENE * 2**20).astype(np.int32)])
    text = "range=[0,1048575]"  # 20 bits
    generate_noise.main(["--source", str(tmp_path / "scans"), "--noise", "gauss50", "--channels", "1", "--workers", "0",
                         "--format", "npy", "--values", text])  # fmt: skip
    noisy = tmp_path / "noisy_scans-gauss50"
    assert resolve(text, noisy, list_images(noisy), 1)[0] == resolve(text, tmp_path / "scans", names, 1)[0]


def test_dark_sixteen_bits_are_stretched(tmp_path):
    array = (SCENE * 500).astype(np.uint16)
    array[3, 3] = 60000  # one hot pixel
    values, sentence = resolve("auto", tmp_path / "a", save(tmp_path / "a", [array] * 3), 1)
    assert values.kind == "range" and 480 < values.high < 520 and "99.9 % of the values are at most" in sentence


def test_an_estimate_holds_no_more_than_the_pixels_that_it_looks_at(tmp_path, monkeypatch):
    monkeypatch.setattr(values_module, "PIXELS", 100)
    names = save(tmp_path / "set", [AUTO["eight"][0]] * 3)
    for array in values_module._read_sample(tmp_path / "set", names, 1, 2**20):
        assert array.base is None and 50 < len(array) <= 100
    np.save(tmp_path / "bands.npy", np.zeros((40, 40, 20), np.uint16))
    (array,) = values_module._read_sample(tmp_path, ["bands.npy"], 20, 2**20)
    assert array.size <= 400


@pytest.mark.parametrize("name", ["x.npy", "x.tif"])
def test_complex_numbers_are_refused_and_not_cut_to_their_real_part(tmp_path, name):
    array = (SCENE + 1j * SCENE).astype(np.complex64)
    (np.save if name == "x.npy" else tifffile.imwrite)(tmp_path / name, array)
    for text in ("auto", "percentile"):
        with pytest.raises(ImageError, match=rf"{name} holds complex64, no real numbers; save its amplitude"):
            resolve(text, tmp_path, [name], 1)
    with pytest.raises(ImageError, match=f"{name} holds complex64"):
        read_image(tmp_path / name, 1, "native", Values("range", 0, 1))


def test_what_no_rule_fits_is_named(tmp_path):
    mixed = save(tmp_path / "mixed", [(SCENE * 255).astype(np.uint8), (SCENE * 4000).astype(np.uint16)])
    with pytest.raises(ValueError, match="mixed: 8-bit files lie beside uint16 up to 4000: .*give range"):
        resolve("auto", tmp_path / "mixed", mixed, 1)
    flat = save(tmp_path / "flat", [np.full((8, 8), 7, np.int16)])
    with pytest.raises(ValueError, match="flat: values=percentile needs values that differ"):
        resolve("percentile", tmp_path / "flat", flat, 1)
    with pytest.raises(
        ImageError, match="0.tif.*its values are int32; set data.values of a run and --values of a tool"
    ):
        read_image(tmp_path / "flat" / save(tmp_path / "flat", [np.full((8, 8), -7, np.int16)])[0], 1)
    with pytest.raises(ValueError, match=r"data.values: values 'bright' is not known; write auto"):
        load_config(["data.values=bright", "data.root=x", "output_dir=y"])
    assert load_config(["data.values=range=[0,4095]", "data.root=x", "output_dir=y"]).data["values"] == "range=[0,4095]"


def test_a_run_saved_before_the_key_reads_as_it_did(tmp_path):
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create({"data": {"root": "x"}})))
    assert load_run_config(tmp_path).data["values"] == "full"


# --- the same rule in every tool ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["twelve", "signed"])
def test_denoised_and_noisy_copies_keep_the_depth(tmp_path, kind, capsys):
    """Of 12 bits in 16 and of int16: what came back had 17 and 2 grey levels."""
    array = AUTO[kind][0].astype(np.int16 if kind == "signed" else np.uint16)
    noise = (RNG.normal(0, 80, (6, *array.shape))).astype(array.dtype.newbyteorder("=") if kind == "signed" else int)
    low, high = (-1200, 1200) if kind == "signed" else (0, 4095)
    root = tmp_path / "scans"
    for split in ("train", "val"):
        save(root / split / "a", [np.clip(array + one, low, high).astype(array.dtype) for one in noise])
    options = ["--data", str(root), "--noise", "none", "--channels", "1", "--steps", "2", "--batch-size", "2", "--crop",
               "16", "--depth", "2", "--init-scale", "1", "--precision", "fp32", "--workers", "0"]  # fmt: skip
    denoiser.main([*options, "--output", str(tmp_path / "n2n")])
    chosen = json.loads((tmp_path / "n2n/config.json").read_text())["values"]
    assert f"values: {chosen} (auto: " in capsys.readouterr().out and chosen.startswith("range=")
    model = ["--model", str(tmp_path / "n2n/unet.pth"), "--data", str(root), "--noise", "none", "--workers", "0"]
    assert denoise.main([*model, "--output", str(tmp_path / "out")]) == 0
    made = read_manifest(tmp_path / "out")
    assert made["format"] == "npy" and made["values"] == chosen
    copy = np.load(tmp_path / "out/train/a/0.npy")
    assert copy.dtype == np.float32 and len(np.unique(copy)) > 500
    with pytest.raises(ValueError, match="was trained with values range=.*, not full; leave --values out"):
        denoise.main([*model, "--output", str(tmp_path / "other"), "--values", "full"])
    cfg = load_config(settings(root, tmp_path / "run", "noise=none", "data.in_chans=1", "data.mean=[0.5]",
                               "data.std=[0.2]", f"data.denoised_root={tmp_path / 'out'}"))  # fmt: skip
    images, _ = dataset_from_config(cfg, "val", ("noisy", "denoised"))[0]
    assert all(image.dtype == np.float32 and len(np.unique(image)) > 500 for image in images)
    values, sentence = resolve_values(cfg)
    assert str(values) == chosen and "out was made with" in sentence
    cfg.data["values"] = "range=[0,9000]"
    with pytest.raises(ValueError, match="out was made with values range=.*, but range=.0,9000. is configured"):
        dataset_from_config(cfg, "val", ("denoised",))


def test_noise_while_loading_and_on_disk_are_the_same_with_values(tmp_path):
    root = tmp_path / "scans"
    save(root / "train", [AUTO["signed"][0]] * 2)
    generate_noise.main(["--source", str(root), "--noise", "gauss50", "--channels", "1", "--format", "npy",
                         "--output-root", str(tmp_path), "--workers", "0"])  # fmt: skip
    noisy = tmp_path / "noisy_scans-gauss50"
    cfg = load_config(settings(root, tmp_path / "run", "noise=gauss50", "data.in_chans=1", "data.mean=[0.5]",
                               "data.std=[0.2]"))  # fmt: skip
    cfg.data.storage = "on_the_fly"
    loading = dataset_from_config(cfg, "train")[1][0][0]
    cfg.data.storage = "disk"
    assert np.array_equal(dataset_from_config(cfg, "train")[1][0][0], loading)
    values, sentence = resolve("auto", noisy, list_images(noisy), 1)
    assert str(values) == read_manifest(noisy)["values"] and rule_for_reading(values, noisy).kind == "full"
    assert "was made with" in sentence
    with pytest.raises(ValueError, match=r"was made with values range=.*, not range=\[0,1\]"):
        resolve("range=[0,1]", noisy, list_images(noisy), 1)


def test_trees_of_eight_bits_name_no_values(tmp_path):
    (tmp_path / "set").mkdir()
    Image.fromarray((SCENE * 255).astype(np.uint8)).save(tmp_path / "set/x.png")
    generate_noise.main(["--source", str(tmp_path / "set"), "--noise", "gauss50", "--workers", "0"])
    assert "values" not in read_manifest(tmp_path / "noisy_set-gauss50")


def test_mixed_channel_counts_are_named_counted_and_left_out_on_request(tmp_path, capsys):
    root = tmp_path / "set"
    root.mkdir()
    for number, channels in enumerate((5, 5, 2, 5)):
        np.save(root / f"{number}.npy", RNG.integers(0, 256, (20, 20, channels), dtype=np.uint8))
    noise = ["--source", str(root), "--noise", "gauss50", "--channels", "5", "--format", "npy", "--workers", "0"]
    with pytest.raises(ValueError, match=r"set mixes images of several channel counts \(1 of 2, 3 of 5.*data.mixed"):
        generate_noise.main(noise)
    assert generate_noise.main([*noise, "--mixed", "keep"]) == 0
    assert "3 of 4 images have 5 channels; left out: 1 of 2 (such as 2.npy)" in capsys.readouterr().out
    five = ["data.in_chans=5", "data.mean=[0.5,0.5,0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2,0.2,0.2]", "data.mixed=keep"]
    dataset = dataset_from_config(load_config(settings(root, tmp_path / "run", *five)), "train")
    assert dataset.relatives == ["0.npy", "1.npy", "3.npy"] and dataset[2][0][0].shape == (20, 20, 5)
    with pytest.raises(ValueError, match="0 of 4 images have 7 channels; left out: 1 of 2 .*Ask for another number"):
        generate_noise.main([*noise, "--channels", "7", "--mixed", "keep"])
    train = ["--data", str(root), "--noise", "none", "--output", str(tmp_path / "n2n"), "--channels", "5", "--steps",
             "1", "--batch-size", "1", "--crop", "16", "--depth", "2", "--workers", "0"]  # fmt: skip
    denoiser.main([*train, "--mixed", "keep"])
    denoise.main(["--data", str(root), "--noise", "none", "--model", str(tmp_path / "n2n/unet.pth"), "--output",
                  str(tmp_path / "out"), "--mixed", "keep", "--format", "npy", "--workers", "0"])  # fmt: skip
    assert read_manifest(tmp_path / "out")["count"] == 3
