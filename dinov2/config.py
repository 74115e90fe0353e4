"""A run's configuration: default.yaml, overlays by name or path, then key=value.

    cfg = load_config(["imagenet100", "nct", "noise=gauss255", "data.root=mini-imagenet", "output_dir=runs/nct"])

Unknown keys, values of the wrong type and impossible combinations are ValueErrors that name the key. In key=value, a
key that holds text (a path, a name) takes the text literally; other keys take YAML. References such as ${train.epochs}
belong in overlays.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinov2.keys import FREE_FORM, PAGE, RENAMED, STAGE, Key, check_choice, defaults, keys, suggest_key
from utils.files import write_text
from utils.nested import escaped, walk
from utils.noise import NoiseSpec
from utils.text import did_you_mean, one_line
from utils.values import check as check_values
from utils.yaml_files import load_yaml

CONFIGS = PAGE.parent
WEIGHT = Key.of(0.0)  # of an anchor


def load_defaults() -> DictConfig:
    return OmegaConf.create(defaults())


def overlay_names() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "default")


def objective_names() -> list[str]:
    return sorted(path.stem for path in (CONFIGS / "objectives").glob("*.yaml"))


def overlay_help() -> str:
    """One line per overlay: its name and the first line of its header."""
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
    hint = did_you_mean(name, overlay_names(), after=" ")
    raise ValueError(f"no overlay {name!r}: {hint}overlays are {', '.join(overlay_names())}, or the path of a .yaml")


def load_config(
    arguments: list[str], validated: bool = True, read_model_keys: Callable[[str], dict[str, object]] | None = None
) -> DictConfig:
    """Merges overlays and key=value arguments onto the defaults; resolved and, if `validated`, checked.

    read_model_keys: reads the keys of section model that follow from the file model.pretrained. They override the
    defaults and the named overlays, while a key that the user gives must agree with the file.
    """
    cfg, given = load_defaults(), set()
    for argument in _insert_objective(arguments):
        if isinstance(argument, DictConfig):
            overlay, source = argument, ""
        elif "=" not in argument or (argument.endswith((".yaml", ".yml")) and os.path.isfile(argument)):
            overlay = _read_yaml(find_overlay(argument))
            source = f" in overlay {argument}"
        else:
            overlay, source = _from_argument(argument), ""
        _check_keys(overlay, defaults(), source)
        cfg = OmegaConf.merge(cfg, overlay)
        by_name = isinstance(argument, DictConfig) or argument in overlay_names()
        given |= set() if by_name else set(overlay.get("model") or {})
    if read_model_keys and cfg.model.pretrained is not None:
        follow = read_model_keys(cfg.model.pretrained)
        if wrong := [key for key in follow if key in given and cfg.model[key] != follow[key]]:
            key, file = wrong[0], f"{cfg.model.pretrained} has {follow[wrong[0]]}"
            raise ValueError(f"model.{key}={cfg.model[key]}, but {file}: leave model.{key} out, it comes from the file")
        cfg.model = OmegaConf.merge(cfg.model, follow)
    return finish(cfg, validated)


def _insert_objective(arguments: list[str]) -> list[str | DictConfig]:
    """The arguments with the objective's overlay after the last named one, so that all the user's settings override it.

    Its section `scales` holds what differs at a scale, under the name of that scale's overlay.
    """
    named = [number for number, argument in enumerate(arguments) if argument in overlay_names()]
    chosen = [argument.removeprefix("objective=") for argument in arguments if argument.startswith("objective=")]
    for argument in () if chosen else arguments:
        if argument not in overlay_names() and os.path.isfile(argument):
            chosen += [name] if (name := _read_yaml(Path(argument)).get("objective")) else []
    if not chosen:
        return arguments
    check_choice("objective", chosen[-1], objective_names())
    overlay = _read_yaml(CONFIGS / "objectives" / f"{chosen[-1]}.yaml")
    scales = overlay.pop("scales", {})
    own = [scales[arguments[number]] for number in named if arguments[number] in scales]
    place = named[-1] + 1 if named else 0
    return [*arguments[:place], OmegaConf.merge(overlay, *own), *arguments[place:]]


def finish(cfg: DictConfig, validated: bool = True) -> DictConfig:
    """Resolves interpolations, so that the saved config is complete by itself, and checks combinations."""
    unset = OmegaConf.missing_keys(cfg)
    missing = [key for key in ("output_dir", "data.root") if key in unset]
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
    """The config saved with a run, by today's keys. Keys that were added since have their defaults, and data.values is
    "full", which it was before it was a key."""
    path = Path(run) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run} is no run: it has no config.yaml")
    content = _read_yaml(path)
    if key := next(_references(OmegaConf.to_container(content)), None):
        raise ValueError(f"{path}: {key} refers to something else (${{...}}); write its value there")
    for old, new in RENAMED.items():
        if (value := OmegaConf.select(content, old)) is not None:
            section, _, name = old.rpartition(".")
            del OmegaConf.select(content, section)[name]
            OmegaConf.update(content, new, value)
    return OmegaConf.merge(load_defaults(), {"data": {"values": "full"}}, content)


def is_run(folder: Path) -> bool:
    """Whether a folder has the config.yaml of a run; one of another program has no such sections."""
    path = folder / "config.yaml"
    return path.is_file() and {"model", "curriculum"} <= set(_read_yaml(path))


def _references(content: object, key: str = "") -> Iterator[str]:
    """Keys whose text has a reference; a saved config has none. After an odd number of backslashes ${ is plain text."""
    if isinstance(content, str) and re.search(r"(?<!\\)(\\\\)*\$\{", content):
        yield key
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in pairs:
        yield from _references(value, f"{key}.{name}".lstrip("."))


def _read_yaml(path: Path) -> DictConfig:
    try:
        content = load_yaml(path)
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {one_line(error)}") from None
    if not OmegaConf.is_dict(content):
        raise ValueError(f"{path} must hold keys and values")
    return content


def save_run_config(cfg: DictConfig, run: Path | str) -> None:
    write_text(Path(run, "config.yaml"), OmegaConf.to_yaml(cfg))


def config_hash(cfg: DictConfig) -> str:
    """Twelve hex digits of what decides the result, which output folders and loader settings do not."""
    content = OmegaConf.to_container(cfg, resolve=False)
    for key in ("output_dir", "trial"):
        content.pop(key, None)
    for key in ("workers", "resident", "index_cache", "max_pixels"):
        content.get("data", {}).pop(key, None)
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.create(content), sort_keys=True).encode()).hexdigest()[:12]


def _from_argument(argument: str) -> DictConfig:
    key, _, value = argument.partition("=")
    try:
        # Not OmegaConf's dot list: noise names such as speckle1.0 contain a dot.
        parts = key.split(".", 2) if key.startswith(FREE_FORM) else key.split(".")
        content = parse_value(key.removeprefix("curriculum.noisy_set."), value)
        for part in reversed(parts):
            content = {part: content}
        return OmegaConf.create(content)
    except Exception as error:
        raise ValueError(f"{argument!r} is not key=value: {str(error).splitlines()[0]}") from None


def parse_value(key: str, text: str) -> object:
    """The value of key=text: the text itself, escaped, if the key holds text; else, and for null, the YAML in it."""
    holds = keys().get(key)
    if text not in ("", "null") and holds and holds.kind is str and not holds.many:
        return escaped(text)
    return OmegaConf.create(f"value: {text or 'null'}")["value"]


def _check_keys(overlay: DictConfig, known: dict, source: str, prefix: str = "") -> None:
    for key in overlay:
        name = f"{prefix}{key}"
        if key not in known:
            is_section = isinstance(OmegaConf.to_container(overlay)[key], dict)
            known_names = [one for one, value in walk(defaults()) if isinstance(value, dict) == is_section]
            # By its letters a part of a name, as lr of optim.base_lr, is less alike than another name of its length.
            parts = [one for one in known_names if one.startswith(prefix) and f"_{key}" in one.removeprefix(prefix)]
            likely, cutoff = (parts[:1], 0.0) if prefix and parts else (known_names, 0.5)
            raise ValueError(f"unknown key {name}{source}{suggest_key(name, likely, cutoff)}")
        if OmegaConf.is_interpolation(overlay, key) or OmegaConf.is_missing(overlay, key):
            continue
        if name in keys():
            keys()[name].check_kind(name, overlay[key], source)
        elif not OmegaConf.is_dict(overlay[key]):
            raise ValueError(f"{name}{source} is a section: give {name}.KEY=VALUE")
        elif name not in FREE_FORM:
            _check_keys(overlay[key], known[key], source, f"{name}.")


def check_ranks(cfg: DictConfig, ranks: int, given: str) -> None:
    """ValueError where a batch cannot be divided among the ranks; given: how the user has set their number."""
    batch, micro = cfg.train.batch_size, cfg.train.accumulate
    if batch % (ranks * micro):
        parts = given + (f" x train.accumulate={micro}" if micro > 1 else "")
        raise ValueError(f"train.batch_size={batch} is no multiple of {parts}: give another batch size")


def validate(cfg: DictConfig) -> None:
    """Refuses impossible combinations; each sentence names the key."""
    for name, key in keys().items():
        key.check_bounds(name, OmegaConf.select(cfg, name))
    NoiseSpec.parse(cfg.noise)
    check_values(cfg.data["values"], "data.values")
    channels = cfg.data.in_chans
    for key in ("mean", "std"):
        count = len(cfg.data[key])
        require(count == channels, f"data.{key} has {count} values for data.in_chans={channels}")
    patch = cfg.model.patch_size
    for key in ("crops.global_size", "crops.local_size", "model.pos_embed_size"):
        size = OmegaConf.select(cfg, key) or 0
        near = f"{key}={max(patch, round(size / patch) * patch)}"
        require(size % patch == 0, f"{key}={size} is no multiple of model.patch_size={patch}: take {near}")
    batch, micro = cfg.train.batch_size, cfg.train.accumulate
    require(batch % micro == 0, f"train.batch_size={batch} is no multiple of train.accumulate={micro}")
    for key in cfg.resume.allow:
        known = key in dict(walk(defaults())) or str(key).startswith("anchor.weights.")
        require(known, f"resume.allow={list(cfg.resume.allow)}: {key} is no key")
    for noise, weight in cfg.anchor.weights.items():
        WEIGHT.check_kind(f"anchor.weights.{noise}", weight)
    _validate_stages(cfg)


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


def _validate_stages(cfg: DictConfig) -> None:
    stages = cfg.curriculum.stages
    require(len(stages) > 0, "curriculum.stages is empty: give at least one stage")
    for number, stage in enumerate(stages):
        name, before = f"curriculum.stages[{number}]", stages[number - 1] if number else None
        for key in stage:
            check_choice(f"key of {name}", key, tuple(STAGE))
            if stage[key] is not None:
                STAGE[key].check_kind(f"{name}.{key}", stage[key])
                STAGE[key].check_bounds(f"{name}.{key}", stage[key])
        for key in ("view", "epochs", "dir"):
            given = stage.get(key) is not None
            require(given, f"{name}.{key} is not set (a scale's overlay sets the curriculum's epochs)")
        _check_keys(OmegaConf.create(_nest(stage.get("set") or {})), defaults(), f" in {name}.set")
        init = stage.get("init") or "scratch"
        require(before is not None or init == "scratch", f"{name}.init={init} needs a stage before it")
        stop = stage_end(stage)
        require(0 < stop <= stage.epochs, f"{name}.stop={stop} lies beyond its schedule of {stage.epochs} epochs")
        warmup = stage_overrides(cfg, stage.get("set") or {}).optim.warmup_epochs
        require(warmup <= stage.epochs, f"optim.warmup_epochs={warmup} is longer than {name}.epochs={stage.epochs}")
        if stage.get("from_epoch") is not None:
            end = stage_end(before) if before else 0
            within = init != "scratch" and 0 < stage.from_epoch <= end
            ends = f"within the stage before it, which ends at epoch {end}"
            require(within, f"{name}.from_epoch={stage.from_epoch} must lie {ends}")
        mix = stage.get("mix")
        belongs = (stage.view == "mix") == (mix is not None)
        require(belongs, f"{name}.mix: [start, end] belongs to view mix, and to it alone")
        require(mix is None or len(mix) == 2, f"{name}.mix={mix} must be [start, end], two fractions")
        NoiseSpec.parse(stage.get("noise") or cfg.noise)
        if stage.get("anchor"):
            _validate_anchor(cfg, number)
    folders = [str(Path(stage.dir)) for stage in stages]
    for folder in folders:
        require(folders.count(folder) == 1, f"two curriculum.stages have dir={folder}: give each a folder of its own")
    last = f"the last stage must train in output_dir={cfg.output_dir}, not in {stages[-1].dir}"
    require(folders[-1] == str(Path(cfg.output_dir)), last)


def _validate_anchor(cfg: DictConfig, number: int) -> None:
    stage, name = cfg.curriculum.stages[number], f"curriculum.stages[{number}]"
    noise = NoiseSpec.parse(stage.get("noise") or cfg.noise)
    compared = "the anchor compares the noisy view with the denoised one"
    require(stage.view == "noisy", f"{name}.anchor needs view noisy: {compared}")
    anchor = stage_overrides(cfg, stage.get("set") or {}).anchor
    require(str(noise) in anchor.weights, f"anchor.weights has no λ for {noise}: give anchor.weights.{noise}=NUMBER")
    if anchor.pretrained:
        given = cfg.model.pretrained is not None
        require(given, "anchor.pretrained=true needs model.pretrained, the file to anchor to")
        headless = "anchor.head=frozen: the file of model.pretrained has no head: take anchor.head=ema"
        require(anchor.head == "ema", headless)
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
    """Run and epoch of the frozen teacher of curriculum.stages[number]; for a file its path and None."""
    stage, before = cfg.curriculum.stages[number], cfg.curriculum.stages[number - 1] if number else None
    anchor = stage_overrides(cfg, stage.get("set") or {}).anchor
    if anchor.pretrained:
        return str(cfg.model.pretrained), None
    epoch = anchor.epoch or stage.get("from_epoch") or (stage_end(before) if before else None)
    return str(Path(anchor.run or before.dir)), epoch


def _nest(dotted: DictConfig | dict) -> dict:
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
    return OmegaConf.merge(cfg, OmegaConf.create(_nest(changes)))
