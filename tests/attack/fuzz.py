"""A standing attack on everything that reads images: damaged files of every format, through every tool.

    python -m tests.attack.fuzz --seconds 60
    python -m tests.attack.fuzz --hours 8 --seed 1
    python -m tests.attack.fuzz --case 4711          what one file does, with its tracebacks

A file is one of tests/attack/samples.py with some bits flipped, cut off, or with lies in its header; which, is a
function of (seed, case). Each tool must give an image, or refuse with a ValueError or OSError that names the file. The
tools run in a process of their own, so that one that dies or hangs is counted, and the hunt goes on.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from dinov2.data.dataset import ImageDataset
from dinov2.data.loader import make_eval_loader
from dinov2.eval.instance_recog import Landmarks
from Neighbor2Neighbor.data import Crops, read_noisy, read_or_message
from Neighbor2Neighbor.validate import Validation
from tests.attack.samples import image_files
from utils import generate_noise, images
from utils.noise import NoiseSpec
from utils.report.pictures import read_views as report_views
from utils.values import FULL

HANG_SECONDS = 20.0  # for one file through all tools
MAX_PIXELS = 2**20  # of the tools here: a lie about the size is to cost no seconds
GAUSS, NONE = NoiseSpec.parse("gauss100"), NoiseSpec.parse("none")
LIES = (0, 1, 0x7F, 0x80, 0xFF)  # bytes that headers are overwritten with


# --- the files ------------------------------------------------------------------------------------------------------
def damaged(seed: int, case: int, samples: dict[str, bytes]) -> tuple[str, bytes]:
    """Name and content of one damaged file."""
    rng = np.random.default_rng([seed, case])
    name = list(samples)[case % len(samples)]
    content = bytearray(samples[name])
    for _ in range(int(rng.integers(1, 4))):
        rng.choice([_flip, _cut, _lie, _move])(rng, content)
    return name, bytes(content)


def _flip(rng: np.random.Generator, content: bytearray) -> None:
    """One to sixteen bits."""
    for at in rng.integers(0, max(len(content), 1), int(rng.integers(1, 17))) if content else []:
        content[at] ^= 1 << int(rng.integers(8))


def _cut(rng: np.random.Generator, content: bytearray) -> None:
    del content[int(rng.integers(0, len(content) + 1)) :]


def _lie(rng: np.random.Generator, content: bytearray) -> None:
    """One to eight bytes of the first or the last 200, where formats say what they hold."""
    if content:
        at = int(rng.integers(0, min(len(content), 200)))
        at = at if rng.random() < 0.7 else len(content) - 1 - at
        width = int(rng.choice([1, 2, 4, 8]))
        content[at : at + width] = bytes([int(rng.choice(LIES))] * width)[: len(content) - at]


def _move(rng: np.random.Generator, content: bytearray) -> None:
    """A part of the file over another part."""
    a, b = (int(at) for at in rng.integers(0, len(content) + 1, 2))
    part = content[a : a + int(rng.integers(1, 64))]
    content[b : b + len(part)] = part


# --- the tools ------------------------------------------------------------------------------------------------------
def _read(root: Path, relative: str) -> None:
    """Besides what every tool must do: the size of the header is that of the image, and every channel is asked for."""
    sizes = {images.image_size(root / relative)}
    for channels in (3, 1, 5):
        try:
            array = images.read_image(root / relative, channels, "native", max_pixels=MAX_PIXELS)
        except images.ImageError:
            if channels == 5:
                raise
            continue
        sizes.add(array.shape[:2])
        assert array.dtype in (np.uint8, np.float32) and array.shape[2] == channels and array.size, array.shape
        assert array.dtype == np.uint8 or (array.min() >= 0 and array.max() <= 1), "values beyond [0, 1]"
        assert len(sizes) == 1, f"header and image have different sizes: {sizes}"


def _dataset(root: Path, relative: str) -> None:
    dataset = ImageDataset(
        root, "train", ("noisy", "clean"), GAUSS, max_side=512, index_cache=root.parent / "cache", max_pixels=MAX_PIXELS
    )
    for batch in make_eval_loader(dataset, 1):
        assert all(canvas.shape[1] == 3 for canvas in batch.canvases)


def _landmarks(root: Path, relative: str) -> None:
    Landmarks(root, [relative], GAUSS, 0, 3, [(1.5, 2.0, 9.0, 9.0)], MAX_PIXELS).read(0, ("noisy",))


def _generate_noise(root: Path, relative: str) -> str | None:
    job = generate_noise.Job(root, {GAUSS: root.parent / "noisy"}, 0, "npy", 3, max_pixels=MAX_PIXELS)
    return generate_noise._write_twins(job, (relative, [GAUSS])).error


def _crops(root: Path, relative: str) -> str | None:
    item = Crops(root, [relative], GAUSS, 0, 16, 3, max_pixels=MAX_PIXELS)[0, 0]
    return item if isinstance(item, str) else None


def _denoise(root: Path, relative: str) -> str | None:
    found = [
        read_or_message(images.image_size, root / relative),
        read_or_message(read_noisy, root, relative, NONE, 0, 3, FULL, MAX_PIXELS),
    ]
    return next((item for item in found if isinstance(item, str)), None)


def _validate(root: Path, relative: str) -> None:
    Validation(root, GAUSS, 3, torch.device("cpu"), "fp32", max_pixels=MAX_PIXELS)


def _report(root: Path, relative: str) -> None:
    report_views(root, relative, GAUSS, 0, 3, FULL, root / relative)


TOOLS: dict[str, Callable[[Path, str], str | None]] = {
    "read_image": _read, "dinov2.data": _dataset, "instance_recog": _landmarks, "generate_noise": _generate_noise,
    "Neighbor2Neighbor.train": _crops, "Neighbor2Neighbor.denoise": _denoise, "Neighbor2Neighbor.validate": _validate,
    "report": _report,
}  # fmt: skip


def try_tools(root: Path, relative: str) -> list[tuple[str, str, str]]:
    """(kind of finding, tool, text) of what is wrong: "crash" or "unnamed"; "refused" says that all is as it should."""
    findings = []
    for tool, function in TOOLS.items():
        try:
            message = function(root, relative)
        except (ValueError, OSError) as error:
            message = str(error)
        except Exception:
            findings.append(("crash", tool, traceback.format_exc()))
            continue
        if message is not None:
            named = Path(relative).name in message and "\n" not in message
            findings.append(("refused" if named else "unnamed", tool, message))
    return findings


# --- the hunt -------------------------------------------------------------------------------------------------------
@dataclass
class Figures:
    files: int = 0
    refused: Counter = field(default_factory=Counter)  # by tool
    findings: list[tuple[str, int, str, str]] = field(default_factory=list)  # kind, case, tool, text
    memory_mb: int = 0

    def count(self, kind: str) -> int:
        return sum(found[0] == kind for found in self.findings)

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {self.count(kind)}" for kind in ("crash", "unnamed", "hang"))
        return (
            f"files {self.files}, tools {len(TOOLS)}, refusals {self.refused.total()}, {kinds}; "
            f"peak memory {self.memory_mb} MB"
        )


def _work(seed: int, case: int, stop: int | None, folder: Path, out: Connection) -> None:
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff has its say there about each file
    torch.set_num_threads(1)
    samples = image_files()
    root = folder / "data"
    (root / "train").mkdir(parents=True, exist_ok=True)
    while stop is None or case < stop:
        name, content = damaged(seed, case, samples)
        relative = f"train/{case}-{name}"
        (root / relative).write_bytes(content)
        findings = try_tools(root, relative)
        (root / relative).unlink()
        out.send((case, findings, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
        case += 1


def hunt(seconds: float, seed: int = 0, cases: int | None = None) -> Figures:
    """Damaged files until the seconds, or so many cases, are over."""
    figures, case, end = Figures(), 0, time.monotonic() + seconds
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end and (cases is None or case < cases):
            mine, theirs = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(seed, case, cases, Path(folder), theirs))
            worker.start()
            theirs.close()
            case, how = _listen(mine, case, end, figures)
            if how == "hang" or how == "time":
                worker.kill()
            worker.join()
            if how == "hang" or (how == "end" and worker.exitcode != 0):
                kind = "hang" if how == "hang" else "crash"
                figures.findings.append((kind, case, "the process", f"exit code {worker.exitcode}"))
                case += 1
    return figures


def _listen(results: Connection, case: int, end: float, figures: Figures) -> tuple[int, str]:
    """Take in results until the worker ends, hangs or the time is over: the next case, and which of these it was."""
    try:
        while results.poll(HANG_SECONDS):
            case, findings, memory = results.recv()
            figures.files, figures.memory_mb = figures.files + 1, max(figures.memory_mb, memory)
            for kind, tool, text in findings:
                if kind == "refused":
                    figures.refused[tool] += 1
                else:
                    figures.findings.append((kind, case, tool, text))
            case += 1
            if time.monotonic() >= end:
                return case, "time"
        return case, "hang"
    except EOFError:
        return case, "end"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--hours", type=float, help="how long, in hours")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default 0)")
    parser.add_argument("--case", type=int, help="this file alone")
    options = parser.parse_args(argv)
    if options.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            name, content = damaged(options.seed, options.case, image_files())
            path = Path(folder, "data/train", name)
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
            for finding in try_tools(Path(folder, "data"), f"train/{name}"):
                print(*finding, sep="\n  ")
        return 0
    figures = hunt(options.hours * 3600 if options.hours else options.seconds, options.seed)
    seen = set()
    for kind, case, tool, text in figures.findings:
        if (what := (kind, text.strip().splitlines()[-1][:40])) not in seen:
            seen.add(what)
            print(f"{kind}, case {case}, {tool}: {text}\n")
    print(figures)
    return 1 if figures.findings else 0


if __name__ == "__main__":
    sys.exit(main())
