"""Tests, times and trains this code in half an hour on a GPU, what is worth most first.

    bash exps/on_a_gpu.sh --pack imagenette96        here: images and missing packages as small files in runs/pack
    bash exps/on_a_gpu.sh --output results           there: everything, at most 30 minutes; call it again to go on

Parts: tests (those that need a GPU), benchmark (step and trainer from JPEGs under gauss255, ViT-S and B), miniature
(all methods under gauss100, three seeds side by side), denoiser (on the same tree), suite (all tests of models and
training). Each has a time limit of its own. What is finished is skipped by the next call; the miniature goes on where
it was. The output holds a handful of small files, written anew after every part: summary.json, log.txt, benchmark.json,
results.jsonl, curves.jsonl, denoiser.jsonl and report.html.

A machine that nothing reaches takes runs/pack with it: the images as one archive, and wheels of what it lacks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = ROOT / "runs/pack"
PACKAGES = ("omegaconf", "submitit")  # pure Python; others that requirements.txt names are on most machines with a GPU
TO_STOP = 20.0  # s from SIGTERM, at which a training saves, to SIGKILL
LOG_BYTES = 200_000  # of the end of each log


@dataclass(frozen=True)
class Part:
    """Commands that belong together; `together`: they run side by side, else one after another."""

    name: str
    minutes: float
    commands: list[list[str]]
    together: bool = False


# --- what is run ------------------------------------------------------------------------------------------------------
def benchmark(args: argparse.Namespace, arch: str, batch: int) -> list[str]:
    out = args.work / f"benchmark-{arch}-{batch}.json"
    command = ["exps/benchmark.py", "--device", args.device, "--only", "step", "both", "--precision", "bf16"]
    if args.trial:
        small = ["--scale", "quickstart", "--batch-size", "4", "--turns", "1", "--warm-up", "1", "--iterations", "4"]
        return [sys.executable, *command, *small, "--output", str(out), "noise=gauss255"]
    sizes = ["--arch", arch, "--batch-size", str(batch), "--turns", "20", "--warm-up", "5", "--iterations", "100"]
    workers = f"data.workers={max(1, (os.cpu_count() or 1) - 1)}"
    return [sys.executable, *command, *sizes, "--output", str(out), "noise=gauss255", workers]


def miniature(args: argparse.Namespace, seed: int) -> list[str]:
    """All methods with one seed. Each seed has folders of its own, as copies of a data set lie beside it."""
    own = args.work / f"seed{seed}"
    own.mkdir(parents=True, exist_ok=True)
    data = own / args.images.name
    if not data.exists():
        data.symlink_to(args.images)
    command = ["bash", "exps/quickstart.sh", "--scale", "imagenette", "--data", str(data), "--output", f"{own}/runs"]
    command += ["--noise", "gauss100", "--seed", str(seed), "--eval", "knn", "--eval", "linear"]
    small = ["--steps", "2", "--method", "dinov2", "eval.knn.k=[3]"]
    return [*command, *(small if args.trial else ["data.workers=4"])]


def denoiser(args: argparse.Namespace) -> list[list[str]]:
    model = args.work / "denoiser"
    train = ["--batch-size", "16", "--crop", "96", "--depth", "4", "--init-scale", "1", "--steps"]
    tree = [f"--{key}={value}" for key, value in {"data": args.images, "noise": "gauss255"}.items()]
    trained = [*train, "4" if args.trial else "2000", "--output", str(model)]
    source = [f"--data={args.images / 'val'}", "--noise=gauss255", "--output", str(args.work / "denoised")]
    return [
        [sys.executable, "-m", "Neighbor2Neighbor.train", *tree, *trained],
        [sys.executable, "-m", "Neighbor2Neighbor.denoise", "--model", str(model / "unet.pth"), *source],
    ]


def parts(args: argparse.Namespace) -> list[Part]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    product = ["tests/dinov2", "tests/Neighbor2Neighbor"]
    found = [Part("tests", 5, [[*pytest, "-m", "gpu", "--durations=10", *product]])]
    sizes = [(arch, batch) for batch in (128, 40) for arch in ("vit_small", "vit_base")][: 1 if args.trial else 4]
    found += [Part(f"benchmark-{arch}-{batch}", 5, [benchmark(args, arch, batch)]) for arch, batch in sizes]
    if args.images:
        seeds = (0,) if args.trial else (0, 1, 2)
        found.append(Part("miniature", 15, [miniature(args, seed) for seed in seeds], together=True))
        found.append(Part("denoiser", 3, denoiser(args)))
    suite = ["tests/dinov2/loss"] if args.trial else [*product, "-n", str(min(8, os.cpu_count() or 1))]
    return [*found, Part("suite", 5, [[*pytest, *suite]])]


def run_part(work: Path, part: Part, environment: dict[str, str], seconds: float) -> str:
    """finished, failed or stopped (by the clock); what the commands print goes to logs/<part>.log."""
    log = work / "logs" / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    with open(log, "ab") as file:
        for group in [part.commands] if part.together else [[command] for command in part.commands]:
            options = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": file, "start_new_session": True}
            processes = [subprocess.Popen(command, **options) for command in group]
            try:
                codes = [process.wait(max(0.0, end - time.monotonic())) for process in processes]
            except subprocess.TimeoutExpired:
                return "stopped"
            finally:
                stop(processes)
            if any(codes):
                return f"failed (exit codes {codes})"
    return "finished"


def stop(processes: list[subprocess.Popen]) -> None:
    """Ends the processes and all that they started: a training saves on SIGTERM and leaves."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue
        end = time.monotonic() + TO_STOP
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            time.sleep(0.2)


# --- what comes back --------------------------------------------------------------------------------------------------
def machine() -> dict[str, object]:
    """What the figures hold for."""
    code = (
        "import json, torch; gpu = torch.cuda.is_available(); print(json.dumps({'torch': torch.__version__, "
        "'gpu': torch.cuda.get_device_name() if gpu else None}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {"python": platform.python_version(), "cores": os.cpu_count(), **json.loads(told)}


def rows_of(work: Path, pattern: str) -> list[dict]:
    """The rows of the JSON-lines files work/<pattern>; "run" of each names the folder of its file."""
    found = []
    for path in sorted(work.glob(pattern)):
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        found += [{"run": str(path.parent.relative_to(work))} | json.loads(line) for line in whole]
    return found


def collect(work: Path, output: Path, summary: dict) -> None:
    """Writes the small files. Of the curves: every tenth row, and those with the live kNN."""
    output.mkdir(parents=True, exist_ok=True)
    curves = rows_of(work, "seed*/runs/**/metrics.jsonl")
    files = {
        "summary.json": json.dumps(summary, indent=1) + "\n",
        "benchmark.json": json.dumps([json.loads(path.read_text()) for path in sorted(work.glob("benchmark-*.json"))]),
        "results.jsonl": to_json_lines(rows_of(work, "seed*/runs/**/results.jsonl")),
        "curves.jsonl": to_json_lines([row for k, row in enumerate(curves) if k % 10 == 0 or "live_knn_top1" in row]),
        "denoiser.jsonl": to_json_lines(rows_of(work, "denoiser/metrics.jsonl")),
    }
    logs = []
    for path in sorted((work / "logs").iterdir()):
        logs.append(f"== {path.name}\n{path.read_bytes()[-LOG_BYTES:].decode(errors='replace')}")
    files["log.txt"] = "\n".join(logs)
    for name, text in files.items():
        (output / name).write_text(text)
    reports = sorted(work.glob("seed*/runs/report.html"))
    if reports:
        shutil.copy(reports[0], output / "report.html")


def to_json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- what travels -----------------------------------------------------------------------------------------------------
def pack(images: Path) -> None:
    """The folder of images as runs/pack/images.tar.xz, which leaves nothing of a tar's padding and little of what the
    headers of JPEGs have in common; and the wheels of PACKAGES."""
    PACK.mkdir(parents=True, exist_ok=True)
    with tarfile.open(PACK / "images.tar.xz", "w:xz") as archive:
        archive.add(images, images.name)
    wheels = ["--no-deps", "--only-binary=:all:", "--dest", str(PACK), *PACKAGES]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wheels], check=True)
    size = sum(path.stat().st_size for path in PACK.iterdir())
    print(f"{PACK}: {size / 2**20:.1f} MiB in {len(list(PACK.iterdir()))} files; carry it, and call the script there")


def unpack(work: Path, images: Path | None, trial: bool) -> tuple[Path | None, dict[str, str]]:
    """The folder of images (for a trial four per class), and the environment of all parts."""
    site = work / "site"
    wheels = sorted(PACK.glob("*.whl"))
    if wheels and not site.exists():
        install = ["--no-index", "--no-deps", "--quiet", "--target", str(site), *map(str, wheels)]
        subprocess.run([sys.executable, "-m", "pip", "install", *install], check=True)
    archive, folder = PACK / "images.tar.xz", work / "images"
    if images is None and archive.exists():
        if not folder.exists():
            with tarfile.open(archive) as opened:
                opened.extractall(work / "images.part", filter="data")
            (work / "images.part").rename(folder)
        images = next(folder.iterdir())
    if trial and images is not None:
        few = ["--source", str(images), "--per-class", "4", "--output", str(work / "few")]
        subprocess.run([sys.executable, "exps/subset.py", *few], check=True, cwd=ROOT, env=environment(site))
        images = work / "few"
    return images, environment(site)


def environment(site: Path) -> dict[str, str]:
    """The environment variables of all parts: this Python comes first, with the packages in `site`."""
    here = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    here["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), str(site)])
    return here | {"PYTHONUNBUFFERED": "1"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="origin", type=Path, default=Path.cwd(), help=argparse.SUPPRESS)
    parser.add_argument("--pack", type=Path, metavar="DIR", help="pack this folder of images, run nothing")
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder with train/ and val/ (default: the pack's)")
    parser.add_argument("--output", type=Path, help="of the small files (default runs/on_a_gpu/results)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of this call (default 30)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts by name, such as benchmark-vit_small-128")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--trial", action="store_true", help="every part in small")
    args = parser.parse_args(argv)
    args.work = ROOT / "runs" / ("on_a_gpu_trial" if args.trial else "on_a_gpu")
    args.output = args.output or args.work / "results"
    for name in ("pack", "images", "output"):
        path = getattr(args, name)
        setattr(args, name, path and (args.origin / path).resolve())
    for path in filter(None, (args.pack, args.images)):
        if not path.is_dir():
            parser.error(f"{path} is no folder")
    return args


def main(argv: list[str] | None = None) -> int:
    started, args = time.monotonic(), parse_arguments(argv)
    if args.pack:
        pack(args.pack)
        return 0
    (args.work / "logs").mkdir(parents=True, exist_ok=True)
    args.images, variables = unpack(args.work, args.images, args.trial)
    if args.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    state = args.work / "summary.json"
    summary = json.loads(state.read_text()) if state.exists() else {}
    summary["machine"] = machine()
    collect(args.work, args.output, summary)  # what there is, also when nothing is left to do
    for part in parts(args):
        if (args.only and part.name not in args.only) or summary.get(part.name, {}).get("end") == "finished":
            continue
        left = args.minutes * 60 - (time.monotonic() - started) - TO_STOP
        begin = time.monotonic()
        end = (
            run_part(args.work, part, variables, min(left, part.minutes * 60))
            if left > 0
            else "not begun: no time left"
        )
        summary[part.name] = {"end": end, "seconds": round(time.monotonic() - begin)}
        print(f"{part.name}: {end}, {summary[part.name]['seconds']} s", flush=True)
        state.write_text(json.dumps(summary, indent=1) + "\n")
        collect(args.work, args.output, summary)
    print(f"results: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
