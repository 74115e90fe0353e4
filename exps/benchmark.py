"""How fast this machine trains, step by step: a table, and a JSON file with every single time.

    python exps/benchmark.py                                    ViT-S/16 at ImageNet-100's sizes
    python exps/benchmark.py --scale imagenette --only step both
    python exps/benchmark.py --arch vit_base --batch-size 64 --device cuda
    python exps/benchmark.py --only step data --compare other.py

Sections: step (DINOv2 and NCT, with the fraction of the hardware's matrix rate that they reach), data (decoding, each
noise, all crops), both (the trainer from files on: how long the step waits for data), denoiser, probe, checkpoint.

Every case has a process of its own. They take turns, one step each, so that what else the machine does meets all of
them alike; ratios are of medians within one run. --compare FILE.py adds cases from other code: `step(cfg, device,
precision)` returns a function that does one training step on cfg.train.batch_size images, `data(cfg, paths)` one that
reads the photographs and makes all crops. Either may be missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils  # noqa: F401 - how OpenMP waits, to be said before torch is loaded

# isort: split
import torch
from omegaconf import OmegaConf

from dinov2.config import load_config
from dinov2.run.commands import environment
from exps import benchmark_cases as cases
from utils import cli
from utils.environment import processor
from utils.files import write_text
from utils.noise import ALL_NOISES
from utils.progress import Progress

SECTIONS = ("step", "data", "both", "denoiser", "probe", "checkpoint")


@dataclass
class Measurement:
    """Seconds of each turn of a case, and what else is known of it."""

    section: str
    name: str
    factory: partial
    reference: str | None = None  # the case that its ratio is to
    threads: int | None = None
    seconds: list[float] = field(default_factory=list)
    images: int = 0
    memory_gb: float = 0.0  # peak of its process (CPU) or of the device
    flops: float | None = None  # of one image
    figures: dict[str, float] = field(default_factory=dict)  # of its own, from the last turn

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def row(self) -> dict:
        """Everything as JSON values."""
        named = ("section", "name", "reference", "seconds", "images", "memory_gb", "flops", "figures")
        return {key: getattr(self, key) for key in named} | {"median": self.median}


# --- processes ------------------------------------------------------------------------------------------------------
def serve(connection, factory: partial, device: str, threads: int | None) -> None:
    """Runs in a case's process: builds it, steps once per message until None comes, then sends the peak memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by the process that the user started
    if threads:
        torch.set_num_threads(threads)
    try:
        case = factory()
        connection.send(case.images)
        while connection.recv():
            start = time.perf_counter()
            figures = case.step()
            if device == "cuda":
                torch.cuda.synchronize()
            connection.send((time.perf_counter() - start, figures or {}))
        used = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        # Linux counts in KiB, macOS in bytes.
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        connection.send((used or resident) / 1e9)
    except Exception as error:
        connection.send(error)


class Process:
    """A case in a process of its own, which steps when turn() asks for it."""

    def __init__(self, measurement: Measurement, device: str):
        self.measurement = measurement
        self.connection, theirs = multiprocessing.Pipe()
        # Its server has imported all that is needed, and starts a process in no time; it has not met the GPU.
        context = multiprocessing.get_context("forkserver")
        arguments = (theirs, measurement.factory, device, measurement.threads)
        # Not a daemon: loaders have workers of their own.
        self.process = context.Process(target=serve, args=arguments)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.join()

    def receive(self):
        """The next message. ValueError where the case failed."""
        try:
            message = self.connection.recv()
        except EOFError:
            self.process.join()
            raise ValueError(
                f"{self.measurement.name} was ended (exit code {self.process.exitcode}): out of memory? "
                "A smaller --batch-size or --only SECTION needs less"
            ) from None
        if isinstance(message, Exception):
            raise ValueError(f"{self.measurement.name}: {message}") from message
        return message

    def turn(self) -> tuple[float, dict]:
        self.connection.send(True)
        return self.receive()

    def finish(self) -> None:
        self.connection.send(None)
        self.measurement.memory_gb = self.receive()


def take_turns(measurements: list[Measurement], device: str, warm_up: int, turns: int, bar: Progress) -> None:
    """Fills in the measurements of one section."""
    with ExitStack() as stack:
        processes = []
        for measurement in measurements:
            processes.append(stack.enter_context(Process(measurement, device)))
            measurement.images = processes[-1].receive()  # waits, so that cases are built one after another
        for turn in range(warm_up + turns):
            for process in processes:
                seconds, figures = process.turn()
                if turn >= warm_up:
                    process.measurement.seconds.append(seconds)
                process.measurement.figures = figures
                bar.update(1)
        for process in processes:
            process.finish()


# --- sections -------------------------------------------------------------------------------------------------------
def plan(args: argparse.Namespace, job: cases.Job) -> list[Measurement]:
    """All measurements of the sections asked for, in order."""
    found = []

    def add(section: str, name: str, case, reference: str | None = None, threads: int | None = None, **options) -> None:
        if section in args.only:
            found.append(Measurement(section, name, partial(case, job, **options), reference, threads))

    other = compared_functions(args.compare)
    for precision in args.precision:
        baseline, compare = f"DINOv2 {precision}", f"compared {precision}"
        if "step" in other:
            add("step", compare, cases.compared, file=args.compare, function="step", precision=precision)
        add("step", baseline, cases.training_step, compare if "step" in other else None, precision=precision)
        add("step", f"NCT {precision}", cases.training_step, baseline, precision=precision, anchored=True)
    if "data" in other:
        add("data", "compared: all, one core", cases.compared, threads=1, file=args.compare, function="data")
    for noise in ("none", *ALL_NOISES):
        add("data", f"decode + {noise}, one core", cases.decode, threads=1, noise=noise)
    if job.device == "cpu":
        add("data", "crops, one core", cases.crops, threads=1)
        whole = "compared: all, one core" if "data" in other else None
        add("data", f"all: decode + {job.cfg.noise} + crops, one core", cases.crops, whole, 1, noise=job.cfg.noise)
    else:
        add("data", "crops on the device", cases.crops)
    add("data", f"loader of {job.cfg.data.workers} workers, no crops", cases.workers)
    first = args.precision[0]
    add("both", f"trainer {first}", cases.end_to_end, precision=first, iterations=args.iterations)
    for precision in [p for p in args.precision if p != "fp16"]:  # the denoiser knows the other two
        add("denoiser", f"denoising {precision}", cases.denoising, precision=precision)
        add("denoiser", f"training {precision}", cases.denoiser_training, precision=precision)
    add("probe", "exact", cases.probe, protocol="exact")
    add("probe", "cached", cases.probe, "exact", protocol="cached")
    add("checkpoint", "save", cases.checkpoint, action="save")
    add("checkpoint", "load", cases.checkpoint, action="load")
    return found


def compared_functions(file: str | None) -> set[str]:
    """Which of step and data the file of --compare defines. ValueError for neither."""
    if file is None:
        return set()
    source = Path(file).read_text()
    found = {name for name in ("step", "data") if f"def {name}(" in source}
    if not found:
        raise ValueError(f"--compare {file} defines neither step(cfg, device, precision) nor data(cfg, paths)")
    return found


def measure(args: argparse.Namespace, job: cases.Job) -> tuple[list[Measurement], dict[str, float]]:
    """The measurements, and the rate of matrix products of each precision, FLOP/s."""
    products = [Measurement("rate", p, partial(cases.matrix_product, job, precision=p)) for p in args.precision]
    measurements = plan(args, job)
    counts = {"both": (0, 1), "data": (1, args.turns), "rate": (3, 10)}
    number = sum(sum(counts.get(m.section, (args.warm_up, args.turns))) for m in measurements + products)
    with Progress(number, "benchmark", "turn") as bar:
        for section in ("rate", *SECTIONS):
            members = [m for m in measurements + products if m.section == section]
            warm_up, turns = counts.get(section, (args.warm_up, args.turns))
            take_turns(members, job.device, warm_up, turns, bar)
    if "step" in args.only:
        flops = {anchored: cases.step_flops(job, anchored) for anchored in (False, True)}
        for m in measurements:
            if m.section == "step" and m.name.split()[0] in ("DINOv2", "NCT"):  # other code may compute more
                m.flops = flops[m.name.startswith("NCT")]
    return measurements, {m.name: m.figures["flops"] / m.median for m in products}


# --- output ---------------------------------------------------------------------------------------------------------
def table(measurements: list[Measurement], rates: dict[str, float]) -> str:
    """Markdown, one line per case: medians, with the least and the most of the turns in brackets."""
    lines = [
        "| section | case | time, ms | images/s | GB | FLOP utilisation | floor, ms | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    medians = {(m.section, m.name): m.median for m in measurements}
    for m in measurements:
        spread = f"{m.median * 1e3:.1f} ({min(m.seconds) * 1e3:.1f}-{max(m.seconds) * 1e3:.1f})"
        speed = m.figures.get("images_per_s") or m.images / m.median
        use = floor = ratio = ""
        if m.flops:
            rate = rates[m.name.split()[-1]]
            use, floor = f"{m.flops * m.images / m.median / rate:.0%}", f"{m.flops * m.images / rate * 1e3:.1f}"
        if m.reference:
            change = medians[m.section, m.reference] / m.median
            faster = f"{change:.2f}x the speed of {m.reference}"
            ratio = faster if change >= 1 else f"{1 / change:.2f}x the time of {m.reference}"
        if "data_wait" in m.figures:
            ratio = f"waits for data {m.figures['data_wait']:.0%} of the time"
        if "bytes" in m.figures:
            ratio = f"{m.figures['bytes'] / 1e9:.2f} GB on disk"
        shown = f"{speed:.1f}" if speed else ""
        lines.append(f"| {m.section} | {m.name} | {spread} | {shown} | {m.memory_gb:.1f} | {use} | {floor} | {ratio} |")
    return "\n".join(lines)


def describe_machine(device: str) -> dict[str, str | int]:
    """What the figures hold for."""
    machine: dict[str, str | int] = {"cpu": processor(), "cores": os.cpu_count() or 1, "torch": torch.__version__}
    return machine | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Further key=value arguments change the configuration, such as train.accumulate=4.",
    )  # fmt: skip
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")
    parser.add_argument("--arch", help="vit_tiny, vit_small, vit_base, ... (default: the scale's)")
    parser.add_argument("--scale", default="imagenet100", help="overlay of sizes (default imagenet100)")
    parser.add_argument("--batch-size", type=int, help="images per step (default 8 on a CPU, 128 on a GPU)")
    parser.add_argument(
        "--precision", nargs="+", choices=("bf16", "fp32", "fp16"), default=["bf16", "fp32"],
        help="default bf16 fp32; fp16 is for a GPU, and the denoiser, which has none, is not timed in it",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    parser.add_argument("--compare", metavar="FILE.py", help="other code to time beside ours")
    parser.add_argument("--turns", type=int, default=5, help="of each case (default 5)")
    parser.add_argument("--warm-up", type=int, default=2, help="turns before those (default 2)")
    parser.add_argument("--iterations", type=int, help="of the section both (default 12 on a CPU, 200 on a GPU)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark.json"), help="default runs/benchmark.json")
    args, settings = parser.parse_known_args(argv)
    wrong = [word for word in settings if word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"{wrong[0]} is neither an option nor key=value")
    args.iterations = args.iterations or (12 if args.device == "cpu" else 200)
    return args, settings


def main(argv: list[str] | None = None) -> None:
    args, settings = parse_arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is at hand; use --device cpu")
    # As Ctrl-C does, it leaves no process and no folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.device == "cpu":
        if "fp16" in args.precision:
            raise ValueError("--precision fp16: a CPU's matrix products are some fifty times slower; use bf16 or fp32")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the trainer takes a GPU where there is one
    batch = args.batch_size or (8 if args.device == "cpu" else 128)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        settings = [
            args.scale, "dinov2", f"data.root={folder}/photographs", f"output_dir={folder}/run",
            f"train.batch_size={batch}", f"data.index_cache={folder}/index", "data.storage=on_the_fly",
            *([f"model.arch={args.arch}"] if args.arch else []), *settings,
        ]  # fmt: skip
        os.environ["TMPDIR"] = folder  # of the cases' processes: gone with the folder
        os.environ.update(environment())  # where the cases' processes find the packages
        multiprocessing.set_forkserver_preload([cases.__name__])
        job = cases.Job(OmegaConf.to_yaml(load_config(settings)), args.device, f"{folder}/photographs")
        cases.write_photographs(Path(job.photographs), max(4 * batch, 17) + 1)
        measurements, rates = measure(args, job)
    machine = describe_machine(args.device)
    content = {
        "machine": machine, "command": sys.argv, "matrix_flops_per_s": rates,
        "config": job.config, "cases": [m.row() for m in measurements],
    }  # fmt: skip
    write_text(args.output, json.dumps(content, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("matrix products: " + ", ".join(f"{p} {rate / 1e9:.0f} GFLOP/s" for p, rate in rates.items()) + "\n")
    print(table(measurements, rates))
    print(f"\nevery time: {args.output}")


if __name__ == "__main__":
    cli.run(main)
