"""The toy's experiment: encoders that switch from clean to noisy digits at some epoch, probed on noisy digits.

    sh mlp_exp.sh [SEEDS]             clean, noisy and clean-then-noisy encoders
    sh mlp_exp.sh [SEEDS] --sweep     switch epochs 0..50 x noise levels 0.1..0.8

Switch epoch 0 is the noisy encoder, the last epoch the clean one. What is finished is skipped. The output
folder gets results.jsonl (one row per figure) and table.md, seeds.png and sweep.png, made of all results in it.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

from toy_mnist.data import Digits, load_digits_or_mnist
from toy_mnist.linear_probe import probe, view_name
from toy_mnist.model import load_encoder
from toy_mnist.pretrain import BATCH, pretrain
from toy_mnist.report import write_report
from utils import cli
from utils.files import write_text
from utils.locks import locked
from utils.noise import NoiseSpec
from utils.results import append_result, read_results

CLEAN = NoiseSpec.parse("none")
SWEEP_STDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SWEEP_SWITCHES = (0, 10, 20, 30, 40, 50)


def train_encoder(data: Digits, spec: NoiseSpec, switch: int, epochs: int, seed: int, folder: Path) -> Path:
    """Checkpoint of `switch` clean epochs followed by epochs - switch noisy ones. Clean epochs are shared."""
    clean = pretrain(data.train_images, CLEAN, switch, seed, folder, "clean") if switch else None
    if clean and switch == epochs:
        return clean
    return pretrain(data.train_images, spec, epochs - switch, seed, folder, f"{spec}_from{switch}", clean)


def run_seed(
    data: Digits, noises: Sequence[NoiseSpec], switches: Sequence[int], epochs: int, seed: int, folder: Path
) -> None:
    """Trains and probes what results.jsonl in `folder` lacks of one seed: noises x switches, and clean on clean."""
    for spec, wanted in [*((spec, switches) for spec in noises), (CLEAN, [epochs])]:
        rows = [row for row in read_results(folder) if (row["seed"], row["noise"]) == (seed, str(spec))]
        missing = sorted(set(wanted) - {row["details"]["switch_epoch"] for row in rows})
        paths = [train_encoder(data, spec, switch, epochs, seed, folder / f"seed{seed}") for switch in missing]
        accuracies = probe([load_encoder(path) for path in paths], data, spec, seed, epochs) if missing else []
        for switch, accuracy in zip(missing, accuracies, strict=True):
            method = {0: "noisy", epochs: "clean"}.get(switch, "clean_then_noisy")
            row = {
                "method": method, "noise": str(spec), "dataset": data.name, "seed": seed, "epoch": epochs,
                "iteration": epochs * -(-len(data.train_images) // BATCH), "metric": "linear_top1", "value": accuracy,
                "view": view_name(spec), "protocol": "toy", "details": {"switch_epoch": switch},
            }  # fmt: skip
            append_result(folder / "results.jsonl", row)
            print(f"seed {seed}, noise {spec}, switch at epoch {switch} ({method}): {accuracy:.2f} %", flush=True)


def claim_folder(folder: Path, data: Digits, epochs: int) -> None:
    """Writes into `folder` which data and how many epochs its results are of. ValueError where it holds results of
    others: checkpoints and rows of two experiments must not mix.
    """
    settings = {"dataset": data.name, "train_crc32": zlib.crc32(data.train_images.numpy()), "epochs": epochs}
    path = folder / "settings.json"
    if not path.is_file():
        write_text(path, json.dumps(settings))
    elif json.loads(path.read_text()) != settings:
        raise ValueError(f"{folder} holds results of other images or other --epochs; choose another --output")


def main() -> None:
    """Command line: trains, probes, prints the table and writes it with the plots."""
    parser = argparse.ArgumentParser(prog="python -m toy_mnist.experiment", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 .. N-1 (default: 1)")
    parser.add_argument("--data", metavar="DIR", help="folder of MNIST's idx files, plain or .gz; or digits: "
                        "scikit-learn's; default: download MNIST, or digits without a network")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("runs/toy_mnist"), metavar="DIR",
                        help="results go to DIR/mnist or DIR/digits (default: runs/toy_mnist)")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=50, help="of each pretraining and each probe (default: 50)")
    parser.add_argument("--std", type=float, nargs="+", help="standard deviations of the noise (default: 0.4)")
    parser.add_argument("--switch", type=int, nargs="+", help="epochs of the switch (default: 0, 60 %% and all)")
    parser.add_argument("--sweep", action="store_true", help="--std 0.1 .. 0.8 and --switch 0 10 .. 50 unless given")
    args = parser.parse_args()
    curriculum = (0, args.epochs * 3 // 5, args.epochs)
    switches = args.switch or (SWEEP_SWITCHES if args.sweep else curriculum)
    noises = [NoiseSpec.parse(f"gauss{255 * s:g}") for s in args.std or (SWEEP_STDS if args.sweep else (0.4,))]
    if args.seeds < 1 or args.epochs < 1 or not all(0 <= switch <= args.epochs for switch in switches):
        raise ValueError(f"seeds and epochs must be at least 1, and switch epochs in 0..{args.epochs} (--epochs)")
    data = load_digits_or_mnist(args.data)
    folder = args.output / data.name
    with locked(folder):  # a second process would add the same rows once more, as if of further seeds
        claim_folder(folder, data, args.epochs)
        for seed in range(args.seeds):
            run_seed(data, noises, switches, args.epochs, seed, folder)
        print(write_report(folder, curriculum))
    print(f"table and plots: {folder}")
    if args.seeds == 1:
        print("one seed has no spread: `sh mlp_exp.sh 5` adds four more to it")


if __name__ == "__main__":
    cli.run(main)
