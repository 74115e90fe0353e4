"""A run's configuration: default.yaml, overlays by name or path, then key=value.

    cfg = load_config(["imagenet100", "nct", "noise=gauss255", "data.root=mini-imagenet", "output_dir=runs/nct"])

Unknown keys, values of another type and impossible combinations are ValueErrors that name the key. In key=value, a key
that holds text (a path, a name) takes it to the letter; the others take YAML. References such as ${train.epochs} are
for overlays.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinov2.models.vision_transformer import ARCHS
from utils.files import atomic_path
from utils.images import MIXED
from utils.noise import NoiseSpec
from utils.readers import STACKS
from utils.values import check as check_values

CONFIGS = Path(__file__).parent / "configs"
FREE_FORM = ("anchor.weights", "curriculum.noisy_set")  # their keys are the user's
STAGE_KEYS = {  # key of a stage: a value of its type
    "view": "", "noise": "", "epochs": 0, "stop": 0, "dir": "", "init": "", "from_epoch": 0, "anchor": False,
    "mix": [0.0], "set": {}, "method": "",
}  # fmt: skip
METHODS = ("dinov2", "n2n", "nc", "nct", "clean")
VIEWS = ("noisy", "denoised", "clean", "mix")
OPTIONAL = {  # keys that may be null, whose type their default does not show
    "model.depth": 0, "model.pos_embed_size": 0, "curriculum.restart_epoch": 0, "curriculum.noisy_epochs": 0,
    "anchor.epoch": 0, "anchor.weight_end": 0.0, "anchor.run": "", "model.pretrained": "", "data.name": "",
    "data.noisy_root": "", "data.denoised_root": "", "data.index_cache": "", "data.max_side": 0, "eval.view": "",
    "data.val": 0.0, "data.group": "", "data.labels": "", "train.compile": False,
    "eval.retrieval.denoised_root": "", "eval.retrieval.distractors": "",
}  # fmt: skip
AT_LEAST = {  # smallest value: keys
    1: ("data.in_chans", "data.max_side", "data.max_pixels", "crops.global_size", "crops.local_size", "model.depth",
        "model.patch_size", "model.pos_embed_size", "dino.prototypes", "dino.bottleneck", "dino.layers", "dino.hidden",
        "ibot.prototypes", "ibot.bottleneck", "ibot.layers", "ibot.hidden", "projector.layers", "projector.hidden",
        "projector.dim", "projector.predictor", "train.batch_size", "train.epochs",
        "train.epoch_length", "train.accumulate", "train.eval_every", "train.checkpoint_every", "train.log_every",
        "curriculum.restart_epoch", "curriculum.noisy_epochs", "anchor.epoch"),
    0: ("data.workers", "data.split_seed", "crops.local_number", "model.layerscale", "dino.weight",
        "dino.koleo_weight", "ibot.weight", "teacher.warmup_temp_epochs", "optim.frozen_blocks", "optim.base_lr",
        "optim.min_lr", "optim.warmup_epochs", "optim.weight_decay", "optim.weight_decay_end", "optim.clip_grad",
        "optim.freeze_last_layer_epochs", "optim.head_warmup_epochs",
        "train.keep_last", "train.knn_every", "anchor.weight_end"),
}  # fmt: skip
# In [0, 1].
SHARES = ("crops.flip", "crops.grey", "ibot.mask_probability", "teacher.momentum", "teacher.final_momentum")
RANGES = ("crops.global_scale", "crops.local_scale", "ibot.mask_ratio")  # [low, high] in [0, 1]


@lru_cache(maxsize=1)
def _defaults() -> dict:
    """default.yaml, unresolved: read once, because parsing takes longer than all the rest."""
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "default.yaml"))


def load_defaults() -> DictConfig:
    return OmegaConf.create(_defaults())


def overlay_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "default")


def objective_names() -> list[str]:
    return sorted(path.stem for path in (CONFIGS / "objectives").glob("*.yaml"))


def overlay_help() -> str:
    """One line an overlay: its name and the first line of its header."""
    lines = []
    for name in overlay_names():
        first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
        lines.append(f"  {name:<14} {first.lstrip('# ')}")
    return "\n".join([*lines, f"objectives (objective=NAME): {', '.join(objective_names())}"])


def find_overlay(name: str) -> Path:
    named = CONFIGS / f"{name}.yaml"
    if name in overlay_names():
        return named
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"overlay {name} is no file")
        return Path(name)
    close = difflib.get_close_matches(name, overlay_names(), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ValueError(f"no overlay {name!r}: {hint}overlays are {', '.join(overlay_names())}, or the path of a .yaml")


def load_config(arguments: list[str], validated: bool = True) -> DictConfig:
    """Merges overlays and key=value arguments onto the defaults; resolved. `validated` also checks combinations.

    With model.pretrained the architecture is that of its file: over the defaults and the named overlays, while a key
    that the user gives must agree with it.
    """
    cfg, given = load_defaults(), set()
    for argument in _with_objective(arguments):
        if isinstance(argument, DictConfig):
            overlay, source = argument, ""
        elif "=" not in argument or (argument.endswith((".yaml", ".yml")) and os.path.isfile(argument)):
            overlay = _read_yaml(find_overlay(argument))
            source = f" in overlay {argument}"
        else:
            overlay, source = _from_argument(argument), ""
        _check_keys(overlay, _defaults(), source)
        cfg = OmegaConf.merge(cfg, overlay)
        by_name = isinstance(argument, DictConfig) or argument in overlay_names()
        given |= set() if by_name else set(overlay.get("model") or {})
    if cfg.model.pretrained is not None:
        cfg.model = OmegaConf.merge(cfg.model, _of_file(cfg.model, given))
    return finish(cfg, validated)


def _with_objective(arguments: list[str]) -> list[str | DictConfig]:
    """The arguments with the overlay of their objective behind the last named one: under all that the user gives.

    Its section `scales` holds, by the name of a scale's overlay, what is other at that scale.
    """
    named = [number for number, argument in enumerate(arguments) if argument in overlay_names()]
    chosen = [argument.removeprefix("objective=") for argument in arguments if argument.startswith("objective=")]
    for argument in () if chosen else arguments:
        if argument not in overlay_names() and os.path.isfile(argument):
            chosen += [name] if (name := _read_yaml(Path(argument)).get("objective")) else []
    if not chosen:
        return arguments
    one_of("objective", chosen[-1], objective_names())
    overlay = _read_yaml(CONFIGS / "objectives" / f"{chosen[-1]}.yaml")
    scales = overlay.pop("scales", {})
    own = [scales[arguments[number]] for number in named if arguments[number] in scales]
    place = named[-1] + 1 if named else 0
    return [*arguments[:place], OmegaConf.merge(overlay, *own), *arguments[place:]]


def _of_file(model: DictConfig, given: set[str]) -> dict[str, object]:
    """The keys of section model that follow from model.pretrained. ValueError where a given one is another."""
    from dinov2.models.weights import read_weights

    follow = read_weights(model.pretrained).model
    for key in given & follow.keys():
        if model[key] != follow[key]:
            raise ValueError(
                f"model.{key}={model[key]}, but {model.pretrained} has {follow[key]}: leave model.{key} out, it comes "
                "from the file"
            )
    return follow


def finish(cfg: DictConfig, validated: bool = True) -> DictConfig:
    """Resolves interpolations, so that the saved config says everything by itself, and checks combinations."""
    missing = [key for key in ("output_dir", "data.root") if OmegaConf.is_missing(*_owner(cfg, key))]
    if missing and validated:
        raise ValueError(f"{missing[0]} is not set: give {missing[0]}=FOLDER")
    try:
        content = OmegaConf.to_container(cfg, resolve=not missing)
        cfg = OmegaConf.create(content if missing else escaped(content))
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if validated:
        validate(cfg)
    return cfg


def load_run_config(run: Path | str) -> DictConfig:
    """The config saved with a run. Keys that later versions added have their defaults; values were "full" before."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is no run: it has no config.yaml")
    content = _read_yaml(path)
    if outside := next(_outside(OmegaConf.to_container(content)), None):
        raise ValueError(f"{path}: {outside} refers to something outside of the run; write its value there")
    return OmegaConf.merge(load_defaults(), {"data": {"values": "full"}}, content)


def _outside(content: object, key: str = "") -> Iterator[str]:
    """Keys whose text has a reference with a resolver, as ${oc.env:HOME}: a saved config has none."""
    if isinstance(content, str) and re.search(r"(?<!\\)\$\{[^}]*:", content):
        yield key
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in pairs:
        yield from _outside(value, f"{key}.{name}".lstrip("."))


def escaped(content: object) -> object:
    """content with every ${ in its texts as OmegaConf is to read it: as two characters, not as a reference."""
    if isinstance(content, dict):
        return {key: escaped(value) for key, value in content.items()}
    if isinstance(content, list):
        return [escaped(value) for value in content]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", content) if isinstance(content, str) else content


def _read_yaml(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(content):
        raise ValueError(f"{path} must hold keys and values")
    return content


def save_run_config(cfg: DictConfig, run: Path | str) -> None:
    path = Path(run) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(OmegaConf.to_yaml(cfg))


def config_hash(cfg: DictConfig) -> str:
    """Twelve hex digits of what decides the result; where it is written and how it is loaded do not."""
    content = OmegaConf.to_container(cfg, resolve=False)
    for key in ("output_dir", "trial"):
        content.pop(key, None)
    for key in ("workers", "resident", "index_cache", "max_pixels"):
        content.get("data", {}).pop(key, None)
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.create(content), sort_keys=True).encode()).hexdigest()[:12]


def _owner(cfg: DictConfig, key: str) -> tuple[DictConfig, str]:
    *path, last = key.split(".")
    for part in path:
        cfg = cfg[part]
    return cfg, last


def _from_argument(argument: str) -> DictConfig:
    key, _, value = argument.partition("=")
    try:
        # Built by hand rather than as a dot list: noise names such as speckle1.0 have a dot of their own.
        parts = key.split(".", 2) if key.startswith(FREE_FORM) else key.split(".")
        content = parse_value(key.removeprefix("curriculum.noisy_set."), value)
        for part in reversed(parts):
            content = {part: content}
        return OmegaConf.create(content)
    except Exception as error:
        raise ValueError(f"{argument!r} is not key=value: {str(error).splitlines()[0]}") from None


def parse_value(key: str, text: str) -> object:
    """What key=text stands for: text itself, escaped, where the key holds text; else, and for null, the YAML in it."""
    default = _defaults()
    for part in key.split("."):
        default = default.get(part) if isinstance(default, dict) else None
    if text not in ("", "null") and isinstance(OPTIONAL.get(key, default), str):
        return escaped(text)
    return OmegaConf.create(f"value: {text or 'null'}")["value"]


def _check_keys(overlay: DictConfig, known: dict, source: str, prefix: str = "") -> None:
    for key in overlay:
        name = f"{prefix}{key}"
        if key not in known:
            section = isinstance(OmegaConf.to_container(overlay)[key], dict)
            close = difflib.get_close_matches(name, _all_keys(_defaults(), section=section), n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown key {name}{source}{hint}")
        if OmegaConf.is_interpolation(overlay, key) or OmegaConf.is_missing(overlay, key):
            continue
        value = overlay[key]
        default = OPTIONAL.get(name, known[key])
        if isinstance(default, dict):
            if not OmegaConf.is_dict(value):
                raise ValueError(f"{name}{source} is a section: give {name}.KEY=VALUE")
            if name not in FREE_FORM:
                _check_keys(value, known[key], source, f"{name}.")
        elif default is not None and not _same_type(value, default) and not (value is None and name in OPTIONAL):
            text = "null" if value is None else value
            raise ValueError(f"{name}={text}{source} must be {_type_name(default)}")
        elif isinstance(default, str) and isinstance(value, int | float):
            raise ValueError(f"{name}={value}{source} is a number to YAML, maybe another than was written: quote it")


def _same_type(value: object, default: object) -> bool:
    if isinstance(default, str) and default.startswith("${"):
        return True  # of the type of another key
    if isinstance(default, list):
        return OmegaConf.is_list(value) and all(_same_type(entry, default[0]) for entry in value if default)
    if isinstance(default, dict):
        return OmegaConf.is_dict(value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int if isinstance(default, int) else int | float)
    return isinstance(value, str | int | float)


def _type_name(default: object) -> str:
    if isinstance(default, list):
        return f"a list, each entry {_type_name(default[0])}" if default else "a list"
    names = {bool: "true or false", int: "a whole number", float: "a number", dict: "{key: value}"}
    return names.get(type(default), "a text")


def _all_keys(known: dict, prefix: str = "", *, section: bool) -> list[str]:
    """Dotted names of all sections, or of all values that are none."""
    keys = []
    for key, value in known.items():
        if isinstance(value, dict) == section:
            keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _all_keys(value, f"{prefix}{key}.", section=section)
    return keys


def one_of(key: str, value: object, allowed: tuple | list) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value} must be one of {', '.join(map(str, allowed))}")


def validate(cfg: DictConfig) -> None:
    """Refuses impossible combinations; each sentence names the key."""

    def require(condition: bool, sentence: str) -> None:
        if not condition:
            raise ValueError(sentence)

    one_of("objective", cfg.objective, objective_names())
    one_of("method", cfg.method, METHODS)
    one_of("data.storage", cfg.data.storage, ("on_the_fly", "disk"))
    one_of("data.mixed", cfg.data.mixed, MIXED)
    one_of("data.stack", cfg.data.stack, STACKS)
    one_of("model.arch", cfg.model.arch, tuple(ARCHS))
    one_of("model.ffn", cfg.model.ffn, ("mlp", "swiglu"))
    one_of("model.pos_embed", cfg.model.pos_embed, ("learned", "rope"))
    one_of("teacher.centering", cfg.teacher.centering, ("centering", "sinkhorn_knopp"))
    one_of("train.precision", cfg.train.precision, ("fp32", "bf16", "fp16"))
    one_of("train.on_collapse", cfg.train.on_collapse, ("warn", "stop"))
    one_of("anchor.head", cfg.anchor.head, ("ema", "frozen"))
    NoiseSpec.parse(cfg.noise)
    require(cfg.data.val is None or 0 < cfg.data.val < 1, f"data.val={cfg.data.val} must lie between 0 and 1")
    check_values(cfg.data["values"], "data.values")
    for least, keys in AT_LEAST.items():
        for key in keys:
            value = OmegaConf.select(cfg, key)
            require(value is None or value >= least, f"{key}={value} must be at least {least}")
    for key in SHARES:
        require(0 <= OmegaConf.select(cfg, key) <= 1, f"{key}={OmegaConf.select(cfg, key)} must lie within 0 and 1")
    for key in RANGES:
        pair = list(OmegaConf.select(cfg, key))
        rising = len(pair) == 2 and 0 <= pair[0] <= pair[1] <= 1
        require(rising, f"{key}={pair} must be two numbers that rise within 0 and 1")
    channels = cfg.data.in_chans
    for key in ("mean", "std"):
        count = len(cfg.data[key])
        require(count == channels, f"data.{key} has {count} values for data.in_chans={channels}")
    patch = cfg.model.patch_size
    for key in ("crops.global_size", "crops.local_size", "model.pos_embed_size"):
        size = OmegaConf.select(cfg, key) or 0
        near = f"{key}={max(patch, round(size / patch) * patch)}"
        require(size % patch == 0, f"{key}={size} is no multiple of model.patch_size={patch}: take {near}")
    require(cfg.projector.temp > 0, f"projector.temp={cfg.projector.temp} must be above 0")
    require(0 <= cfg.model.registers <= 4, f"model.registers={cfg.model.registers} must be 0 to 4")
    require(0 <= cfg.model.drop_path < 1, f"model.drop_path={cfg.model.drop_path} must be at least 0 and below 1")
    depth, frozen = cfg.model.depth or ARCHS[cfg.model.arch][1], cfg.optim.frozen_blocks
    require(frozen <= depth, f"optim.frozen_blocks={frozen} is more than the {depth} blocks of model.depth")
    batch, micro = cfg.train.batch_size, cfg.train.accumulate
    require(batch % micro == 0, f"train.batch_size={batch} is no multiple of train.accumulate={micro}")
    for key in cfg.resume.allow:
        known = any(key in _all_keys(_defaults(), section=section) for section in (True, False))
        known = known or str(key).startswith("anchor.weights.")
        require(known, f"resume.allow={list(cfg.resume.allow)}: {key} is no key")
    for noise, weight in cfg.anchor.weights.items():
        require(_same_type(weight, 0.0), f"anchor.weights.{noise}={weight} must be a number")
    _validate_stages(cfg, require, one_of)


def _validate_stages(cfg: DictConfig, require, one_of) -> None:
    stages = cfg.curriculum.stages
    require(len(stages) > 0, "curriculum.stages is empty: give at least one stage")
    for number, stage in enumerate(stages):
        name, before = f"curriculum.stages[{number}]", stages[number - 1] if number else None
        for key in stage:
            one_of(f"key of {name}", key, tuple(STAGE_KEYS))
            value, kind = stage[key], STAGE_KEYS[key]
            require(value is None or _same_type(value, kind), f"{name}.{key}={value} must be {_type_name(kind)}")
        for key in ("view", "epochs", "dir"):
            given = stage.get(key) is not None
            require(given, f"{name}.{key} is not set (a scale's overlay sets the curriculum's epochs)")
        _check_keys(OmegaConf.create(_nested(stage.get("set") or {})), _defaults(), f" in {name}.set")
        one_of(f"{name}.view", stage.view, VIEWS)
        init = stage.get("init") or "scratch"
        one_of(f"{name}.init", init, ("scratch", "restart", "continue"))
        require(before is not None or init == "scratch", f"{name}.init={init} needs a stage before it")
        stop = stage_end(stage)
        require(0 < stop <= stage.epochs, f"{name}.stop={stop} lies beyond its schedule of {stage.epochs} epochs")
        warmup = stage_overrides(cfg, stage.get("set") or {}).optim.warmup_epochs
        require(warmup <= stage.epochs, f"optim.warmup_epochs={warmup} is longer than {name}.epochs={stage.epochs}")
        if stage.get("from_epoch") is not None:
            end = stage_end(before) if before else 0
            require(
                init != "scratch" and 0 < stage.from_epoch <= end,
                f"{name}.from_epoch={stage.from_epoch} must lie within the stage before it, which ends at epoch {end}",
            )
        mix = stage.get("mix")
        require(
            (stage.view == "mix") == (mix is not None), f"{name}.mix: [start, end] belongs to view mix, and to it alone"
        )
        require(
            mix is None or len(mix) == 2 and 0 <= min(mix) <= max(mix) <= 1,
            f"{name}.mix={mix} must be [start, end], two shares within 0 and 1",
        )
        NoiseSpec.parse(stage.get("noise") or cfg.noise)
        if stage.get("anchor"):
            _validate_anchor(cfg, number, require)
    folders = [str(Path(stage.dir)) for stage in stages]
    for folder in folders:
        require(folders.count(folder) == 1, f"two curriculum.stages have dir={folder}: give each a folder of its own")
    require(
        folders[-1] == str(Path(cfg.output_dir)),
        f"the last stage must train in output_dir={cfg.output_dir}, not in {stages[-1].dir}",
    )


def _validate_anchor(cfg: DictConfig, number: int, require) -> None:
    stage, name = cfg.curriculum.stages[number], f"curriculum.stages[{number}]"
    noise = NoiseSpec.parse(stage.get("noise") or cfg.noise)
    require(
        stage.view == "noisy",
        f"{name}.anchor needs view noisy: the anchor compares the noisy view with the denoised one",
    )
    anchor = stage_overrides(cfg, stage.get("set") or {}).anchor
    require(str(noise) in anchor.weights, f"anchor.weights has no λ for {noise}: give anchor.weights.{noise}=NUMBER")
    if anchor.pretrained:
        require(
            cfg.model.pretrained is not None, "anchor.pretrained=true needs model.pretrained, the file to anchor to"
        )
        require(
            anchor.head == "ema", "anchor.head=frozen: the file of model.pretrained has no head: take anchor.head=ema"
        )
        return
    before = number > 0 or anchor.run is not None
    require(before, f"{name}.anchor needs a denoised stage before it or anchor.run (or anchor.pretrained)")
    run, epoch = anchor_source(cfg, number)
    require(epoch is not None, f"anchor.epoch is not set: give the epoch of anchor.run={run} to anchor to")
    for other in cfg.curriculum.stages[:number]:
        if str(Path(other.dir)) == run:
            within = epoch <= other.epochs
            require(within, f"anchor.epoch={epoch} lies beyond the {other.epochs} epochs of the schedule in {run}")


def stage_end(stage: DictConfig) -> int:
    """Epoch of its schedule at which a stage ends."""
    return stage.epochs if stage.get("stop") is None else stage.stop


def anchor_source(cfg: DictConfig, number: int) -> tuple[str, int | None]:
    """Run and epoch of the frozen teacher of the stage curriculum.stages[number]; of a file its path and None."""
    stage, before = cfg.curriculum.stages[number], cfg.curriculum.stages[number - 1] if number else None
    anchor = stage_overrides(cfg, stage.get("set") or {}).anchor
    if anchor.pretrained:
        return str(cfg.model.pretrained), None
    epoch = anchor.epoch or stage.get("from_epoch") or (stage_end(before) if before else None)
    return str(Path(anchor.run or before.dir)), epoch


def _nested(dotted: DictConfig | dict) -> dict:
    """{"optim.min_lr": 1} → {"optim": {"min_lr": 1}}"""
    nested: dict = {}
    for key, value in dotted.items():
        *path, last = str(key).split(".")
        target = nested
        for part in path:
            target = target.setdefault(part, {})
        target[last] = escaped(value)
    return nested


def stage_overrides(cfg: DictConfig, changes: DictConfig | dict) -> DictConfig:
    """cfg with a stage's `set` applied."""
    return OmegaConf.merge(cfg, OmegaConf.create(_nested(changes)))
