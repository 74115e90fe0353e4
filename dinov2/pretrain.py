"""The whole method on a folder of noisy images: denoiser, denoised copy, curriculum, evaluation, report.

    python -m dinov2.pretrain DIR
    run = dinov2.pretrain("DIR")                # a run's folder, as dinov2.embed and dinov2.load_backbone take it

DIR: images at any depth, with train/, val/ and class folders or without. First a plan is printed: what was found, every
setting with its reason, the disk it needs and the time, by the first batches on this machine. What cannot work is
refused before anything is trained. The same command goes on where a killed one was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from dinov2 import CommandModule
from dinov2.data.splits import Layout
from dinov2.run import stages
from dinov2.run.choices import Choice, Hardware, choose, choose_denoiser, choose_scale
from dinov2.run.options import (
    METHODS,
    PYTHON,
    Options,
    Parser,
    did_you_mean,
    finish,
    number,
    seed,
    split_words,
    tidy,
)
from dinov2.run.pipeline import CommandFailed, Runner, environment
from dinov2.run.subset import link, spread
from dinov2.run.survey import Survey, look_at
from utils import cli
from utils.files import atomic_path
from utils.images import list_images
from utils.locks import locked
from utils.readers import STACKS

MEASURED_S = 3.0  # seconds of training steps that the estimate is made of
TRIAL_IMAGES = 256  # that a trial looks at, at least


def pretrain(
    folder: Path | str,
    *settings: str,
    output: Path | str | None = None,
    noise: str = "none",
    method: tuple[str, ...] | list[str] = ("nct",),
    scale: str | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    val: float | None = None,
    group: str | None = None,
    labels: str | None = None,
    weights: str | None = None,
    channels: str | int | None = None,
    values: str = "auto",
    stack: str = "refuse",
    subsample: int | None = None,
    evaluate: tuple[str, ...] | list[str] = (),
    seeds: tuple[int, ...] | list[int] = (),
    gpus: int = 1,
    dry_run: bool = False,
) -> Path:
    """Pretrains on the images below `folder`; the folder of the last method's run.

    settings: key=value of dinov2/configs/default.yaml, over all that is chosen. weights: a backbone to continue from.
    The others are the command's options, see `python -m dinov2.pretrain --help`. ValueError, before anything is
    trained, for what cannot work; CommandFailed where a command ended with an error.
    """
    root = tidy(str(folder))
    options = Options(noises=[noise], methods=list(method), seeds=list(seeds) or [None], gpus=gpus, dry=dry_run)
    options.output = str(output) if output else f"runs/{os.path.basename(root)}{'-trial' if steps else ''}"
    _check_place(root, options.output)
    overrides = [f"train.epochs={epochs}"] if epochs else []
    overrides += [f"{key}={text}" for key, text in (("data.group", group), ("data.labels", labels)) if text is not None]
    options.overrides = [*overrides, *(word for word in settings if not word.startswith("eval."))]
    options.eval_overrides = [word for word in settings if word.startswith("eval.")]
    layout = Layout(val, options.given("data.group"), options.given("data.labels"), stack=stack)
    _check_early(options, scale, weights, stack, list(evaluate))
    found = survey = look_at(
        root, layout, None if channels is None else str(channels), options.given("data.values") or values
    )
    trial = _trial_images(root, stack, steps, options.given("train.batch_size")) if steps else []
    if trial and not dry_run:
        root = f"{options.output}/images-{len(trial)}"
        link(folder, trial, root, layout.labels)
        layout = Layout(survey.layout.val, layout.group, layout.labels and "labels.csv", 0, stack, survey.layout.only)
        found = look_at(root, layout, None if channels is None else str(channels), str(survey.rule))
    plan = Plan(options, found, _choices(options, found, scale, weights), survey.count)
    plan.fill(root, steps, list(evaluate), weights, stack, layout)
    plan.describe(root, bool(trial))
    return plan.run(subsample)


def _check_place(root: str, output: str) -> None:
    inside = Path(output).resolve()
    if Path(root).resolve() in (inside, *inside.parents):
        raise ValueError(f"the output {output} lies inside {root}, whose images would then be read too: give --output")


def _check_early(o: Options, scale: str | None, weights: str | None, stack: str, evaluate: list[str]) -> None:
    """What can be refused without a look at the images."""
    if stack not in STACKS:
        raise ValueError(f"--stack {stack} is none of {', '.join(STACKS)}{did_you_mean(stack, STACKS)}")
    if weights is not None and not Path(weights).exists():
        raise ValueError(f"--from {weights} is missing: name a file or folder of weights, see docs/public_weights.md")
    if bare := next((word for word in o.overrides + o.eval_overrides if "=" not in word), None):
        raise ValueError(f"{bare} is no key=value")
    if key := next(
        (key for key in ("data.val", "data.in_chans", "data.mixed", "data.stack", "data.root") if o.given(key)), None
    ):
        instead = {"data.root": "DIR", "data.in_chans": "--channels", "data.mixed": "--channels"}.get(
            key, "--" + key[5:]
        )
        raise ValueError(f"{key}: give it as {instead}, which the denoiser hears of too")
    probe = Options(**vars(o) | {"scale": scale or "imagenette", "evals": evaluate or ["pca"], "data": "x"})
    probe.overrides, probe.eval_overrides = list(o.overrides), list(o.eval_overrides)
    finish(probe)
    from dinov2.config import load_config  # here, as it loads slowly

    load_config([probe.scale, *o.overrides, *o.eval_overrides], validated=False)


def _trial_images(root: str, stack: str, steps: int, batch: str | None) -> list[str]:
    """The images that a trial is made on; none where it is all of them."""
    relatives = list_images(root, stack)
    wanted = max(TRIAL_IMAGES, steps * int(batch or 16))
    return spread(relatives, wanted) if len(relatives) > 1.5 * wanted else []


def _choices(o: Options, survey: Survey, scale: str | None, weights: str | None) -> list[Choice]:
    first = Choice("scale", scale, "as asked") if scale else choose_scale(survey, weights)
    o.scale = str(first.value)
    base = OmegaConf.to_container(OmegaConf.load(o.scale_file))
    given = dict(word.split("=", 1) for word in o.overrides)
    patch = int(given.get("model.patch_size", base.get("model", {}).get("patch_size", 16)))
    if weights is not None:
        from dinov2.models.weights import read_weights

        patch = read_weights(weights).model["patch_size"]
    return [first, *choose(survey, base, Hardware.here(), given, patch, weights)]


@dataclass
class Plan:
    """What will be done, and how it is said."""

    o: Options
    survey: Survey
    choices: list[Choice]
    total: int  # images of the whole folder

    def fill(
        self, root: str, steps: int | None, evaluate: list[str], weights: str | None, stack: str, layout: Layout
    ) -> None:
        """The options of the stages, and <output>/plan.yaml, the overlay that the runs are trained under."""
        o, survey = self.o, self.survey
        o.data, o.steps, o.trees = root, steps, f"{o.output}/trees"
        named = {"data.val": survey.layout.val, "data.labels": layout.labels, "model.pretrained": weights}
        named |= {"data.stack": None if stack == "refuse" else stack}
        named |= {"data.mixed": "keep" if survey.layout.only is not None else None}
        o.overrides += [f"{key}={value}" for key, value in named.items() if value is not None]
        o.reading = (["--stack", stack] if stack != "refuse" else []) + (
            ["--mixed", "keep"] if survey.layout.only is not None else []
        )
        o.copies = "npy" if survey.channels not in (1, 3) else ""
        o.denoiser, self.denoiser_reason = choose_denoiser(survey, steps)
        labelled = survey.labelled and survey.val is not None
        o.evals = evaluate or [*(["linear", "knn"] if labelled else []), "label_free", "pca", "map"]
        if not labelled and (asked := [name for name in evaluate if name in stages.NEED_LABELS]):
            raise ValueError(
                f"--eval {asked[0]} needs labels and val images: class folders or --labels FILE.csv, --val 0.1"
            )
        o.overlay = f"{o.output}/plan.yaml"
        self.write()
        finish(o)
        stages.check_settings(o)

    def write(self) -> None:
        content = OmegaConf.create({})
        for choice in self.choices[1:]:
            OmegaConf.update(content, choice.key, choice.value)
        scale, *others = self.choices
        head = [f"# Chosen by python -m dinov2.pretrain, over the scale {scale.value} ({scale.reason}):"]
        head += [f"#   {choice.key}: {choice.reason}" for choice in others]
        path = Path(self.o.overlay)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text("\n".join(head) + "\n" + OmegaConf.to_yaml(content))

    # --- in words ---------------------------------------------------------------------------------------------------
    def describe(self, root: str, trial: bool) -> None:
        o, survey = self.o, self.survey
        print(f"PLAN for {root}, written to {o.overlay}")
        some = f"a trial of {survey.count} of {self.total} images, in {root}" if trial else f"{survey.count} images"
        parts = f"{len(survey.train.relatives)} train, {len(survey.val.relatives)} val" if survey.val else "all train"
        labels = f"{len(survey.train.classes)} classes" if survey.labelled else "no labels"
        print(f"  images    {some}: {parts}, {labels}")
        print(f"  sizes     {_sizes(survey)}; {survey.channels} channel{'s' * (survey.channels > 1)}")
        for note in survey.notes:
            print(f"  {'' if ':' in note[:9] else 'note: '}{note}")
        print(f"  noise     {o.noises[0]}; methods: {', '.join(o.methods)}; evaluation: {', '.join(o.evals)}")
        print(f"  denoiser  {' '.join(o.denoiser)}\n            {self.denoiser_reason}")
        given = {word.partition("=")[0]: word.partition("=")[2] for word in o.overrides}
        for choice in self.choices:
            value, reason = choice.value, choice.reason
            if choice.key in given:
                value, reason = given[choice.key], "a trial" if o.steps else "as asked"
            print(f"  {choice.key} = {value}    {reason}")
        print("Any of it is changed by key=value, --scale, --method …; see --help.", flush=True)

    # --- what it costs ----------------------------------------------------------------------------------------------
    def run(self, subsample: int | None) -> Path:
        o, started = self.o, time.monotonic()
        last = stages.run_folder(o, o.noises[0], o.methods[-1], o.seeds[-1])
        run = Runner(o.output, o.dry).run
        parts = {"denoiser": stages.train_denoiser, "noise": stages.check_noise, "denoised copy": stages.denoise}
        parts |= {"pretraining": stages.pretrain, "evaluation": stages.evaluate, "report": stages.report}
        if o.dry:
            for stage in parts.values():
                run(stage(o))
            return Path(last)
        with locked(o.output, "-quickstart"):
            self.outlook(subsample)
            for name, stage in parts.items():
                print(f"== {name}", flush=True)
                run(stage(o))
        print(f"== {duration(time.monotonic() - started)}; the report: {o.output}/report.html")
        print(f"== features of any folder: python -m dinov2.embed {last} DIR --output features.parquet", flush=True)
        return Path(last)

    def outlook(self, subsample: int | None) -> None:
        """Says what it costs, and decides by the noise whether the denoiser learns from every second pixel. Kept in
        <output>/outlook.json, so that a call that goes on is neither decided anew nor delayed."""
        path, key = Path(self.o.output, "outlook.json"), json.dumps([self.o.denoiser, self.o.reading, self.o.data])
        found = json.loads(path.read_text()) if path.is_file() else {}
        begun = found.get("of") == key
        if not begun:
            found = {"of": key} | self._ask_denoiser()
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(found))
        print("noise: " + "; ".join(found["verdict"]))
        chosen = subsample or found["subsample"]
        if chosen > 1:
            self.o.denoiser += ["--subsample", str(chosen)]
            print(f"  denoiser --subsample {chosen}: {'as asked' if subsample else 'by the verdict above'}")
        costs = self.costs(found, measured=not begun)
        need, free = costs.pop("disk"), shutil.disk_usage(self.o.output).free
        print(f"disk: {need / 1e9:.2g} GB needed for checkpoints and the denoised copy, {free / 1e9:.3g} GB free")
        if need > free and not begun:
            raise ValueError(
                f"{self.o.output} lies on a disk with {free / 1e9:.3g} GB free, {need / 1e9:.3g} GB are needed: give "
                "--output on another one, or keep fewer checkpoints (train.eval_every=N)"
            )
        if not begun:
            words = ", ".join(f"{name} {duration(seconds)}" for name, seconds in costs.items())
            total = duration(sum(costs.values()))
            print(
                f"time: about {total} by the first batches on this machine, evaluation not counted ({words})",
                flush=True,
            )

    def _ask_denoiser(self) -> dict:
        command = stages.denoiser_command(self.o, self.o.noises[0])
        command[0] = "Neighbor2Neighbor.outlook"
        done = subprocess.run([PYTHON, "-m", *command], stdout=subprocess.PIPE, env=environment(), text=True)
        if done.returncode:
            raise CommandFailed(done.returncode)
        return json.loads(done.stdout.splitlines()[-1])

    def costs(self, found: dict, measured: bool) -> dict[str, float]:
        """Bytes of disk and, where they are measured, seconds of the parts."""
        from dinov2.config import load_config
        from dinov2.train import curriculum

        o, survey = self.o, self.survey
        depth = 4 if survey.deep or o.copies == "npy" else 1
        runs = {}
        for method in o.methods:
            cfg = load_config(stages.train_arguments(o, o.noises[0], method, o.seeds[0]))
            runs |= {str(stage.run): stage for stage in curriculum.plan(cfg)}
        steps = int(o.denoiser[o.denoiser.index("--steps") + 1])
        costs = {"denoiser": steps * found["step_s"]}
        costs["denoised copy"] = survey.count * survey.pixels / 1e6 * found["megapixel_s"]
        costs["disk"] = survey.count * survey.pixels * survey.channels * depth
        times: dict[bool, tuple[float, int]] = {}
        for stage in runs.values():
            anchored = bool(stage.anchor)
            if anchored not in times:
                times[anchored] = measure_training(stage, measured)
            seconds, size = times[anchored]
            train = stage.cfg.train
            kept = (
                len({*range(train.eval_every, stage.stop_epoch + 1, train.eval_every), *stage.keep}) + train.keep_last
            )
            costs["disk"] += kept * size * len(o.seeds)
            costs[stage.run.name] = seconds * stage.stop_epoch * train.epoch_length * len(o.seeds) / o.gpus
        return costs


def measure_training(stage, measured: bool) -> tuple[float, int]:
    """Seconds of an iteration of a stage, by some on the folder's own images, and bytes of a checkpoint."""
    import torch

    from dinov2.data.dataset import dataset_from_config
    from dinov2.train import curriculum
    from dinov2.train.trainer import Trainer

    model = curriculum.build_model(stage)
    sizes = [sum(p.numel() for p in network.parameters()) for network in (model.student, model.teacher)]
    size = 4 * (3 * sizes[0] + 2 * sizes[1])  # student, both moments of Adam; teacher, whole and for evaluation
    if not measured:
        return 0.0, size
    images = dataset_from_config(stage.cfg, "train", ("noisy",) * (2 if stage.anchor else 1))
    images.relatives, images.labels = images.relatives[:64], images.labels[:64]
    with tempfile.TemporaryDirectory() as folder:
        cfg = OmegaConf.merge(stage.cfg, {"output_dir": folder, "train": {"compile": False}, "data": {"workers": 0}})
        trainer, done, started = Trainer(cfg, model, images, stage.stop_epoch), 0, 0.0
        for data in trainer.load_batches(1 << 30):
            trainer.step(data.iteration, trainer.make_batches(data))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if not started:  # the first one also sets up what the others find
                started = time.perf_counter()
            elif time.perf_counter() - started > MEASURED_S:
                return (time.perf_counter() - started) / (done + 1), size
            else:
                done += 1
    raise AssertionError("the order of images has no end")


def _sizes(survey: Survey) -> str:
    """The shapes of the sample in words."""
    shapes = sorted(survey.shapes)
    if len(shapes) == 1:
        return f"{shapes[0][0]} x {shapes[0][1]} px"
    low, high = (f"{side[0]} x {side[1]}" for side in (shapes[0], shapes[-1]))
    return f"{len(shapes)} sizes, {low} to {high} px, median shorter side {survey.side} (by {survey.looked_at} images)"


def duration(seconds: float) -> str:
    """In h and min; below a minute in s."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


# --- the command line -----------------------------------------------------------------------------------------------
def make_parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        "python -m dinov2.pretrain",
        "%(prog)s DIR [options] [key=value ...]",
        __doc__,
        formatter_class=raw,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", metavar="DIR", help="runs, results and report [runs/<name of DIR>]")
    add("--noise", metavar="NAME", default="none", help="added while loading, to study one [none: noisy by nature]")
    add("--method", action="append", metavar="NAME", help=f"{', '.join(METHODS[:-1])}; may be repeated [nct]")
    add("--scale", metavar="NAME", help="an overlay of dinov2/configs, or a YAML [by number and size of the images]")
    add("--epochs", type=number, metavar="N", help="of the whole schedule [100; published ones for many large images]")
    add("--steps", type=number, metavar="N", help="a trial: every schedule cut to about N iterations, of large folders "
        f"{TRIAL_IMAGES} images or more")  # fmt: skip
    add("--val", type=float, metavar="SHARE", help="of the images become val [none; 0.1 where there are labels]")
    add("--group", metavar="NAME", help="never torn apart by val: folder, a column of the CSV, a regular expression")
    add("--labels", metavar="CSV", help="path,label[,split] [the folders are the classes]")
    add("--from", dest="weights", metavar="WEIGHTS", help="a backbone to continue from, see docs/public_weights.md")
    add("--channels", metavar="N", help="keep images of N channels, or of the majority [all have the same number]")
    add("--values", default="auto", metavar="RULE", help="auto, full, percentile, range=[lo,hi], log [auto]")
    add("--stack", default="refuse", metavar="HOW", help="files of several pages: refuse, pages, max [refuse]")
    add("--subsample", type=number, metavar="N", help="the denoiser learns from every N-th pixel [2 where noise is "
        "correlated over one]")  # fmt: skip
    add(
        "--eval",
        dest="evaluate",
        action="append",
        metavar="NAME",
        help="may be repeated [linear, knn with labels; label_free, pca, map]",
    )
    add("--seed", dest="seeds", action="append", type=seed, metavar="N", help="may be repeated [the scale's]")
    add("--gpus", type=number, default=1, metavar="N", help="processes, one a GPU [1]")
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
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the command is ended too
    try:
        pretrain(folders[0], *words, **{name: value for name, value in found.items() if value is not None})
    except CommandFailed as failure:
        print(failure, file=sys.stderr)
        return failure.code
    return 0


sys.modules[__name__].__class__ = CommandModule  # dinov2.pretrain(...) is pretrain(...)

if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
