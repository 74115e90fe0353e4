"""Pretrains by any method: the curriculum's stages one after another, finished ones skipped, a killed one resumed.

python -m dinov2.train OVERLAY... key=value...
python -m dinov2.train imagenet100 nct noise=gauss255 data.root=mini-imagenet output_dir=runs/nct-gauss255
torchrun --nproc-per-node 4 -m dinov2.train imagenet1k nct noise=gauss255 data.root=imagenet output_dir=runs/nct-1k
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack

from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

from dinov2 import checkpoint
from dinov2.config import load_config, load_defaults, overlay_help
from dinov2.data.dataset import ImageDataset, resolve_values
from dinov2.eval.features import extract
from dinov2.eval.knn import accuracies
from dinov2.models.pretrained import fit
from dinov2.models.weights import read_model_keys, read_weights
from dinov2.objectives import Objective
from dinov2.train import curriculum, identity
from dinov2.train.curriculum import Stage
from dinov2.train.trainer import Trainer
from utils import cli, distributed
from utils.environment import record_environment
from utils.images import ImageError
from utils.locks import locked, sweep

LIVE_K = 20  # neighbours of the live kNN figure, where eval.knn.k has it: the k of the tables
DEFAULT_LR = load_defaults().optim.base_lr


def start_fresh(stage: Stage, model: Objective, optimizer: Optimizer) -> None:
    curriculum.initialise(stage, model, optimizer)
    if stage.init == "scratch" and stage.cfg.model.pretrained:
        weights, epochs = read_weights(stage.cfg.model.pretrained), stage.cfg.optim.head_warmup_epochs
        for network in model.trained():
            fit(network["backbone"], weights)
        shape = ", ".join(f"{key} {value}" for key, value in weights.model.items())
        heads = f"heads start fresh, alone for {epochs} epochs"
        distributed.print_on_main(f"backbone from {weights.path}; {heads} ({shape})")


def live_knn(stage: Stage) -> Callable[[nn.Module], float | None]:
    """backbone → kNN accuracy on the stage's own view. Defined here because train and eval must not import each other.

    The accuracy is None, with a message, if there are no classes or no validation images.
    """
    cfg = OmegaConf.merge(stage.cfg, {"eval": {"view": "noisy" if stage.view == "mix" else stage.view}})
    k = LIVE_K if LIVE_K in cfg.eval.knn.k else min(cfg.eval.knn.k, default=LIVE_K)
    missing: list[str] = []

    def measure(backbone: nn.Module) -> float | None:
        if missing:
            return None
        try:
            train, val = extract(backbone, cfg, "train"), extract(backbone, cfg, "val")
        except ValueError as error:
            if isinstance(error, ImageError) and distributed.world_size() > 1:
                raise  # the ranks whose images can be read would wait for this one
            missing.append(str(error))
            distributed.print_on_main(f"no live kNN: {error}")
            return None
        near = min(k, len(train.labels))
        return accuracies(train, val, [near], cfg.eval.knn.temperature)[near]["top1"]

    return measure


def build_trainer(stage: Stage, images: ImageDataset | None = None, run_identity: str = "") -> Trainer:
    """The stage's trainer before its next step: fresh, or at its last checkpoint."""
    return Trainer(
        stage.cfg,
        curriculum.build_model(stage),
        images or curriculum.make_dataset(stage),
        stage.stop_epoch,
        stage.keep,
        prepare=lambda model: curriculum.load_anchor(stage, model),
        start_fresh=lambda model, optimizer: start_fresh(stage, model, optimizer),
        live_knn=live_knn(stage),
        identity=run_identity,
    )


def run_stage(stage: Stage) -> None:
    if stage.finished:
        if distributed.is_main():
            taken = identity.take_over(stage) if stage.is_last_stage else ""
            print(f"{stage.run}: finished (epoch {stage.stop_epoch}), skipped{taken}", flush=True)
        return
    images = curriculum.make_dataset(stage)
    identity.check(stage, images)
    run_identity = identity.record(stage, images)
    if distributed.is_main():
        record_environment(stage.run)
    epochs = f"epoch {stage.stop_epoch} of {stage.cfg.train.epochs}"
    distributed.print_on_main(f"{stage.run}: {stage.view} images to {epochs}")
    try:
        build_trainer(stage, images, run_identity).fit()
    except FloatingPointError as error:
        raise ValueError(f"{error}; {way_on(stage)}") from None


def hold(stages: list[Stage], locks: ExitStack) -> None:
    """Locks the runs that will be trained, and sweeps from the others what a kill left."""
    for stage in stages:
        if stage.finished:
            sweep(stage.run)
        else:
            locks.enter_context(locked(stage.run))


def way_on(stage: Stage) -> str:
    """What to do after a divergence: words to add to the command."""
    good = checkpoint.list_checkpoints(stage.run)
    start = f"goes on from the last good checkpoint, {good[-1].path}" if good else "starts anew: there is no checkpoint"
    rate = min(stage.cfg.optim.base_lr / 4, DEFAULT_LR)
    ways = [("optim.base_lr", f"{rate:g}")]
    if stage.cfg.train.precision != "fp32":
        ways.append(("train.precision", "fp32"))
    allow = {key: ",".join(dict.fromkeys([*stage.cfg.resume.allow, key])) for key, _ in ways}
    words = [f'{key}={value} "resume.allow=[{allow[key]}]"' for key, value in ways]
    return f"the same command {start}; add to it {', or '.join(words)}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dinov2.train",
        description=__doc__,
        epilog=f"overlays (a scale, then a method):\n{overlay_help()}\n\nAll keys: dinov2/configs/default.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", help="overlays by name or path, then key=value")
    cfg = load_config(parser.parse_args(arguments).settings, read_model_keys=read_model_keys)
    distributed.init()
    try:
        values, reason = resolve_values(cfg)
        cfg.data["values"] = str(values)  # saved with the run, so that they are not estimated again
        distributed.print_on_main(reason)
        stages = curriculum.plan(cfg)
        with ExitStack() as locks:
            distributed.on_main(lambda: hold(stages, locks))
            curriculum.check_inputs(stages)
            for stage in stages:
                run_stage(stage)
    finally:
        distributed.close()


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
