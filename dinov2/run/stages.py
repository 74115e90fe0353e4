"""The stages, from noisy copies to the report: each gives the commands that its options ask for.

    Runner(options.output).run(pretrain(options))

A stage looks at what is there when its commands are asked for, one after another. Copies of the data are
noisy_<name>-<noise> and noisy_<name>-<noise>-denoised; runs lie in <output>/<noise>/<method>, the oracle, which serves
every noise, in <output>/clean.
"""

import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from dinov2.config import CONFIGS, check_ranks, load_config
from dinov2.data.index import why_no_accuracy
from dinov2.data.splits import Layout, find_csv
from dinov2.eval import EVALUATORS, FLOORED
from dinov2.run.commands import ROOT
from dinov2.run.options import DENOISERS, PUBLISHED, Options
from dinov2.run.pipeline import Step, sums, tree_state

Steps = Iterator[Step]
SHARING = ("n2n", "nc", "nct")  # methods that begin with the same denoised run


# --- names ----------------------------------------------------------------------------------------------------------
def noisy_tree(o: Options, noise: str) -> str:
    return _find_tree(o, f"noisy_{os.path.basename(o.data)}-{noise}")


def denoised_tree(o: Options, noise: str) -> str:
    name = os.path.basename(o.data)
    return _find_tree(o, f"{name}-denoised" if noise == "none" else f"noisy_{name}-{noise}-denoised")


def _find_tree(o: Options, name: str) -> str:
    """A copy beside the data, or in Neighbor2Neighbor/, where the published steps move them."""
    places = [os.path.join(place, name).removeprefix("./") for place in (o.trees, "Neighbor2Neighbor")]
    return next(filter(os.path.isdir, places), places[0])


def run_folder(o: Options, noise: str, method: str, seed: int | None) -> str:
    parts = [o.output, *([] if method == "clean" else [noise]), method + _seed_suffix(seed)]
    return "/".join(parts)


def _seed_suffix(seed: int | None) -> str:
    return f"-seed{seed}" if seed else ""


def view_of(method: str) -> str:
    """The view that a method is evaluated on."""
    return {"n2n": "denoised", "clean": "clean"}.get(method, "noisy")


def runs_of(o: Options) -> Iterator[tuple[str, str]]:
    """(noise, method) of all runs of a seed; the oracle comes last, if there is one: images that are noisy by nature
    have no clean version."""
    for noise in o.noises:
        yield from ((noise, method) for method in o.methods if method != "clean")
    if "clean" in o.methods and o.noises != ["none"]:
        yield "none", "clean"


def reading(o: Options) -> list[str]:
    """Options of the tools that say how files are read."""
    limit = o.given("data.max_pixels")
    return [*(["--max-pixels", limit] if limit else []), *o.reading]


def data_tree(o: Options) -> str:
    """The state of the images, read when the first step asks for it."""
    o.data_tree = o.data_tree or tree_state(o.data)
    return o.data_tree


def data_state(o: Options) -> str:
    """What trainings and evaluations read: the images and, where there is one, the CSV of their labels."""
    labels = o.chosen("data.labels")
    return "\n".join([data_tree(o), *([sums(find_csv(Path(o.data), labels))] if labels else [])])


def copies(o: Options) -> list[str]:
    return ["--format", o.copies] if o.copies else []


# --- stages ---------------------------------------------------------------------------------------------------------
def prepare(o: Options) -> Steps:
    """The digits, where they are the data, and the part of the data that --per-class asks for."""
    if (o.whole or o.data) == f"{o.output}/digits":
        yield Step(["exps/make_digits.py", "--output", o.whole or o.data], "digits")
    if o.per_class:
        options = ["--source", o.whole, "--per-class", str(o.per_class), "--output", o.data]
        yield Step(["exps/subset.py", *options], "subset")


def generate_noise(o: Options) -> Steps:
    for noise in o.noises:
        if noise != "none":
            root = os.path.dirname(noisy_tree(o, noise)) or "."
            command = ["utils/generate_noise.py", "--source", o.data, "--noise", noise, "--output-root", root]
            channels = ["--channels", str(o.channels)] if o.channels else []
            yield Step([*command, *channels, *copies(o), *reading(o)], f"noise-{noise}", data_tree(o))


def train_denoiser(o: Options) -> Steps:
    state = [data_tree(o), sums(*sorted(ROOT.glob("Neighbor2Neighbor/*.yaml")))]
    for noise in o.noises:
        yield Step(["-m", *denoiser_command(o, noise)], f"denoiser-{noise}", "\n".join(state))


def denoiser_command(o: Options, noise: str) -> list[str]:
    schedule = o.denoiser or shlex.split(DENOISERS.get(o.scale_name, PUBLISHED))
    schedule += ["--steps", str(o.steps)] if o.steps and not o.denoiser else []
    schedule += ["--sides", *map(str, o.sides)] if o.sides else []
    schedule += ["--channels", str(o.channels)] if o.channels else []
    where = ["--data", o.data, "--noise", noise, "--output", f"{o.output}/{noise}/denoiser"]
    return ["Neighbor2Neighbor.train", *where, *schedule, *reading(o)]


def check_noise(o: Options) -> Steps:
    """Whether the noise is of the kind that the denoiser removes, for the report."""
    for noise in o.noises:
        model = f"{o.output}/{noise}/denoiser/unet.pth"
        command = ["Neighbor2Neighbor.check", o.data, "--noise", noise, "--model", model, "--images", "64", *reading(o)]
        yield Step(["-m", *command], f"check-{noise}", f"{data_tree(o)}\n{sums(model)}")


def denoise(o: Options) -> Steps:
    for noise in o.noises:
        state = f"{data_tree(o)}\n{sums(f'{o.output}/{noise}/denoiser/unet.pth')}"
        yield Step(["-m", *denoise_command(o, noise)], f"denoise-{noise}", state)


def denoise_command(o: Options, noise: str) -> list[str]:
    what = ["--model", f"{o.output}/{noise}/denoiser/unet.pth", "--data", o.data, "--noise", noise]
    return ["Neighbor2Neighbor.denoise", *what, "--output", denoised_tree(o, noise), *copies(o), *reading(o)]


def metadata(o: Options) -> Steps:
    copies = [tree(o, noise) for noise in o.noises for tree in (noisy_tree, denoised_tree)]
    folders = [o.data, *filter(os.path.isdir, copies)]
    yield Step(["process_metadata.py", *folders], "metadata", tree_state(*folders))


def pretrain(o: Options) -> Steps:
    """The n2n run is the denoised run of nc and nct, trained once and shared by the three."""
    start, last = ["-m", "dinov2.train"], {}
    if o.gpus > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(o.gpus), *start]
    for seed in o.seeds:
        for noise, method in runs_of(o):
            read = o.scale_file, o.overlay, CONFIGS / "default.yaml", CONFIGS / f"{method}.yaml"
            state = [data_state(o), sums(*read), sums(f"{denoised_tree(o, noise)}/manifest.json")]
            name = f"pretrain-{noise}-{method}{_seed_suffix(seed)}"
            # Those that share a denoised run wait for each other; all else may be trained side by side.
            shared = (noise, seed) if method in SHARING else name
            after, last[shared] = (last[shared],) if shared in last else (), name
            yield Step([*start, *train_arguments(o, noise, method, seed)], name, "\n".join(state), after=after)


def train_arguments(o: Options, noise: str, method: str, seed: int | None) -> list[str]:
    words = [o.scale, *([o.overlay] if o.overlay else []), method, f"data.root={o.data}"]
    words.append(f"output_dir={run_folder(o, noise, method, seed)}")
    words += [] if seed is None else [f"seed={seed}"]
    if method != "clean":
        words += [f"noise={noise}", f"data.denoised_root={denoised_tree(o, noise)}"]
        words.append(f"data.noisy_root={noisy_tree(o, noise)}")
        words.append(f"curriculum.denoised_dir={run_folder(o, noise, 'n2n', seed)}")
    return words + o.overrides


def evaluate(o: Options) -> Steps:
    """Evaluations of every run; then, once for each noise and view, the floors, in <output>/floors."""
    missing = "" if o.dry else why_no_accuracy(o.data, o.given("data.index_cache"), layout(o))
    evals = [name for name in o.evals if not missing or not EVALUATORS[name]]
    if missing and evals != o.evals:
        left_out = ", ".join(name for name in o.evals if name not in evals)
        yield Step([], note=f"{left_out}: left out, {missing}; label_free instead")
        evals = list(dict.fromkeys(["label_free", *evals]))
    o = replace(o, evals=evals)
    for seed in o.seeds:
        for noise, method in runs_of(o):
            yield from _evaluate_run(o, noise, method, seed)
    yield from _evaluate_floors(o)


def _evaluate_run(o: Options, noise: str, method: str, seed: int | None) -> Steps:
    folder = run_folder(o, noise, method, seed)
    if not _is_pretrained(o, folder):
        yield Step([], note=f"{folder} is left out: it was not pretrained")
        return
    marks = sums(f"{folder}/config.yaml", *sorted(Path(folder).glob("checkpoints/*/COMPLETE")))
    after: tuple[str, ...] = ()  # one at a time writes to a run's folder
    for evaluator in o.evals:
        command = ["-m", f"dinov2.eval.{evaluator}", *evaluate_arguments(o, folder)]
        name = f"{evaluator}-{noise}-{method}{_seed_suffix(seed)}"
        yield Step(command, name, f"{data_state(o)}\n{marks}", after=after)
        after = (name,)


def evaluate_arguments(o: Options, folder: str) -> list[str]:
    return [f"run={folder}", f"checkpoints={o.checkpoints}", *o.eval_overrides]


def _evaluate_floors(o: Options) -> Steps:
    """Of each view that the methods are evaluated on, from the settings of the first seed's first pretrained run."""
    seen = set()
    for noise, method in runs_of(o):
        folder = run_folder(o, noise, method, o.seeds[0])
        key = noise, view_of(method)
        if not set(FLOORED) & set(o.evals) or key in seen or not _is_pretrained(o, folder):
            continue
        seen.add(key)
        state = f"{data_state(o)}\n{sums(f'{folder}/config.yaml', *([o.floor] if o.floor else []))}"
        command = ["-m", "dinov2.eval.floors", *floor_arguments(o, folder)]
        yield Step(command, "floors-{}-{}".format(*key), state, after=())


def floor_arguments(o: Options, folder: str) -> list[str]:
    names = ",".join(name for name in o.evals if name in FLOORED)
    words = [f"run={folder}", f"output={o.output}", f"evaluators={names}"]
    return words + ([f"weights={o.floor}"] if o.floor else []) + o.eval_overrides


def _is_pretrained(o: Options, folder: str) -> bool:
    return o.dry or os.path.exists(f"{folder}/config.yaml")


def check_settings(o: Options) -> DictConfig:
    """The last run's settings. ValueError for what any run would refuse, before the first command."""
    runs = [load_settings([*train_arguments(o, *run, o.seeds[0]), *o.eval_overrides]) for run in runs_of(o)]
    for cfg in runs:
        check_ranks(cfg, o.gpus, f"--gpus {o.gpus}")
        if cfg.objective != "dinov2":
            from dinov2.train.curriculum import check_objective  # here, as it loads PyTorch

            check_objective(cfg)
    return runs[-1]


def load_settings(words: list[str]) -> DictConfig:
    """The configuration of a run by the words of its command, completed from the file model.pretrained."""

    def read_keys(file: str) -> dict[str, object]:
        from dinov2.models.weights import read_model_keys  # here, as it loads PyTorch

        return read_model_keys(file)

    return load_config(words, read_model_keys=read_keys)


def layout(o: Options) -> Layout:
    """How the data becomes train and val, by the keys of the command line and of the scale."""
    val, seed, stack = (o.chosen(f"data.{key}") for key in ("val", "split_seed", "stack"))
    group, labels = o.chosen("data.group"), o.chosen("data.labels")
    return Layout(float(val) if val else None, group, labels, int(seed or 0), stack or "refuse")


def report(o: Options) -> Steps:
    patterns = "*/*/config.yaml", "clean*/config.yaml", "floors/*/*/config.yaml"
    found = [str(path.parent) for pattern in patterns for path in sorted(Path(o.output).glob(pattern))]
    runs = list(dict.fromkeys(found))
    yield Step(["-m", "utils.report", *([str(o.output)] if o.dry else runs), "--output", f"{o.output}/report.html"])


STAGES: dict[str, Callable[[Options], Steps]] = {
    "1_generate_noise": generate_noise,
    "2_train_denoiser": train_denoiser,
    "3_denoise": denoise,
    "4_metadata": metadata,
    "5_pretrain": pretrain,
    "6_evaluate": evaluate,
    "7_report": report,
}
