"""The curriculum as a plan of stages: what is trained on which view, for how long, and from which weights.

    for stage in plan(cfg): train(stage)

The baseline is a plan of one stage. NC has two: the truncated start of a denoised schedule, then a restart on noisy
images, with a fresh optimiser, fresh schedules and a fresh iteration count over the remaining epochs. NCT anchors the
second stage. A stage whose folder already holds its last epoch is finished: one denoised run serves n2n, nc and nct.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from dinov2 import checkpoint
from dinov2.config import anchor_source, load_run_config, stage_end, stage_overrides
from dinov2.data.dataset import ImageDataset, Mix, dataset_from_config
from dinov2.objectives import OBJECTIVES, Objective
from dinov2.train import identity
from dinov2.train.anchor import can_be_anchored, with_anchor
from dinov2.train.optim import load_optimizer_state, optimizer_state
from utils import distributed
from utils.images import changed_folders, read_manifest
from utils.nested import escaped, flatten
from utils.noise import NoiseSpec

# Keys and sections in which a stage and the run that it builds on must agree.
SHARED = ("objective", "model", "dino", "ibot", "coding_rate", "projector", "crops", "seed")


@dataclass(frozen=True)
class Stage:
    """One stage. cfg: its whole configuration, saved with its run."""

    cfg: DictConfig
    view: str  # noisy | denoised | clean | mix
    mix: tuple[float, float] | None  # fraction of denoised images at the start and the end of the stage
    stop_epoch: int  # of its schedule of cfg.train.epochs
    run: Path
    init: str  # scratch | restart | continue
    source: Path | None  # run that it starts from
    from_epoch: int | None
    anchor: tuple[Path, int | None] | None  # run and epoch of the frozen teacher; or a file of weights and None
    keep: tuple[int, ...]  # epochs kept beside those of train.eval_every: later stages start from them
    is_last_stage: bool = True  # the one that the command is about; earlier ones are runs of their own

    @property
    def finished(self) -> bool:
        return {*self.keep} <= {c.epoch for c in checkpoint.list_kept(self.run)}


def check_objective(cfg: DictConfig) -> None:
    """ValueError where the objective refuses a setting or an anchor; nothing is computed."""
    if any(entry.get("anchor") for entry in cfg.curriculum.stages) and not can_be_anchored(cfg.objective):
        able = ", ".join(name for name in OBJECTIVES if can_be_anchored(name))
        why = "learns from no teacher's targets, which an anchor (nct) could give too"
        raise ValueError(f"objective={cfg.objective} {why}: take nc, or an objective of {able}")
    OBJECTIVES[cfg.objective].check(cfg)


def plan(cfg: DictConfig) -> list[Stage]:
    entries = cfg.curriculum.stages
    check_objective(cfg)
    anchors = {number: anchor_source(cfg, number) for number, entry in enumerate(entries) if entry.get("anchor")}
    stages: list[Stage] = []
    for number, entry in enumerate(entries):
        before = entries[number - 1] if number else None
        is_last_stage = number + 1 == len(entries)
        # A stage trains up to the last epoch that a later one starts from or is anchored to.
        keep = {stage_end(entry)} | {epoch for run, epoch in anchors.values() if run == str(Path(entry.dir))}
        if not is_last_stage:
            keep.add(entries[number + 1].get("from_epoch") or stage_end(entry))
        if entry.view == "denoised":
            # A denoised run also serves curricula that are trained later: keep the epochs that they start from.
            later = (cfg.curriculum.restart_epoch, None if cfg.anchor.pretrained else cfg.anchor.epoch)
            keep |= {epoch for epoch in later if epoch and epoch <= stage_end(entry)}
        stages.append(
            Stage(
                cfg=_stage_config(cfg, entry, is_last_stage),
                view=entry.view,
                mix=tuple(entry.mix) if entry.get("mix") else None,
                stop_epoch=max(keep),
                run=Path(entry.dir),
                init=entry.get("init") or "scratch",
                source=Path(before.dir) if before else None,
                from_epoch=entry.get("from_epoch") or (stage_end(before) if before else None),
                anchor=(Path(anchors[number][0]), anchors[number][1]) if number in anchors else None,
                keep=tuple(sorted(keep)),
                is_last_stage=is_last_stage,
            )
        )
    return stages


def _stage_config(cfg: DictConfig, entry: DictConfig, is_last_stage: bool) -> DictConfig:
    """The run's config with this stage's schedule, noise and changes.

    An earlier stage is a run of its own, and its saved config says so: the denoised one is an n2n run.
    """
    changes = {"train.epochs": entry.epochs, "noise": entry.get("noise") or cfg.noise}
    if (entry.get("init") or "scratch") != "scratch":
        changes["optim.head_warmup_epochs"] = 0  # the heads are no longer fresh
    stage = stage_overrides(stage_overrides(cfg, changes), entry.get("set") or {})
    if not is_last_stage:
        method = entry.get("method") or {"denoised": "n2n", "clean": "clean"}.get(entry.view, "dinov2")
        only = {key: entry[key] for key in ("view", "epochs", "dir", "mix", "init", "anchor") if entry.get(key)}
        own = {"denoised_dir": entry.dir, "stages": [only]}
        stage = OmegaConf.merge(stage, escaped({"method": method, "output_dir": entry.dir, "curriculum": own}))
    return stage


def build_model(stage: Stage) -> Objective:
    """The stage's objective with fresh weights (of the seed); anchored when the stage is."""
    torch.manual_seed(stage.cfg.seed)
    objective = OBJECTIVES[stage.cfg.objective]
    if not stage.anchor:
        return objective(stage.cfg)
    cfg = stage.cfg.anchor
    weight = cfg.weights[str(NoiseSpec.parse(stage.cfg.noise))]
    return with_anchor(objective)(stage.cfg, weight, cfg.weight_end, own_head=cfg.head == "frozen")


def initialise(stage: Stage, model: Objective, optimizer: torch.optim.Optimizer) -> None:
    """A fresh start of the stage (not a resume) from the weights of the stage before.

    A restart takes over student, teacher and centres, `continue` also the optimiser's moments. Schedules and the
    iteration count are this stage's own either way.
    """
    if stage.init == "scratch":
        return
    _check_same(stage.cfg, stage.source)
    source = checkpoint.at_epoch(stage.source, stage.from_epoch)
    carried = {n: v for n, v in model.checkpoint_state().items() if not n.startswith("anchor")}
    state = {"model": carried}
    if stage.init == "continue":
        state["optimizer"] = optimizer_state(model.student, optimizer)
    checkpoint.load(source, state)
    if stage.init == "continue":
        load_optimizer_state(model.student, optimizer, state["optimizer"])
    what = "student, teacher, centres" + (" and optimiser" if stage.init == "continue" else "")
    distributed.print_on_main(f"starts from {source.path} (epoch {source.epoch}): {what}")


def load_anchor(stage: Stage, model: Objective) -> None:
    """Reads the frozen teacher from the run it comes from: at a fresh start and at every resume."""
    if not stage.anchor:
        return
    run, epoch = stage.anchor
    if epoch is None:
        model.load_anchor_file(run)
        distributed.print_on_main(f"anchored to the backbone of {run}")
        return
    _check_same(stage.cfg, run)
    source = checkpoint.at_epoch(run, epoch)
    model.load_anchor(source)
    distributed.print_on_main(f"anchored to the teacher of {source.path} (epoch {source.epoch})")


def _check_same(cfg: DictConfig, run: Path) -> None:
    """ValueError that names the first of the SHARED settings that the run has otherwise."""
    here, there = (flatten(OmegaConf.to_container(each)) for each in (cfg, load_run_config(run)))
    if wrong := [key for key in here if identity.is_within(key, SHARED) and here[key] != there.get(key)]:
        key, section = wrong[0], wrong[0].partition(".")[0]
        difference = f"{key}={there.get(key)} there, {here[key]} here"
        raise ValueError(f"{run} was trained with another {section} section than this run: {difference}")


def make_dataset(stage: Stage) -> ImageDataset:
    """Training images of the stage: its view and, for an anchor, the denoised view beside it."""
    views = (stage.view, "denoised") if stage.anchor else (stage.view,)
    iterations = stage.stop_epoch * stage.cfg.train.epoch_length
    mix = Mix(*stage.mix, iterations, stage.cfg.seed) if stage.mix else None
    return dataset_from_config(stage.cfg, "train", views, mix)


def check_inputs(stages: list[Stage]) -> None:
    """Checks, before anything is trained, that each stage has what it needs.

    The folders hold these runs or none, the checkpoint of an anchor from another run exists and fits, the images can be
    listed, and the denoised ones are complete and up to date.
    """
    own = [stage.run for stage in stages]
    for stage in stages:
        identity.check(stage)
        _check_kept(stage)
        if stage.finished:
            identity.check(stage, _finished_images(stage))
            continue
        if stage.anchor and stage.anchor[1] is not None and stage.anchor[0] not in own:
            _check_same(stage.cfg, stage.anchor[0])
            checkpoint.at_epoch(*stage.anchor)
        images = make_dataset(stage)
        if "denoised" in images.twins:
            _check_denoised(images.twins["denoised"], images)
        identity.check(stage, images)


def _finished_images(stage: Stage) -> ImageDataset | None:
    """The images of a finished run, to compare them; None if they have been removed since."""
    try:
        return make_dataset(stage)
    except ValueError as error:
        held = load_run_config(stage.run).data
        if any(held[key] != stage.cfg.data[key] for key in ("root", "denoised_root")):
            raise
        distributed.print_on_main(f"{stage.run}: its images are not looked at: {error}")
        return None


def _check_kept(stage: Stage) -> None:
    """ValueError if a run is past an epoch that this one needs, and has not kept it."""
    checkpoints = checkpoint.list_checkpoints(stage.run)
    kept = [c.epoch for c in checkpoints if c.evaluate]
    lost = [epoch for epoch in stage.keep if epoch not in kept and checkpoints and epoch <= checkpoints[-1].epoch]
    if lost:
        past = f"is past epoch {lost[0]}, which this run needs, and did not keep it"
        way = "set curriculum.restart_epoch to one of these, or train it anew in another folder"
        raise ValueError(f"{stage.run} {past} (kept: {', '.join(map(str, kept)) or 'none'}): {way}")


def _check_denoised(tree: Path, images: ImageDataset) -> None:
    advice = "run python -m Neighbor2Neighbor.denoise over it once more, or name another tree by data.denoised_root"
    if read_manifest(tree) is None:
        raise ValueError(f"{tree} is not finished (it has no manifest.json): {advice}")
    made = (tree / "manifest.json").stat().st_mtime
    if changed := changed_folders(images.root, images.relatives, made):
        replaced = "; where images were replaced, remove it first"
        raise ValueError(f"{tree} is older than its source: {changed[0]} changed since it was made; {advice}{replaced}")
