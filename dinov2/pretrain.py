"""The whole method on a folder of noisy images: denoiser, denoised copy, curriculum, evaluation, report.

    python -m dinov2.pretrain DIR
    run = dinov2.pretrain("DIR")                # a run's folder, as dinov2.embed and dinov2.load_backbone take it

DIR: images at any depth, with train/, val/ and class folders or without. First a plan is printed: what was found, every
setting with its reason, the disk it needs and the time, by the first batches on this machine. What cannot work is
refused before anything is trained. The same command goes on where a killed one was.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf

from dinov2 import CommandModule
from dinov2.config import load_config
from dinov2.data.splits import Layout
from dinov2.eval import EVALUATORS
from dinov2.outlook import check_disk, costs_of
from dinov2.run import stages
from dinov2.run.choices import Choice, Hardware, choose, choose_denoiser, choose_scale
from dinov2.run.commands import environment
from dinov2.run.options import (
    METHODS,
    PYTHON,
    Options,
    Parser,
    check_names,
    finish,
    number,
    number_from_0,
    split_words,
    tidy,
)
from dinov2.run.pipeline import CommandFailed, Runner, sums
from dinov2.run.subset import link, spread
from dinov2.run.survey import Survey, look_at
from utils import cli
from utils.files import write_text
from utils.images import MAX_PIXELS, list_images
from utils.locks import locked
from utils.readers import STACKS
from utils.text import count_of, duration

TRIAL_IMAGES = 256  # that a trial looks at, at least
# Keys that the denoiser must hear of too → the option that tells both.
TOLD_BY = {"data.root": "DIR", "data.val": "--val", "data.stack": "--stack"}
TOLD_BY |= {"data.in_chans": "--channels", "data.mixed": "--channels"}
# What Neighbor2Neighbor.outlook would say.
NO_DENOISER = {"verdict": [], "subsample": 1, "step_s": 0.0, "megapixel_s": 0.0}


@dataclass(frozen=True)
class Request:
    """What is asked for: the options of the command, None or empty where they are left out."""

    folder: str
    settings: tuple[str, ...]  # key=value of dinov2/configs/default.yaml, over all that is chosen
    output: str | Path | None = None
    noise: str = "none"
    method: Sequence[str] = ("nct",)
    scale: str | None = None
    epochs: int | None = None
    steps: int | None = None
    val: float | None = None
    group: str | None = None
    labels: str | None = None
    weights: str | None = None  # a backbone to continue from
    channels: str | int | None = None
    values: str | None = None
    stack: str = "refuse"
    subsample: int | None = None
    evaluate: Sequence[str] = ()
    seeds: Sequence[int] = ()
    gpus: int = 1
    dry_run: bool = False

    def options(self) -> Options:
        """Those that the stages know, as far as they do not depend on the images."""
        o = Options(noises=[self.noise], methods=list(self.method), seeds=list(self.seeds) or [None], gpus=self.gpus)
        o.data, o.steps, o.dry, o.scale = self.folder, self.steps, self.dry_run, self.scale or o.scale
        o.output = str(self.output or f"runs/{os.path.basename(self.folder)}{'-trial' if self.steps else ''}")
        o.trees, o.overlay = f"{o.output}/trees", f"{o.output}/plan.yaml"
        named = {"train.epochs": self.epochs, "data.group": self.group, "data.labels": self.labels}
        named |= {"model.pretrained": self.weights, "data.stack": None if self.stack == "refuse" else self.stack}
        o.overrides = [f"{key}={value}" for key, value in named.items() if value is not None]
        o.overrides += [word for word in self.settings if not word.startswith("eval.")]
        o.eval_overrides = [word for word in self.settings if word.startswith("eval.")]
        o.reading = ["--stack", self.stack] if self.stack != "refuse" else []
        return o

    def look(self, o: Options, layout: Layout, values: str) -> Survey:
        channels = None if self.channels is None else str(self.channels)
        limit = int(o.given("data.max_pixels") or MAX_PIXELS)
        return look_at(o.data, layout, channels, values, limit, o.given("data.index_cache"))


def pretrain(folder: Path | str, *settings: str, **options) -> Path:
    """Pretrains on the images below `folder`; the folder of the last method's run.

    settings: key=value of dinov2/configs/default.yaml. options: those of `python -m dinov2.pretrain --help` by the
    names of Request, as output="runs/scans", method=["nc", "nct"], steps=20. ValueError, before anything is trained,
    for what cannot work; CommandFailed where a command ended with an error.
    """
    request = Request(tidy(str(folder)), settings, **options)
    o = request.options()
    check_early(request, o)
    val = request.val or o.of_scale("data.val")
    layout = Layout(val, o.chosen("data.group"), o.chosen("data.labels"), stack=request.stack)
    survey = request.look(o, layout, o.given("data.values") or request.values or o.of_scale("data.values") or "auto")
    total = survey.count
    if request.steps and not o.dry and (names := trial_images(request, o)):
        o.data = f"{o.output}/images-{len(names)}"
        link(request.folder, names, o.data, layout.labels)
        if layout.labels:
            o.overrides.append(f"data.labels={o.data}/labels.csv")  # not one of this name in the working folder
        survey = request.look(o, replace(survey.layout, labels=o.given("data.labels")), str(survey.rule))
    plan = Plan(o, survey, choices_of(request, o, survey), total)
    with locked(o.output, "-quickstart"):
        plan.fill(list(request.evaluate))
        plan.describe()
        return plan.run(request.subsample)


def check_early(request: Request, o: Options) -> None:
    """ValueError for what can be refused without a look at the images."""
    inside, root = Path(o.output).resolve(), Path(request.folder).resolve()
    if root in (inside, *inside.parents):
        raise ValueError(f"the output {o.output} lies inside {root}, whose images would be read too: give --output")
    check_names("--stack", [request.stack], STACKS)
    if request.weights is not None and not Path(request.weights).exists():
        way = "name weights that are there, see docs/public_weights.md"
        raise ValueError(f"--from {request.weights} is missing: {way}")
    for word in request.settings:
        if "=" not in word:
            raise ValueError(f"{word} is no key=value")
        if instead := TOLD_BY.get(word.partition("=")[0]):
            raise ValueError(f"{word}: give it as {instead}, which the denoiser hears of too")
    probe = replace(o, scale=request.scale or "imagenette", evals=list(request.evaluate), data="x")
    probe.overrides, probe.eval_overrides = list(o.overrides), list(o.eval_overrides)
    finish(probe)
    load_config([probe.scale, *o.overrides, *o.eval_overrides], validated=False)


def trial_images(request: Request, o: Options) -> list[str]:
    """The images that a trial is made on; none where it is all of them, as where the user has a denoised copy."""
    if o.given("data.denoised_root"):
        return []
    relatives = list_images(request.folder, request.stack)
    wanted = max(TRIAL_IMAGES, request.steps * int(o.given("train.batch_size") or 16))
    return spread(relatives, wanted) if len(relatives) > 1.5 * wanted else []


def choices_of(request: Request, o: Options, survey: Survey) -> list[Choice]:
    scale, weights = request.scale, request.weights or o.given("model.pretrained")
    hardware = Hardware.here()
    first = Choice("scale", scale, "as asked") if scale else choose_scale(survey, hardware.gpu, weights)
    o.scale = str(first.value)
    base = OmegaConf.to_container(OmegaConf.load(o.scale_file))
    given = o.settings
    patch = int(given.get("model.patch_size", base.get("model", {}).get("patch_size", 16)))
    if weights is not None:
        from dinov2.models.weights import read_weights

        patch = read_weights(weights).model["patch_size"]
    return [first, *choose(survey, o.scale, base, hardware, given, patch, weights)]


@dataclass
class Plan:
    """What will be done, and how it is said."""

    o: Options
    survey: Survey
    choices: list[Choice]
    total: int  # images of the whole folder

    @property
    def copy(self) -> str | None:
        """A denoised copy that the user has made, by whatever denoiser."""
        return self.o.given("data.denoised_root")

    def fill(self, evaluate: list[str]) -> None:
        """The options that the images decide, and <output>/plan.yaml, the overlay that the runs are trained under."""
        o, survey = self.o, self.survey
        o.overrides += [] if survey.layout.val is None else [f"data.val={survey.layout.val}"]
        if survey.layout.only is not None:
            o.overrides.append("data.mixed=keep")
            o.reading += ["--mixed", "keep"]
        o.copies = "npy" if survey.channels not in (1, 3) else ""
        o.denoiser, self.denoiser_reason = choose_denoiser(survey, o.steps)
        labelled = survey.labelled and survey.val is not None
        if not labelled and (asked := [name for name in evaluate if EVALUATORS[name]]):
            ways = "class folders or --labels FILE.csv, and --val 0.1"
            raise ValueError(f"--eval {asked[0]} needs labels and val images: {ways}")
        o.evals = evaluate or [*(["linear", "knn"] if labelled else []), "label_free", "pca", "map"]
        self.write()
        finish(o)
        size = stages.check_settings(o).crops.global_size
        if size > 2 * survey.side:
            enlarged = f"crops.global_size={size} would enlarge images of {survey.side} px more than twice"
            raise ValueError(f"{enlarged}: give a smaller one, or leave it and --scale out")

    def write(self) -> None:
        content = OmegaConf.create({})
        for choice in self.choices[1:]:
            OmegaConf.update(content, choice.key, choice.value)
        scale, *others = self.choices
        head = [f"# Chosen by python -m dinov2.pretrain, over the scale {scale.value} ({scale.reason}):"]
        head += [f"#   {choice.key}: {choice.reason}" for choice in others]
        write_text(self.o.overlay, "\n".join(head) + "\n" + OmegaConf.to_yaml(content))

    # --- in words ---------------------------------------------------------------------------------------------------
    def describe(self) -> None:
        o, survey = self.o, self.survey
        trial = survey.count < self.total
        print(f"PLAN for {o.data}, written to {o.overlay}")
        part = f"a trial on {survey.count} of {self.total} images, linked in {o.data}"
        some = part if trial else f"{survey.count} images"
        parts = f"{len(survey.train.relatives)} train, {len(survey.val.relatives)} val" if survey.val else "all train"
        labels = f"{len(survey.train.classes)} classes" if survey.labelled else "no labels"
        print(f"  images    {some}: {parts}, {labels}")
        print(f"  sizes     {_describe_sizes(survey)}; {count_of(survey.channels, 'channel')}")
        for note in survey.notes:
            print(f"  {'' if ':' in note[:9] else 'note: '}{note}")
        print(f"  noise     {o.noises[0]}; methods: {', '.join(o.methods)}; evaluation: {', '.join(o.evals)}")
        if self.copy:
            print(f"  denoiser  none: the denoised copy is {self.copy}")
        else:
            print(f"  denoiser  {' '.join(o.denoiser)}\n            {self.denoiser_reason}")
        for choice in self.choices:
            value, reason = choice.value, choice.reason
            if choice.key in o.settings:
                value, reason = o.settings[choice.key], "a trial" if o.steps else "as asked"
            print(f"  {choice.key} = {value}    {reason}")
        print("Any of it is changed by key=value, --scale, --method …; see --help.", flush=True)

    # --- what it costs ----------------------------------------------------------------------------------------------
    def run(self, subsample: int | None) -> Path:
        o, started = self.o, time.monotonic()
        last = stages.run_folder(o, o.noises[0], o.methods[-1], o.seeds[-1])
        run = Runner(o.output, o.dry).run
        parts = {"denoiser": stages.train_denoiser, "noise": stages.check_noise, "denoised copy": stages.denoise}
        parts = {} if self.copy else parts
        parts |= {"pretraining": stages.pretrain, "evaluation": stages.evaluate, "report": stages.report}
        o.denoiser += ["--subsample", str(subsample)] if subsample else []
        if not o.dry:
            self.outlook()
        for name, stage in parts.items():
            print(f"== {name}", flush=True)
            run(stage(o))
        if not o.dry:
            print(f"== {duration(time.monotonic() - started)}; the report: {o.output}/report.html")
            embed = shlex.join(["python", "-m", "dinov2.embed", last, o.data, "--output", "features.csv"])
            print(f"== features of this or any other folder: {embed}", flush=True)
        return Path(last)

    def outlook(self) -> None:
        """Says what it costs, and decides by the noise whether the denoiser learns from every second pixel. Kept in
        <output>/outlook.json, so that a call that goes on is neither decided anew nor delayed.
        """
        o, path = self.o, Path(self.o.output, "outlook.json")
        of = sums(o.overlay) + json.dumps([o.denoiser, o.reading, o.data, o.methods, o.seeds, o.gpus, o.overrides])
        found = json.loads(path.read_text()) if path.is_file() else {}
        if found.get("of") != of:
            found = NO_DENOISER if self.copy else self._ask_denoiser()
            found = found | {"of": of, "costs": costs_of(o, self.survey, found)}
            write_text(path, json.dumps(found))
        if found["verdict"]:
            print("noise: " + "; ".join(found["verdict"]))
        if "--subsample" not in o.denoiser and found["subsample"] > 1:
            o.denoiser += ["--subsample", str(found["subsample"])]
            print(f"  denoiser --subsample {found['subsample']}: by the verdict above")
        need, seconds = found["costs"].pop("disk"), found["costs"]
        check_disk(o.output, need)
        words = ", ".join(f"{name} {duration(part)}" for name, part in seconds.items())
        total = duration(sum(seconds.values()))
        print(f"time: about {total} by the first batches on this machine, evaluation not counted ({words})", flush=True)

    def _ask_denoiser(self) -> dict:
        command = stages.denoiser_command(self.o, self.o.noises[0])
        command[0] = "Neighbor2Neighbor.outlook"
        done = subprocess.run([PYTHON, "-m", *command], stdout=subprocess.PIPE, env=environment(), text=True)
        if done.returncode:
            raise CommandFailed(done.returncode)
        return json.loads(done.stdout.splitlines()[-1])


def _describe_sizes(survey: Survey) -> str:
    """The shapes of the sample in words."""
    shapes = sorted(survey.shapes)
    if len(shapes) == 1:
        return f"{shapes[0][0]} x {shapes[0][1]} px"
    low, high = (f"{side[0]} x {side[1]}" for side in (shapes[0], shapes[-1]))
    return f"{len(shapes)} sizes, {low} to {high} px, median shorter side {survey.side} (by {survey.looked_at} images)"


# --- the command line -----------------------------------------------------------------------------------------------
def make_parser() -> Parser:
    usage, raw = "%(prog)s DIR [options] [key=value ...]", argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m dinov2.pretrain", usage, __doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("--output", metavar="DIR", help="runs, results and report [runs/<name of DIR>]")
    add("--noise", metavar="NAME", default="none", help="added while loading, to study one [none: noisy by nature]")
    add("--method", action="append", metavar="NAME", help=f"{', '.join(METHODS[:-1])}; may be repeated [nct]")
    add("--scale", metavar="NAME", help="an overlay of dinov2/configs, or a YAML [by number and size of the images]")
    add("--epochs", type=number, metavar="N", help="of the whole schedule [100; published ones for many large images]")
    add("--steps", type=number, metavar="N", help="a trial: every schedule cut to about N iterations, of large folders "
        f"{TRIAL_IMAGES} images or more")  # fmt: skip
    add("--val", type=float, metavar="FRACTION", help="of the images become val [none; 0.1 where there are labels]")
    add("--group", metavar="NAME", help="never torn apart by val: folder, a column of the CSV, a regular expression")
    add("--labels", metavar="CSV", help="path,label[,split] [the folders are the classes]")
    add("--from", dest="weights", metavar="WEIGHTS", help="a backbone to continue from, see docs/public_weights.md")
    add("--channels", metavar="N", help="keep images of N channels, or of the majority [all have the same number]")
    add("--values", metavar="RULE", help="auto, full, percentile, range=[lo,hi], log [the scale's, else auto]")
    add("--stack", default="refuse", metavar="HOW", help="files of several pages: refuse, pages, max [refuse]")
    add("--subsample", type=number, metavar="N", help="the denoiser learns from every N-th pixel [2 where noise is "
        "correlated over one]")  # fmt: skip
    evals = "may be repeated [linear, knn with labels; label_free, pca, map]"
    add("--eval", dest="evaluate", action="append", metavar="NAME", help=evals)
    add("--seed", dest="seeds", action="append", type=number_from_0, metavar="N", help="may be repeated [the scale's]")
    add("--gpus", type=number, default=1, metavar="N", help="processes, one per GPU [1]")
    add("--dry-run", action="store_true", help="print plan and commands, train nothing")
    return parser


def main(argv: list[str]) -> int:
    parser = make_parser()
    given, words = split_words(argv, parser)
    folders = [word for word in words if "=" not in word or os.path.isdir(word)]
    found = vars(parser.parse_args(given))
    if len(folders) != 1:
        raise ValueError(f"give one folder of images, not {len(folders)}: python -m dinov2.pretrain DIR; see --help")
    channels = found["channels"]
    if channels not in (None, "majority") and not (channels.isdecimal() and int(channels)):
        raise ValueError(f"--channels {channels}: give a whole number, or majority")
    words.remove(folders[0])
    try:
        pretrain(folders[0], *words, **{name: value for name, value in found.items() if value is not None})
    except CommandFailed as failure:
        print(failure, file=sys.stderr)
        return failure.code
    return 0


sys.modules[__name__].__class__ = CommandModule  # dinov2.pretrain(...) is pretrain(...)

if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
