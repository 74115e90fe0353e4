"""Pretrains by any method: the curriculum's stages one after another, finished ones skipped, a killed one resumed.

python -m dinov2.train OVERLAY... key=value...
python -m dinov2.train imagenet100 nct noise=gauss255 data.root=mini-imagenet output_dir=runs/nct-gauss255
torchrun --nproc-per-node 4 -m dinov2.train imagenet1k nct noise=gauss255 data.root=imagenet output_dir=runs/nct-1k
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack

from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

from dinov2 import checkpoint
from dinov2.config import load_config, load_run_config, overlay_help, save_run_config
from dinov2.eval.features import extract
from dinov2.eval.knn import accuracies
from dinov2.models.pretrained import load_pretrained
from dinov2.train import curriculum
from dinov2.train.curriculum import Stage
from dinov2.train.ssl_model import SSLModel
from dinov2.train.trainer import Trainer
from utils import cli, distributed
from utils.environment import record_environment
from utils.locks import locked

LIVE_K = 20  # neighbours of the live kNN figure, where eval.knn.k has it: the k of the tables
# Sections and keys that a resumed run may change: they do not decide what is computed.
CHANGEABLE = ("eval", "train.checkpoint_every", "train.keep_last", "train.log_every", "train.knn_every",
              "train.on_collapse", "data.workers", "data.resident", "data.index_cache", "data.max_pixels",
              "train.compile", "train.activation_checkpointing", "output_dir", "data.root", "data.noisy_root",
              "data.denoised_root", "data.storage", "curriculum", "anchor.run", "method", "trial",
              "train.eval_every")  # fmt: skip


def check_resumable(stage: Stage) -> None:
    """A folder with a run of other settings is refused: mixing two runs would make neither."""
    if not (stage.run / "config.yaml").exists() or checkpoint.latest(stage.run) is None:
        return
    old, new = (OmegaConf.to_container(c, resolve=True) for c in (load_run_config(stage.run), stage.cfg))
    if not stage.anchor:  # nothing of it is used: nct shares the denoised run of an nc with another anchor
        old["anchor"] = new["anchor"]
    for key in CHANGEABLE:
        *path, last = key.split(".")
        for content in (old, new):
            for part in path:
                content = content[part]
            content.pop(last, None)
    for section in new:
        if old.get(section) != new[section]:
            keys = [section]
            a, b = old.get(section), new[section]
            if isinstance(b, dict):
                inner = [k for k in b if (a or {}).get(k) != b[k]]
                keys, a, b = [section, inner[0]], a.get(inner[0]), b[inner[0]]
            key = ".".join(keys)
            raise ValueError(f"{stage.run} holds a run with {key}={a}, this one has {b}: choose another output_dir")


def start_fresh(stage: Stage, model: SSLModel, optimizer: Optimizer) -> None:
    curriculum.initialise(stage, model, optimizer)
    if stage.init == "scratch" and stage.cfg.model.pretrained:
        load_pretrained(model.student["backbone"], stage.cfg.model.pretrained)
        load_pretrained(model.teacher["backbone"], stage.cfg.model.pretrained)
        if distributed.is_main():
            epochs = stage.cfg.optim.head_warmup_epochs
            source = stage.cfg.model.pretrained
            print(f"backbone from {source}; heads start fresh, alone for {epochs} epochs", flush=True)


def live_knn(stage: Stage) -> Callable[[nn.Module], float | None]:
    """backbone → kNN accuracy on the stage's own view. Here, where both are wired: train and eval know no other.

    None, said once, where there are no classes or no validation images.
    """
    cfg = OmegaConf.merge(stage.cfg, {"eval": {"view": "noisy" if stage.view == "mix" else stage.view}})
    k = LIVE_K if LIVE_K in cfg.eval.knn.k else min(cfg.eval.knn.k)
    missing: list[str] = []

    def measure(backbone: nn.Module) -> float | None:
        if missing:
            return None
        try:
            train, val = extract(backbone, cfg, "train"), extract(backbone, cfg, "val")
        except ValueError as error:
            missing.append(str(error))
            if distributed.is_main():
                print(f"no live kNN: {error}", flush=True)
            return None
        near = min(k, len(train.labels))
        return accuracies(train, val, [near], cfg.eval.knn.temperature)[near]["top1"]

    return measure


def build_trainer(stage: Stage) -> Trainer:
    """The stage's trainer, as it stands before its next step: fresh, or at its last checkpoint."""
    return Trainer(
        stage.cfg,
        curriculum.build_model(stage),
        curriculum.dataset(stage),
        stage.stop_epoch,
        stage.keep,
        prepare=lambda model: curriculum.load_anchor(stage, model),
        start_fresh=lambda model, optimizer: start_fresh(stage, model, optimizer),
        live_knn=live_knn(stage),
    )


def run_stage(stage: Stage) -> None:
    if stage.finished:
        if distributed.is_main():
            print(f"{stage.run}: finished (epoch {stage.stop_epoch}), skipped", flush=True)
        return
    check_resumable(stage)
    if distributed.is_main():
        save_run_config(stage.cfg, stage.run)
        record_environment(stage.run)
        print(f"{stage.run}: {stage.view} images to epoch {stage.stop_epoch} of {stage.cfg.train.epochs}", flush=True)
    build_trainer(stage).fit()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.train",
        description=__doc__,
        epilog=f"overlays (a scale, then a method):\n{overlay_help()}\n\nAll keys: dinov2/configs/default.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", help="overlays by name or path, then key=value")
    cfg = load_config(parser.parse_args(arguments).settings)
    distributed.init()
    try:
        stages = curriculum.plan(cfg)
        curriculum.check_inputs(stages)
        for stage in stages:
            if not stage.finished:
                check_resumable(stage)
        with ExitStack() as locks:
            distributed.on_main(lambda: [locks.enter_context(locked(s.run)) for s in stages if not s.finished])
            for stage in stages:
                run_stage(stage)
    finally:
        distributed.close()


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
