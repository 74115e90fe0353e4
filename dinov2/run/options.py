"""Options of the stages: those of the scripts in exps/, and what `python -m dinov2.pretrain` sets for them.

Paths are the caller's: parse() makes them what they are from the project's root, where the scripts run their commands.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf

from dinov2.config import CONFIGS, overlay_names
from dinov2.eval import EVALUATORS
from utils.noise import NoiseSpec
from utils.text import count_of, did_you_mean

METHODS = ("dinov2", "n2n", "nc", "nct", "clean")
# What runs the commands: by its short name, where that is the same program.
PYTHON = "python" if shutil.which("python") == sys.executable else sys.executable
# Of a scale, where --data names none.
DATA = {"imagenette": "imagenette96", "mstar": "mstar64", "imagenet1k": "imagenet"}
DENOISERS = {  # of a scale: the published schedules, and what fits images too small for them
    # So short a training starts from full-sized weights: the published ones, a tenth of that, take some hundred steps
    # to come to life.
    "quickstart": "--epochs 10 --batch-size 16 --crop 32 --depth 3 --init-scale 1",
    "imagenette": "--epochs 8 --batch-size 16 --crop 96 --depth 4 --init-scale 1",
    "mstar": "--epochs 20 --batch-size 16 --crop 64 --depth 3 --init-scale 1 --subsample 2 --values log=[1,255]",
    "imagenet1k": "--config Neighbor2Neighbor/imagenet1k.yaml",
}
PUBLISHED = "--config Neighbor2Neighbor/published.yaml"  # of all other scales


@dataclass
class Options:
    """What the stages are asked for. Lists hold as many as are to be run, one after another."""

    data: str = ""  # folder of images
    output: str = ""  # runs, results and report
    scale: str = "quickstart"  # name or path of an overlay
    overlay: str = ""  # path of another, over the scale
    noises: list[str] = field(default_factory=lambda: ["gauss100"])
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    seeds: list[int | None] = field(default_factory=lambda: [None])  # None: the scale's
    evals: list[str] = field(default_factory=lambda: ["linear", "knn", "pca"])
    floor: str = ""
    checkpoints: str = "last"
    gpus: int = 1
    jobs: int = 0  # runs side by side; 0: the scale's
    partition: str = ""
    time: str = ""
    steps: int | None = None
    per_class: int | None = None
    channels: int | None = None
    sides: tuple[int, int] | None = None
    max_pixels: int | None = None
    dry: bool = False
    overrides: list[str] = field(default_factory=list)  # key=value of a run
    eval_overrides: list[str] = field(default_factory=list)  # of an evaluation
    denoiser: list[str] = field(default_factory=list)  # options of Neighbor2Neighbor.train; none: the scale's
    reading: list[str] = field(default_factory=list)  # options of the tools that say how files are read
    copies: str = ""  # --format of the copies; none: npy for files of more than 8 bits, else png
    trees: str = ""  # folder of noisy and denoised copies; none: that of the data
    whole: str = ""  # the data that --per-class takes its part of
    data_tree: str = ""  # the state of the data, once a step has asked for it: a million images take a while

    @property
    def scale_file(self) -> Path:
        return Path(self.scale) if self.scale.endswith((".yaml", ".yml")) else CONFIGS / f"{self.scale}.yaml"

    @property
    def scale_name(self) -> str:
        return self.scale_file.stem

    def of_scale(self, key: str) -> Any:
        """A key of the scale's own file; None where it does not set it."""
        return OmegaConf.select(OmegaConf.load(self.scale_file), key)

    def chosen(self, key: str) -> Any:
        """A key by the command line or, where that has none, by the scale's own file; None where neither sets it."""
        text = self.given(key)
        return self.of_scale(key) if text is None else text

    def given(self, key: str) -> str | None:
        """The text of key=value on the command line."""
        return self.settings.get(key)

    @property
    def settings(self) -> dict[str, str]:
        """Text by key of the command line's key=value; of several for a key the last one counts."""
        return {key: text for key, _, text in (word.partition("=") for word in self.overrides)}


# --- the command line -----------------------------------------------------------------------------------------------
HELP = """\
  NOISE...  --noise NOISE   gauss50 gauss100 gauss255 shot10 shot3 shot1 speckle0.4 speckle0.7 speckle1.0 or any level;
                            none: the images are noisy by nature                         [{noises}]
  --scale NAME              {scales}, or a YAML
                                                                                         [{scale}]
  --data DIR                folder of images, {{train,val}}/<class>/<image> or any other   [the scale's]
  --channels N              of the images [3]; with it, copies are .npy, not rounded to 8 bits; N other than 3 needs
                            data.mean=[...] and data.std=[...], N numbers each
  --sides LO,HI             the denoiser learns from images with both sides in this range, pixels [the scale's]
  --max-pixels N            of an image file; one that claims more is refused            [8192 x 8192]
  --output DIR              runs, results and report             [runs/<scale> or runs/<name of DIR>]
  --method NAME             dinov2, n2n, nc, nct, clean; may be repeated                 [{methods}]
  --seed N                  of weights, crops and order; may be repeated: one run of each method for each  [the scale's]
  --eval NAME               linear, knn, log_regression, pca, robustness; may be repeated   [{evals}]
  --floor WEIGHTS           a public frozen backbone, evaluated as a third floor         [none]
  --checkpoints WHICH       last, best, all or an epoch                                  [{checkpoints}]
  --gpus N                  processes of the pretraining, one per GPU                    [{gpus}]
  --jobs N                  runs trained and evaluated side by side on one machine, each with its part of the cores
                                                                                         [1; quickstart: up to 3]
  --partition P --time LIMIT  Slurm's, for the scripts that submit jobs
  --steps N                 a trial: every schedule cut to about N iterations
  --per-class N             a trial: the first N images of each class
  --dry-run                 print the commands, run nothing
  key=value                 any key of dinov2/configs/default.yaml
"""


class Parser(argparse.ArgumentParser):
    """One whose errors are ValueErrors, in our words."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            hint = did_you_mean(unknown[1], self._option_string_actions, ": ")
            raise ValueError(f"unknown option {unknown[1]}{hint}; see --help")
        raise ValueError(message.removeprefix("argument "))


def number(text: str, least: int = 1) -> int:
    """A whole number, for argparse."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"takes a whole number of at least {least}, not {text}")
    return int(text)


number_from_0 = partial(number, least=0)


def pair(text: str) -> tuple[int, int]:
    low, _, high = text.partition(",")
    if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
        raise argparse.ArgumentTypeError(f"takes two whole numbers such as 64,256, not {text}")
    return int(low), int(high)


def make_parser(defaults: Options) -> Parser:
    parser = Parser(add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("--noise", dest="noises", action="append")
    add("--method", dest="methods", action="append")
    add("--seed", dest="seeds", action="append", type=number_from_0)
    add("--eval", dest="evals", action="append")
    for name in ("scale", "data", "output", "floor", "checkpoints", "partition", "time"):
        add(f"--{name}", default=getattr(defaults, name))
    for name in ("gpus", "jobs", "steps", "per-class", "channels", "max-pixels"):
        add(f"--{name}", type=number, default=getattr(defaults, name.replace("-", "_")))
    add("--sides", type=pair)
    add("--dry-run", dest="dry", action="store_true")
    return parser


def help_text(about: str, defaults: Options) -> str:
    """About a script, and every option with the script's own default in brackets."""
    lists = {name: " ".join(getattr(defaults, name)) for name in ("noises", "methods", "evals")}
    plain = {name: getattr(defaults, name) for name in ("scale", "checkpoints", "gpus")}
    options = HELP.format(scales=", ".join(scale_names()), **lists, **plain)
    return f"{about.rstrip()}\n\nOptions of every stage (a stage ignores what it does not need):\n{options}"


def scale_names() -> list[str]:
    return [name for name in overlay_names() if name not in METHODS]


def split_words(argv: list[str], parser: Parser) -> tuple[list[str], list[str]]:
    """Options as --name=value, whatever the value begins with, and the other words. ValueError: a value is missing."""
    taking = {name for name, action in parser._option_string_actions.items() if action.nargs != 0}
    options, words, rest = [], [], iter(argv)
    for word in rest:
        if word in taking:
            value = next(rest, None)
            if value is None:
                raise ValueError(f"{word} needs a value")
            options.append(f"{word}={value}")
        else:
            (options if word.startswith("-") else words).append(word)
    return options, words


def parse(argv: list[str], defaults: Options, caller: str, root: str) -> Options:
    """The options of a script. caller: the folder that paths are seen from; root: the one that commands are run in."""
    parser = make_parser(defaults)
    given, words = split_words(argv, parser)
    found = {name: value for name, value in vars(parser.parse_args(given)).items() if value is not None}
    settings = [word for word in words if "=" in word]
    found["noises"] = found.get("noises", []) + [word for word in words if "=" not in word] or defaults.noises
    options = Options(**vars(defaults) | found)
    options.overrides = [word for word in settings if not word.startswith("eval.")]
    options.eval_overrides = [word for word in settings if word.startswith("eval.")]
    for name in ("data", "output", "floor", *(["scale"] if options.scale.endswith((".yaml", ".yml")) else [])):
        if path := getattr(options, name):
            setattr(options, name, from_root(path, caller, root))
    finish(options)
    return options


def from_root(path: str, caller: str, root: str) -> str:
    """A path of the caller, seen from the project's root."""
    return tidy(tidy(os.path.join(caller, path)).removeprefix(f"{root}/"))


def tidy(path: str) -> str:
    """A path that ends in a name, and is no option to any tool."""
    path = path.rstrip("/") or "/"
    if os.path.basename(path) in (".", ".."):
        path = os.path.realpath(path)
    return f"./{path}" if path.startswith("-") else path


def finish(options: Options) -> None:
    """Fills what follows from other options. ValueError for what cannot be."""
    if not options.scale_file.is_file():
        hint = did_you_mean(options.scale, scale_names(), ": ")
        raise ValueError(f"no scale {options.scale}{hint or ': there is no ' + str(options.scale_file)}")
    for noise in options.noises:
        NoiseSpec.parse(noise)
    check_names("--method", options.methods, METHODS)
    check_names("--eval", options.evals, tuple(EVALUATORS))
    _set_channels(options)
    # A core and more for each of dinov2, n2n and clean, which need nothing of each other.
    options.jobs = options.jobs or (min(3, os.cpu_count() or 1) if options.scale_name == "quickstart" else 1)
    _place_folders(options)
    _shorten_trial(options)
    for noise in options.noises:
        check_lambda(options, noise)


def check_names(option: str, names: list[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{option} {name} is none of {', '.join(known)}{did_you_mean(name, known, ': ')}")


def check_lambda(options: Options, noise: str) -> None:
    """ValueError where NCT is asked for and the anchor's λ for the noise is neither in the scale nor given."""
    name = str(NoiseSpec.parse(noise))
    if "nct" not in options.methods or options.given(f"anchor.weights.{name}") is not None:
        return
    if name not in (options.of_scale("anchor.weights") or {}) and options.given("anchor.weights") is None:
        others = " ".join(f"--method {method}" for method in options.methods if method != "nct")
        raise ValueError(
            f"nct needs a λ for {name}, and {options.scale_file} has none: give anchor.weights.{name}=NUMBER"
            + (f", or leave nct out: {others}" if others else "")
        )


def _set_channels(options: Options) -> None:
    channels = options.channels
    if channels:
        if channels != 3 and None in (options.given("data.mean"), options.given("data.std")):
            numbers = f"{count_of(channels, 'number')} each"
            raise ValueError(f"--channels {channels} needs data.mean=[...] and data.std=[...], {numbers}")
        options.overrides.append(f"data.in_chans={channels}")
        options.copies = "npy"
    if options.max_pixels:
        options.overrides.append(f"data.max_pixels={options.max_pixels}")


def _place_folders(options: Options) -> None:
    """Where the data is and where runs and copies go."""
    trial = (f"-{options.per_class}" if options.per_class else "") + ("-trial" if options.steps else "")
    options.output = options.output or f"runs/{os.path.basename(options.data) or options.scale_name}{trial}"
    if not options.data:
        digits = f"{options.output}/digits" if options.scale_name == "quickstart" else ""
        options.data = digits or DATA.get(options.scale_name, "mini-imagenet")
    if options.per_class:
        options.whole, name = options.data, os.path.basename(options.data)
        options.data = f"{options.output}/{name}-{options.per_class}"
    beside = os.path.dirname(options.data) or "."
    writable = not os.path.isdir(beside) or os.access(beside, os.W_OK)
    options.trees = options.trees or (beside if writable else f"{options.output}/trees")


def _shorten_trial(options: Options) -> None:
    """A trial: two epochs of a denoised run, a restart after the first, and one noisy epoch."""
    if options.steps or options.per_class:
        options.overrides.append("trial=true")
    if options.steps:
        options.overrides += list(_short_schedule(options.steps))
        options.eval_overrides += ["eval.linear.epochs=1", f"eval.linear.epoch_length={options.steps}"]


def _short_schedule(steps: int) -> Iterator[str]:
    yield from ("train.epochs=2", f"train.epoch_length={(steps + 1) // 2}", "train.eval_every=1")
    yield from ("curriculum.restart_epoch=1", "curriculum.noisy_epochs=1", "anchor.epoch=1")
    yield "optim.head_warmup_epochs=0"  # the backbone is tried too
    for key in ("teacher.warmup_temp_epochs=1", "optim.warmup_epochs=0"):
        yield from (key, f"curriculum.noisy_set.{key}")
