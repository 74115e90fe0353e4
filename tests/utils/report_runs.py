"""Folders of runs as training and evaluation write them, with figures made up for the tests of the report."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

from utils.images import denoised_root, list_images, read_image, write_image
from utils.noise import ALL_NOISES, NoiseSpec
from utils.results import append_json, append_result

FINAL = {"dinov2": 51.0, "nc": 60.5, "nct": 64.0, "n2n": 66.2, "clean": 81.3}
FLOORS = {"untrained": 30.0, "pixels": 45.0, "public": 58.0}
NOISE = "gauss255"
IMAGES = 400
ARCHITECTURE = "vit_small, depth 12, patch 16, 3 channels"


def make_images(root: Path, count: int = 6, side: int = 96) -> Path:
    """A tree root/val/<class>/<image> of smooth coloured pictures, and its denoised twin."""
    rng = np.random.default_rng(0)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        picture = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
        write_image(root / f"val/class_{i % 2}/{i}.png", picture)
        blurred = np.asarray(small.resize((3, 3)).resize((side, side), Image.Resampling.BICUBIC))
        write_image(denoised_root(root, NoiseSpec.parse(NOISE)) / f"val/class_{i % 2}/{i}.png", blurred)
    return root


def details_of(value: float, draw: int = 0, images: int = IMAGES, **changes) -> dict:
    """Details of an accuracy of `value` percent: which images were right is drawn by `draw`, harder ones less often."""
    hard = np.argsort(np.arange(images) / images + np.random.default_rng(draw).uniform(0, 0.5, images))
    correct = np.zeros(images, dtype=np.uint8)
    correct[hard[: round(value * images / 100)]] = 1
    bits = base64.b64encode(np.packbits(correct)).decode()
    known = {"images": images, "classes": 10, "crop": 224, "architecture": ARCHITECTURE, "correct": bits}
    return {"seconds": 12.0} | known | changes


def make_floor(
    folder: Path,
    method: str,
    data: Path,
    value: float | None = None,
    view: str = "noisy",
    seed: int = 0,
    noise: str = NOISE,
    **details,
) -> Path:
    """<folder>/floors/<noise>-<view>/<method>; `details` replace those of its rows."""
    value = FLOORS[method] if value is None else value
    name = f"untrained-{seed}" if method == "untrained" else method
    path = folder / f"floors/{noise}-{view}" / name
    stage = {"view": view, "epochs": 20, "dir": str(path), "init": "scratch"}
    data_keys = {"root": str(data), "name": None}
    config = {"method": method, "noise": noise, "seed": seed, "data": data_keys, "curriculum": {"stages": [stage]}}
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    for metric, offset in (("linear_top1", 0), ("knn20_top1", -8)):
        own = {"architecture": "pixels"} if method == "pixels" else {}
        row = {
            "method": method, "noise": noise, "dataset": data.name, "seed": seed, "epoch": 0, "iteration": 0,
            "metric": metric, "value": value + offset, "view": view, "protocol": "exact",
            "details": details_of(value + offset, 10 + seed) | own | details,
        }  # fmt: skip
        append_result(path / "results.jsonl", row)
    return path


def make_run(
    path: Path,
    method: str,
    data: Path,
    final: float | None = None,
    seed: int = 0,
    noise: str = NOISE,
    epochs: int = 20,
    collapsed: str = "",
    trial: bool = False,
) -> Path:
    """One run's folder; its accuracy rises to `final` over `epochs`. collapsed: its state in the second half."""
    final = FINAL[method] if final is None else final
    rng = np.random.default_rng(sum(map(ord, method)) + seed)
    restart = method in ("nc", "nct")
    stages = (
        [{"view": "denoised", "epochs": 20, "stop": 12, "dir": str(path.parent / "n2n"), "init": "scratch"}]
        if restart
        else []
    )
    last = epochs - 12 if restart else epochs
    view = {"n2n": "denoised", "clean": "clean"}.get(method, "noisy")
    stages.append(
        {"view": view, "epochs": last, "stop": None, "dir": str(path), "init": "restart" if restart else "scratch"}
    )
    noise = "none" if method == "clean" else noise
    config = {
        "method": method, "noise": noise, "seed": seed, "output_dir": str(path), "trial": trial,
        "dino": {"prototypes": 1024}, "eval": {"crop": 224},
        "data": {"root": str(data), "name": None, "noise_seed": 0, "in_chans": 3, "denoised_root": None},
        "curriculum": {"stages": stages},
    }  # fmt: skip
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    append_json(path / "metrics.jsonl", {"iteration": 0, "epoch": 0, "live_knn_top1": 30.0})
    for step in range(last * 10):
        share = step / (last * 10)
        told = 0.0 if collapsed and share >= 0.5 else 0.3 * share
        row = {
            "iteration": step, "epoch": step / 10, "koleo_loss": 0.3 - 0.1 * share,
            "total_loss": 9 - 4 * share + 0.1 * rng.standard_normal(),
            "lr": 0.004 * np.cos(1.57 * share), "teacher_entropy": 6 - share,
            "information_cls_ratio": told, "information_patches_ratio": told / 2, "log_prototypes": math.log(1024),
            "target_entropy_cls": (1 - told) * math.log(1024), "target_entropy_of_mean_cls": math.log(1024),
            "collapsed": collapsed if share >= 0.5 else "",
            "images_per_s": 400 + 9 * rng.standard_normal(), "seconds": 3.0, "gpu_memory_gb": 7.5,
        }  # fmt: skip
        append_json(path / "metrics.jsonl", row | ({"anchor_ibot_loss": 7 - 3 * share} if method == "nct" else {}))
    base = {"method": method, "dataset": data.name, "seed": seed, "protocol": "exact"}
    for epoch in range(2, last + 1, 2):
        value = final - (15 if not restart else 6) * (1 - epoch / last) ** 1.5 + 0.3 * rng.standard_normal()
        append_json(path / "metrics.jsonl", {"iteration": epoch * 10, "epoch": epoch, "live_knn_top1": value - 9})
        for metric, offset in (("linear_top1", 0), ("knn10_top1", -9), ("knn20_top1", -8)):
            row = base | {
                "noise": noise,
                "epoch": epoch,
                "iteration": epoch * 10,
                "metric": metric,
                "value": value + offset,
                "view": view,
            }
            append_result(path / "results.jsonl", row | {"details": details_of(value + offset, seed)})
    levels = {"none": 0.0, **{name: 0.3 + 0.7 * i / 8 for i, name in enumerate(ALL_NOISES)}}
    for name, level in levels.items():
        for metric, offset in (("robustness_knn20_top1", -8), ("robustness_linear_top1", 0)):
            value = final + 12 - 25 * level + offset
            row = base | {
                "noise": name,
                "epoch": last,
                "iteration": last * 10,
                "metric": metric,
                "value": value,
                "view": "noisy",
            }
            append_result(path / "results.jsonl", row)
    if data.is_dir():
        _make_pca(path, method, data)
    if method in ("nct", "n2n"):
        _make_retrieval(path, base, view, last, final)
    return path


def _make_pca(path: Path, method: str, data: Path) -> None:
    rng = np.random.default_rng(1)
    views = {"n2n": ["clean", "noisy", "denoised"], "clean": ["clean"]}.get(method, ["clean", "noisy"])
    names = [f"val/{relative}" for relative in list_images(data / "val")[:3]]
    clean = np.stack([read_image(data / name) for name in names])
    images = np.stack([clean, rng.integers(0, 256, clean.shape, dtype=np.uint8), clean][: len(views)], axis=1)
    grid = np.stack([clean[:, ::8, ::8], 255 - clean[:, ::8, ::8], clean[:, ::8, ::8]][: len(views)], axis=1)
    np.savez(path / "pca.npz", names=np.array(names), views=np.array(views), images=images, components=grid)


def _make_retrieval(path: Path, base: dict, view: str, epoch: int, final: float) -> None:
    for level, offset in (("easy", 0), ("medium", -15), ("hard", -35)):
        details = {"mean_precision_at": {"1": 60.0, "5": 50.0, "10": 45.0}}
        row = base | {
            "dataset": "roxford5k",
            "protocol": "box",
            "noise": NOISE,
            "epoch": epoch,
            "iteration": epoch * 10,
            "view": view,
        }
        append_result(
            path / "results.jsonl", row | {"metric": f"map_{level}", "value": final + offset, "details": details}
        )
    rng = np.random.default_rng(2)
    found = []
    for i, kind in enumerate(["query", "easy", "easy", "hard", "wrong", "easy", "wrong", "hard"]):
        write_image(path / f"retrieval/roxford5k/{i}.png", rng.integers(0, 256, (104, 104, 3), dtype=np.uint8))
        found.append({"name": f"oxford_{i:06d}", "kind": kind, "picture": f"roxford5k/{i}.png"})
    content = {"dataset": "roxford5k", "rankings": [{"query": found[0], "found": found[1:]}] * 2}
    (path / "retrieval/roxford5k.json").write_text(json.dumps(content))


def make_runs(folder: Path) -> list[Path]:
    """The five systems of the paper on one small tree, on their floors."""
    data = make_images(folder / "mini-set")
    for method in FLOORS:
        for view, more in (("noisy", 0), ("denoised", 8), ("clean", 20)):
            make_floor(folder / "runs", method, data, FLOORS[method] + more, view)
    return [make_run(folder / "runs" / method, method, data) for method in FINAL]
