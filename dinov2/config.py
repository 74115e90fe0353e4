"""A run's configuration: default.yaml, overlays by name or path, then key=value.

    cfg = load_config(["imagenet100", "nct", "noise=gauss255", "data.root=mini-imagenet", "output_dir=runs/nct"])

Unknown keys, values of another type and impossible combinations are ValueErrors that name the key.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.models.vision_transformer import ARCHS
from utils.noise import NoiseSpec

CONFIGS = Path(__file__).parent / "configs"
FREE_FORM = ("anchor.weights", "curriculum.noisy_set")  # their keys are the user's
STAGE_KEYS = ("name", "view", "noise", "epochs", "stop", "dir", "init", "from_epoch", "anchor", "mix", "set", "method")
METHODS = ("dinov2", "n2n", "nc", "nct", "clean")
VIEWS = ("noisy", "denoised", "clean", "mix")


def load_defaults() -> DictConfig:
    return OmegaConf.load(CONFIGS / "default.yaml")


def overlay_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "default")


def overlay_help() -> str:
    """One line an overlay: its name and the first line of its header."""
    lines = []
    for name in overlay_names():
        first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
        lines.append(f"  {name:<14} {first.lstrip('# ')}")
    return "\n".join(lines)


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
    """Merges overlays and key=value arguments onto the defaults; resolved. `validated` also checks combinations."""
    cfg = load_defaults()
    for argument in arguments:
        if "=" not in argument or Path(argument).is_file():
            overlay = OmegaConf.load(find_overlay(argument))
            source = f"overlay {argument}"
        else:
            overlay = _from_argument(argument)
            source = argument
        _check_keys(overlay, load_defaults(), source)
        cfg = OmegaConf.merge(cfg, overlay)
    return finish(cfg, validated)


def finish(cfg: DictConfig, validated: bool = True) -> DictConfig:
    """Resolves interpolations, so that the saved config says everything by itself, and checks combinations."""
    missing = [key for key in ("output_dir", "data.root") if OmegaConf.is_missing(*_owner(cfg, key))]
    if missing and validated:
        raise ValueError(f"{missing[0]} is not set: give {missing[0]}=FOLDER")
    try:
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=not missing))
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if validated:
        validate(cfg)
    return cfg


def load_run_config(run: Path | str) -> DictConfig:
    """The config saved with a run. Keys that later versions added have their defaults."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is no run: it has no config.yaml")
    return OmegaConf.merge(load_defaults(), OmegaConf.load(path))


def save_run_config(cfg: DictConfig, run: Path | str) -> None:
    path = Path(run) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(OmegaConf.to_yaml(cfg))
    os.replace(temporary, path)


def config_hash(cfg: DictConfig) -> str:
    """Twelve hex digits of what decides the result; where it is written and how it is loaded do not."""
    content = OmegaConf.to_container(cfg, resolve=False)
    content.pop("output_dir", None)
    for key in ("workers", "resident", "index_cache"):
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
        content = OmegaConf.create(f"value: {value}" if value else "value: null")["value"]
        for part in reversed(parts):
            content = {part: content}
        return OmegaConf.create(content)
    except Exception as error:
        raise ValueError(f"{argument!r} is not key=value: {str(error).splitlines()[0]}") from None


def _check_keys(overlay: DictConfig, known: DictConfig, source: str, prefix: str = "") -> None:
    for key in overlay:
        name = f"{prefix}{key}"
        if key not in known.keys():
            close = difflib.get_close_matches(name, _all_keys(load_defaults()), n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"unknown key {name} in {source}{hint}")
        if name in FREE_FORM or OmegaConf.is_interpolation(overlay, key) or OmegaConf.is_missing(overlay, key):
            continue
        value = overlay[key]
        default = None if OmegaConf.is_missing(known, key) else OmegaConf.to_container(known)[key]
        if isinstance(default, dict):
            if not OmegaConf.is_dict(value):
                raise ValueError(f"{name} in {source} is a section: give {name}.KEY=VALUE")
            _check_keys(value, known[key], source, f"{name}.")
        elif default is not None and value is not None and not _same_type(value, default):
            raise ValueError(f"{name}={value} in {source} must be {_type_name(default)}")


def _same_type(value: object, default: object) -> bool:
    if isinstance(default, str) and default.startswith("${"):
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int if isinstance(default, int) else int | float)
    return OmegaConf.is_list(value) if isinstance(default, list) else isinstance(value, str | int | float)


def _type_name(default: object) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", list: "a list"}
    return names.get(type(default), "a text")


def _all_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key, value in OmegaConf.to_container(cfg).items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _all_keys(OmegaConf.create(value), f"{prefix}{key}.")
    return keys


def validate(cfg: DictConfig) -> None:
    """Refuses impossible combinations; each sentence names the key."""

    def require(condition: bool, sentence: str) -> None:
        if not condition:
            raise ValueError(sentence)

    def one_of(key: str, value: object, allowed: tuple | list) -> None:
        require(value in allowed, f"{key}={value} must be one of {', '.join(map(str, allowed))}")

    one_of("method", cfg.method, METHODS)
    one_of("data.storage", cfg.data.storage, ("on_the_fly", "disk"))
    one_of("model.arch", cfg.model.arch, tuple(ARCHS))
    one_of("model.ffn", cfg.model.ffn, ("mlp", "swiglu"))
    one_of("teacher.centering", cfg.teacher.centering, ("centering", "sinkhorn_knopp"))
    one_of("train.precision", cfg.train.precision, ("fp32", "bf16", "fp16"))
    one_of("anchor.head", cfg.anchor.head, ("ema", "frozen"))
    NoiseSpec.parse(cfg.noise)
    channels = cfg.data.in_chans
    for key in ("mean", "std"):
        count = len(cfg.data[key])
        require(count == channels, f"data.{key} has {count} values for data.in_chans={channels}")
    for key in ("global_size", "local_size"):
        size, patch = cfg.crops[key], cfg.model.patch_size
        require(size % patch == 0, f"crops.{key}={size} is no multiple of model.patch_size={patch}")
    require(0 <= cfg.model.registers <= 4, f"model.registers={cfg.model.registers} must be 0 to 4")
    require(0 <= cfg.model.drop_path < 1, f"model.drop_path={cfg.model.drop_path} must be at least 0 and below 1")
    for key in ("batch_size", "epochs", "epoch_length", "accumulate", "eval_every", "checkpoint_every", "log_every"):
        require(cfg.train[key] >= 1, f"train.{key}={cfg.train[key]} must be at least 1")
    batch, micro = cfg.train.batch_size, cfg.train.accumulate
    require(batch % micro == 0, f"train.batch_size={batch} is no multiple of train.accumulate={micro}")
    low, high = cfg.ibot.mask_ratio
    require(0 <= low <= high <= 1, f"ibot.mask_ratio=[{low}, {high}] must rise within 0 and 1")
    _validate_stages(cfg, require, one_of)


def _validate_stages(cfg: DictConfig, require, one_of) -> None:
    stages = cfg.curriculum.stages
    require(len(stages) > 0, "curriculum.stages is empty: give at least one stage")
    for number, stage in enumerate(stages):
        name = f"curriculum.stages[{number}]"
        for key in stage:
            one_of(f"key of {name}", key, STAGE_KEYS)
        for key in ("view", "epochs", "dir"):
            require(stage.get(key) is not None, f"{name}.{key} is not set (a scale's overlay sets the curriculum's epochs)")
        one_of(f"{name}.view", stage.view, VIEWS)
        one_of(f"{name}.init", stage.get("init") or "scratch", ("scratch", "restart", "continue"))
        noise = NoiseSpec.parse(stage.get("noise") or cfg.noise)
        stop = stage.get("stop") or stage.epochs
        require(0 < stop <= stage.epochs, f"{name}.stop={stop} lies beyond its schedule of {stage.epochs} epochs")
        init = stage.get("init") or "scratch"
        require(number > 0 or init == "scratch", f"{name}.init={init} needs a stage before it")
        if stage.get("from_epoch") is not None:
            before = stages[number - 1]
            end = before.get("stop") or before.epochs
            require(
                init != "scratch" and stage.from_epoch <= end,
                f"{name}.from_epoch={stage.from_epoch} lies beyond the end of the stage before it, epoch {end}",
            )
        mix = stage.get("mix")
        require(
            (stage.view == "mix") == (mix is not None), f"{name}.mix: [start, end] belongs to view mix, and to it alone"
        )
        if stage.get("anchor"):
            require(
                stage.view == "noisy",
                f"{name}.anchor needs view noisy: the anchor compares the noisy view with the denoised one",
            )
            require(
                str(noise) in cfg.anchor.weights,
                f"anchor.weights has no λ for {noise}: give anchor.weights.{noise}=NUMBER",
            )
            require(number > 0 or cfg.anchor.run is not None, f"{name}.anchor needs a denoised stage before it or anchor.run")
        _check_keys(OmegaConf.create(_nested(stage.get("set") or {})), load_defaults(), f"{name}.set")
    require(
        str(Path(stages[-1].dir)) == str(Path(cfg.output_dir)),
        f"the last stage must train in output_dir={cfg.output_dir}, not in {stages[-1].dir}",
    )


def _nested(dotted: DictConfig | dict) -> dict:
    """{"optim.min_lr": 1} → {"optim": {"min_lr": 1}}"""
    nested: dict = {}
    for key, value in dotted.items():
        *path, last = str(key).split(".")
        target = nested
        for part in path:
            target = target.setdefault(part, {})
        target[last] = value
    return nested


def stage_overrides(cfg: DictConfig, changes: DictConfig | dict) -> DictConfig:
    """cfg with a stage's `set` applied."""
    return OmegaConf.merge(cfg, OmegaConf.create(_nested(changes)))
