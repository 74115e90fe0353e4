"""Is this the same run? Compares what decides a stage's result with the run that is already in its folder.

Two runs are the same if their deciding settings are, the images that they read (by name and size, wherever they are),
and the weights that they start from or are anchored to. config.yaml in the folder holds the settings, run.json the rest
and what was changed on the way (resume.allow). A hash of all this is in each checkpoint and in each result row.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from dinov2 import checkpoint
from dinov2.config import load_run_config, save_run_config
from dinov2.data.dataset import ImageDataset
from utils import distributed
from utils.files import write_text
from utils.nested import flatten
from utils.noise import NoiseSpec
from utils.values import ESTIMATED

if TYPE_CHECKING:
    from dinov2.train.curriculum import Stage

RECORD = "run.json"
# Keys and sections that do not decide what is computed, and why. All others do.
NOT_DECIDING = {
    "output_dir": "where it is written",
    "data.root": "the images count, by name and size",
    "data.denoised_root": "the images count, by name and size",
    "data.storage": "the same bytes either way",
    "data.noisy_root": "the same bytes, as its manifest ensures",
    "data.name": "a label of result rows",
    "data.workers": "how images are loaded",
    "data.resident": "how images are loaded",
    "data.index_cache": "how images are loaded",
    "data.max_pixels": "what is refused, not what is computed",
    "train.eval_every": "which checkpoints are kept",
    "train.checkpoint_every": "which checkpoints are kept",
    "train.keep_last": "which checkpoints are kept",
    "train.log_every": "what is written down",
    "train.knn_every": "what is written down",
    "train.compile": "the same up to rounding",
    "train.activation_checkpointing": "the same",
    "curriculum": "the stage's own entry counts, and the weights that it starts from",
    "anchor": "where the stage is anchored: its own λ, head, epoch and weights count",
    "eval": "decides result rows, which have a hash of their own",
    "resume": "how a run is taken up",
    "trial": "a label of tables",
    "train.on_collapse": "whether it stops",
}
CHANGEABLE = ("optim", "teacher", "train", "anchor", "data", "curriculum")  # sections that resume.allow is useful for
# What a finished run takes over, because its evaluations read it.
TAKEN_OVER = ("eval", *(key for key in NOT_DECIDING if key.startswith("data.")))


def is_within(key: str, names) -> bool:
    """Whether a dotted key is one of names or in a section that is."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def deciding_settings(cfg: DictConfig) -> dict[str, object]:
    """The deciding settings of a run's last stage by key."""
    content = OmegaConf.to_container(cfg, resolve=True)
    entry, noise = content["curriculum"]["stages"][-1], str(NoiseSpec.parse(cfg.noise))
    decided = {"view": entry["view"], "mix": entry.get("mix"), "init": entry.get("init") or "scratch"}
    decided |= {"anchor": bool(entry.get("anchor")), "noise": noise}
    if entry.get("anchor"):
        decided |= {f"anchor.{key}": content["anchor"][key] for key in ("head", "weight_end", "pretrained")}
        decided[f"anchor.weights.{noise}"] = content["anchor"]["weights"].get(noise)
    rest = {key: value for key, value in flatten(content).items() if not is_within(key, NOT_DECIDING)}
    label = rest.pop("method")
    return decided | {key: value for key, value in rest.items() if key != "noise"} | {"method": label}


def collect_facts(stage: Stage, images: ImageDataset | None) -> dict[str, object]:
    """What the settings do not tell, each under the key that chooses it; images: None if they are not known yet."""
    known: dict[str, object] = {}
    if stage.mix:
        known["curriculum.stages.stop"] = stage.stop_epoch  # the mix moves from the first iteration to the last
    if stage.init != "scratch":
        known["curriculum.restart_epoch"] = stage.from_epoch
        known["curriculum.denoised_dir"] = _describe_weights(stage.source, stage.from_epoch)
    if stage.anchor:
        known |= {"anchor.epoch": stage.anchor[1], "anchor.run": _describe_weights(*stage.anchor)}
    return {key: value for key, value in (known | digest_images(images)).items() if value is not None}


def digest_images(images: ImageDataset | None) -> dict[str, str]:
    """Digests of the images of a data set, and of the denoised ones, by key; read by the main rank for all ranks."""
    if images is None:
        return {}

    def digest() -> dict[str, str]:
        try:
            denoised = {"data.denoised_root": images.digest("denoised")} if "denoised" in images.twins else {}
            return {"data.root": images.digest()} | denoised
        except OSError as error:
            raise ValueError(f"{error.filename} can't be read ({error.strerror})") from None

    return distributed.gather_dicts(distributed.on_main(digest) or {})


def _describe_weights(run: Path, epoch: int) -> str | None:
    """Identifies the weights of a run's kept epoch; None if they do not exist (yet)."""
    found = [c for c in checkpoint.list_kept(run) if c.epoch == epoch]
    return f"weights {found[0].hashes[checkpoint.TEACHER]}" if found and found[0].hashes else None


def is_begun(run: Path) -> bool:
    return (run / "config.yaml").exists() and bool(checkpoint.list_checkpoints(run))


def read_record(run: Path) -> dict:
    """{"facts": …, "history": […]} of a run; empty for a run of an older version."""
    path = run / RECORD
    try:
        record = json.loads(path.read_text())
        return {"facts": dict(record["facts"]), "history": list(record["history"])}
    except FileNotFoundError:
        return {"facts": {}, "history": []}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; remove it to go on without what it says of this run") from None


@cache
def _read_saved_settings(path: Path, time: int) -> dict[str, object]:
    """The settings of a saved config. Reading is slow, so it is cached; a new modification time reads it again."""
    return deciding_settings(load_run_config(path.parent))


def differences(stage: Stage, images: ImageDataset | None) -> dict[str, tuple]:
    """Key → (value of the run in the folder, value of the stage), for deciding keys that both have and that differ."""
    path = stage.run / "config.yaml"
    held = _read_saved_settings(path, path.stat().st_mtime_ns) | read_record(stage.run)["facts"]
    here = deciding_settings(stage.cfg) | collect_facts(stage, images)
    if {here["data.values"], held.get("data.values")} & {*ESTIMATED}:
        here.pop("data.values")  # one of the two is not estimated yet
    return {key: (held[key], here[key]) for key in here if key in held and held[key] != here[key]}


def check(stage: Stage, images: ImageDataset | None = None) -> None:
    """ValueError where the stage's folder holds another run: names the first key that differs, and both values.

    Keys of resume.allow may differ, except in a finished last stage: nothing would be trained under them.
    """
    if not is_begun(stage.run):
        return
    for key, (old, new) in differences(stage, images).items():
        if is_within(key, stage.cfg.resume.allow) and not (stage.is_last_stage and stage.finished):
            continue
        raise ValueError(f"{stage.run} holds a run with {key}={old}, this one has {new}: {_suggest_way_on(stage, key)}")


def _suggest_way_on(stage: Stage, key: str) -> str:
    other = "choose another output_dir" if stage.is_last_stage else "choose another folder for it"
    if stage.is_last_stage and stage.finished:
        return f"it is finished, and nothing would be trained under the new value; {other}"
    if key.split(".")[0] not in CHANGEABLE:
        return other
    use = "use it as it is" if stage.finished else "go on under the new value"
    return f"{other}, or {use} by resume.allow=[{key}]"


def record(stage: Stage, images: ImageDataset) -> str:
    """Writes config.yaml and run.json of a stage that is about to train. Returns the hash of its identity.

    Adds changes that resume.allow permits to the history. All ranks call it.
    """
    known, history, changed = collect_facts(stage, images), [], {}
    if is_begun(stage.run):
        history = read_record(stage.run)["history"]
        changed = {key: list(values) for key, values in differences(stage, images).items()}
        done = checkpoint.latest(stage.run)
        if changed:
            history = [*history, {"iteration": done.iteration if done else 0, "changed": changed}]
    distributed.barrier()  # what is compared above is written below
    if distributed.is_main():
        checkpoint.sweep(stage.run)
        save_run_config(stage.cfg, stage.run)
        write_text(stage.run / RECORD, json.dumps({"facts": known, "history": history}, indent=1) + "\n")
        for key, (old, new) in changed.items():
            start = history[-1]["iteration"]
            print(f"{stage.run}: from iteration {start} on under {key}={new}, before {old}", flush=True)
    whole = json.dumps([deciding_settings(stage.cfg), known, history], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


def take_over(stage: Stage) -> str:
    """Gives a finished run new settings of evaluation and folders of images. Returns a note on what changed."""
    held = load_run_config(stage.run)
    old, new = (flatten(OmegaConf.to_container(cfg, resolve=True)) for cfg in (held, stage.cfg))
    changed = [key for key in new if is_within(key, TAKEN_OVER) and old.get(key) != new[key]]
    for key in changed:
        OmegaConf.update(held, key, new[key])
    if changed:
        save_run_config(held, stage.run)
    return f"; its config.yaml takes over {', '.join(f'{key}={new[key]}' for key in changed)}" if changed else ""
