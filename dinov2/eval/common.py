"""The common command line of all evaluators: checkpoints of a run in, rows of results.jsonl out.

Each evaluator is a function `evaluate(backbone, cfg, job)` that yields (metric, value, details). A key of `details`
that is a field of the result row (noise, view, dataset, protocol) replaces the run's own; the others become the row's
details.
"""

import base64
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from dinov2.checkpoint import Checkpoint, list_kept
from dinov2.config import config_hash, load_run_config, parse_value
from dinov2.data.dataset import dataset_from_config
from dinov2.eval import EVALUATORS
from dinov2.eval.features import Features, eval_view, why_without_labels
from dinov2.keys import keys, suggest_key
from dinov2.models.pretrained import read_backbone
from utils import cli, distributed
from utils.locks import sweep
from utils.memory import keep_freed_memory
from utils.noise import NoiseSpec
from utils.progress import Progress
from utils.results import append_result, read_results, what_is_learned
from utils.text import one_line

Result = tuple[str, float, dict]  # metric, value (percent for accuracies and mAP), details
ROW_FIELDS = ("noise", "view", "dataset", "protocol")  # those that details may replace
BEST_BY = ("linear_top1", "knn20_top1", "knn10_top1", "neighbour_agreement")  # in this order
OPEN_SECTIONS = ("eval", "data", "seed", "noise")  # that an evaluation may change; the rest is what was trained
USAGE = """
  run=DIR              the run's folder
  checkpoints=WHICH    last (default) | best | all | an epoch; kept ones only
  key=value            of eval.*, data.*, seed or noise, in place of the run's; see dinov2/configs/default.yaml
Checkpoints that already have rows made with the same settings are skipped. Several GPUs: torchrun -m ...
"""


@dataclass(frozen=True)
class Job:
    """Where one evaluation writes: pictures into the run, the state for resuming into `scratch`."""

    run: Path
    checkpoint: str  # the checkpoint folder's name
    iteration: int = 0

    def scratch(self, name: str) -> Path:
        """A hidden file of this run and checkpoint."""
        return self.run / f".eval-{self.checkpoint}-{name}"


Evaluator = Callable[[nn.Module, DictConfig, Job], Iterator[Result]]


def main(
    name: str,
    evaluate: Evaluator,
    help_text: str,
    variants: Callable[[DictConfig], list[DictConfig]] = lambda cfg: [cfg],
) -> None:
    """The main program of an evaluator; `variants` gives the settings to evaluate each checkpoint with."""
    run_program(lambda argv: run(name, evaluate, help_text, variants, argv))


def run_program(program: Callable[[list[str]], int]) -> None:
    """Runs a program on the words of the command line; whatever happens, the ranks part at its end."""

    def run_and_part() -> int:
        try:
            return program(sys.argv[1:])
        finally:
            distributed.close()

    cli.run(run_and_part)


def run(name: str, evaluate: Evaluator, help_text: str, variants, argv: list[str]) -> int:
    """Evaluates the chosen checkpoints of a run, appends their rows, and prints them."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text.strip() + "\n" + USAGE)
        return 0 if argv else 2
    folder, own, overrides = parse(argv, ("checkpoints",))
    cfg = load_settings(folder, overrides)
    distributed.init()
    if distributed.is_main():
        sweep(folder)
    keep_freed_memory()
    if EVALUATORS.get(name) and (reason := why_without_labels(cfg)):
        from dinov2.eval import label_free  # here, as it imports this module

        instead = "The figures without labels are made instead (label_free)"
        distributed.print_on_main(f"{name} needs labels, but {reason}. {instead}:")
        return run("label_free", label_free.evaluate, label_free.__doc__, lambda cfg: [cfg], argv)
    chosen = choose_checkpoints(folder, own.get("checkpoints", "last"))
    jobs = [(checkpoint, variant) for checkpoint in chosen for variant in variants(cfg)]
    todo = [(checkpoint, variant) for checkpoint, variant in jobs if not is_done(folder, name, checkpoint, variant)]
    if len(todo) < len(jobs):
        done = f"{len(jobs) - len(todo)} of {len(jobs)}"
        distributed.print_on_main(f"{name}: {done} evaluations are there already, skipped")
    with Progress(len(todo), name, "evaluation", enabled=distributed.is_main() and len(todo) > 1) as bar:
        for checkpoint, variant in todo:
            backbone, _ = read_backbone(checkpoint.path)
            evaluate_backbone(folder, name, evaluate, backbone.to(distributed.device()), checkpoint, variant)
            bar.update(1)
    return 0


def parse(argv: list[str], own: tuple[str, ...]) -> tuple[Path, dict[str, str], list[str]]:
    """run=, the arguments named in `own` that are given, and the overrides.

    Raises ValueError for anything that is not key=value, and without a run.
    """
    given = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise ValueError(f"{argument!r} is not key=value; --help shows the arguments")
        given[key] = value
    if not given.get("run"):
        raise ValueError("which run? give run=DIR, the folder that training wrote")
    folder = Path(given.pop("run"))
    taken = {key: given.pop(key) for key in own if key in given}
    return folder, taken, [f"{key}={value}" for key, value in given.items()]


def load_settings(folder: Path, overrides: list[str]) -> DictConfig:
    """The run's config, changed by key=value of OPEN_SECTIONS.

    Raises ValueError naming a key that does not exist, with the nearest one that does, or a value that it cannot have.
    """
    cfg, known = load_run_config(folder), [name for name in keys() if name.split(".")[0] in OPEN_SECTIONS]
    for override in overrides:
        key, _, text = override.partition("=")
        if key not in known:
            raise ValueError(f"{key} is no key of an evaluation{suggest_key(key, known, cutoff=0.3)}")
        try:
            value = parse_value(key, text)
        except (OmegaConfBaseException, YAMLError) as error:
            raise ValueError(f"{override!r} can't be read: {one_line(error)}") from error
        keys()[key].check_kind(key, value)
        keys()[key].check_bounds(key, value)
        OmegaConf.update(cfg, key, value)
    cfg.noise = str(NoiseSpec.parse(cfg.noise))
    if cfg.eval.crop % cfg.model.patch_size:
        raise ValueError(f"eval.crop={cfg.eval.crop} is no multiple of model.patch_size={cfg.model.patch_size}")
    return cfg


def choose_checkpoints(folder: Path, which: str) -> list[Checkpoint]:
    """The run's kept checkpoints that `which` selects, in order. Raises ValueError if there are none."""
    kept = list_kept(folder)
    if not kept:
        raise ValueError(f"{folder} has no complete checkpoint to evaluate yet (checkpoints/*/teacher_checkpoint.pth)")
    if which == "all":
        return kept
    if which == "last":
        return kept[-1:]
    if which == "best":
        return [find_best(folder, kept)]
    found = [checkpoint for checkpoint in kept if str(checkpoint.epoch) == which]
    if not found:
        epochs = ", ".join(str(checkpoint.epoch) for checkpoint in kept)
        raise ValueError(f"checkpoints={which}: choose last, best, all or one of the epochs {epochs}")
    return found


def find_best(folder: Path, kept: list[Checkpoint]) -> Checkpoint:
    """The checkpoint with the best first metric of BEST_BY that there is: linear probe, else kNN, else, without labels,
    the agreement of neighbours under noise (docs/without_labels.md says why). Figures under the run's own noise, view
    and images count; only where there are none, those under others.
    """
    by_iteration = {checkpoint.iteration: checkpoint for checkpoint in kept}
    rows = [row for row in read_results(folder) if row["iteration"] in by_iteration]
    cfg = load_run_config(folder)
    own = str(NoiseSpec.parse(cfg.noise)), eval_view(cfg), dataset_name(cfg)
    rows = [row for row in rows if (row["noise"], row["view"], row["dataset"]) == own] or rows
    for metric in BEST_BY:
        candidates = [row for row in rows if row["metric"] == metric]
        if candidates:
            return by_iteration[max(candidates, key=lambda row: row["value"])["iteration"]]
    missing = f"{folder} has no linear probe, kNN or label-free figures yet"
    raise ValueError(f"checkpoints=best: {missing}; evaluate with checkpoints=all first")


PLACES = ("root", "noisy_root", "denoised_root", "storage")  # of data.*: only the images count, not where they are


def settings_hash(name: str, cfg: DictConfig) -> str:
    """Hash of what decides these figures: the run, the images by name and size, their labels, the common keys of eval.*
    and the evaluator's own section.
    """
    own = {"linear", "knn"} if name == "robustness" else {"retrieval" if name == "instance_recog" else name}
    reduced = deepcopy(cfg)
    reduced.eval = {k: v for k, v in reduced.eval.items() if not isinstance(v, DictConfig) or k in own | {name}}
    reduced.data = {k: v for k, v in reduced.data.items() if k not in PLACES}
    reduced.data.name = dataset_name(cfg)
    if name != "instance_recog":  # its images are named by eval.retrieval
        reduced.data.images = _digest_images(OmegaConf.to_yaml(cfg.data), cfg.noise, eval_view(cfg))
    return config_hash(reduced)


@cache
def _digest_images(data: str, noise: str, view: str) -> list[str]:
    """Digests of the images of both splits, and of the labels that a CSV gives them (folders are in the names); cached,
    as they are needed at each checkpoint."""
    cfg = OmegaConf.create({"data": OmegaConf.create(data), "noise": noise})
    found = []
    for split in ("train", "val"):
        try:
            images = dataset_from_config(cfg, split, views=(view,))
        except ValueError:  # an evaluator that needs this split reports it
            continue
        found += [images.digest(), *(images.digest(kind) for kind in images.twins if kind == "denoised")]
        if cfg.data.labels:
            labels = json.dumps([images.classes, images.labels.tolist()])
            found.append(hashlib.sha256(labels.encode()).hexdigest()[:12])
    return found


def dataset_name(cfg: DictConfig) -> str:
    return cfg.data.name or Path(cfg.data.root).resolve().name


def is_done(folder: Path, name: str, checkpoint: Checkpoint, cfg: DictConfig) -> bool:
    """Whether the run's results have the rows of this evaluation, with these settings and on these images."""
    mark = {"evaluator": name, "settings": settings_hash(name, cfg)}
    mark |= {"identity": checkpoint.identity} if checkpoint.identity else {}
    rows = [row["details"] for row in read_results(folder) if row["iteration"] == checkpoint.iteration]
    whole = [details for details in rows if details.get("last") and details.get("evaluator") == name]
    if any(mark.items() <= details.items() for details in whole):
        return True
    if whole:
        why = "the existing rows are of other images or settings; evaluated again"
        distributed.print_on_main(f"{name}, epoch {checkpoint.epoch}: {why}")
    return False


def evaluate_backbone(
    folder: Path, name: str, evaluate: Evaluator, backbone: nn.Module, checkpoint: Checkpoint, cfg: DictConfig
) -> list[dict]:
    """Evaluates a backbone and appends its rows to `folder`, all of them or none, on the main rank.

    `checkpoint`: epoch, iteration and name of where the backbone comes from.
    """
    start, rows, base = time.perf_counter(), [], row_base(checkpoint, cfg)
    try:
        results = list(evaluate(backbone, cfg, Job(folder, checkpoint.path.name, checkpoint.iteration)))
    except FloatingPointError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    for i, (metric, value, details) in enumerate(results):
        replaced = {field: details[field] for field in ROW_FIELDS if field in details}
        kept = {key: entry for key, entry in details.items() if key not in ROW_FIELDS}
        kept |= {"evaluator": name, "settings": settings_hash(name, cfg), "identity": checkpoint.identity}
        if i == len(results) - 1:  # marks the evaluation as complete, and has its cost
            kept |= {"last": True, "seconds": round(time.perf_counter() - start, 2)}
        rows.append(base | {"metric": metric, "value": value} | replaced | {"details": kept})
    if distributed.is_main():
        for row in rows:
            append_result(folder / "results.jsonl", row)
            what = f"{row['method']}, epoch {row['epoch']}, {row['dataset']}, {row['noise']}"
            print(f"{what}: {row['metric']} = {row['value']:.2f}", flush=True)
    distributed.wait_for_main()  # which may have worked alone for hours
    return rows


def row_base(checkpoint: Checkpoint, cfg: DictConfig) -> dict:
    """The fields that all rows of an evaluation share."""
    return {
        "method": cfg.method,
        **what_is_learned(cfg.method, cfg.objective),
        "noise": cfg.noise,
        "dataset": dataset_name(cfg),
        "seed": cfg.seed,
        "view": eval_view(cfg),
        "protocol": "full",
        "epoch": checkpoint.epoch,
        "iteration": checkpoint.iteration,
        "config_hash": config_hash(cfg),
    }


def accuracy_details(hits: Tensor, val: Features, backbone: nn.Module, cfg: DictConfig) -> dict:
    """Details for comparing an accuracy with others: which images were right, and what kind of backbone it is.

    hits: bool [N], top-1, in the order of the validation images; stored in `correct` as base64 of numpy.packbits.
    """
    return {
        "correct": base64.b64encode(np.packbits(hits.cpu().numpy()).tobytes()).decode(),
        "images": len(hits),
        "classes": len(val.classes),
        "crop": cfg.eval.crop,
        "architecture": getattr(backbone, "architecture", type(backbone).__name__),
    }
