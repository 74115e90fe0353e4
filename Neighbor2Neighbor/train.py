"""Train the Neighbor2Neighbor denoiser on noisy images alone.

    python -m Neighbor2Neighbor.train --data mini-imagenet --noise gauss255 --output runs/n2n-gauss255
    python -m Neighbor2Neighbor.train --data noisy_mini-imagenet-gauss255 --noise none --output runs/n2n-gauss255
    torchrun --nproc-per-node 4 -m Neighbor2Neighbor.train ...     (--batch-size is that of all processes together)

The defaults are the published schedule. Both forms above train on the same bytes: the first adds each image's fixed
noise while loading. DIR/unet.pth is the result; DIR/metrics.jsonl and DIR/tensorboard hold the course of it. A run
that was killed goes on with the same command, and ends as one that was not. No clean pixel is read in training;
--val-clean names clean images of another set, on which PSNR and SSIM are measured while training.
"""

import argparse
import io
import json
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from yaml import YAMLError

from Neighbor2Neighbor.data import Crops, choose_crop, make_loader, training_images, unit_values
from Neighbor2Neighbor.subsample import draw_pairs, neighbor_loss
from Neighbor2Neighbor.unet import UNet
from Neighbor2Neighbor.validate import Validation
from utils import cli, distributed, values
from utils.files import atomic_path, write_text
from utils.images import ImageError, describe_source, source_files
from utils.locks import locked
from utils.memory import keep_freed_memory
from utils.metrics_log import MetricsLog
from utils.noise import EXAMPLES, NoiseSpec
from utils.precision import autocast
from utils.progress import Progress
from utils.sampler import IterationSampler
from utils.tensor_files import load_tensors
from utils.text import count_of
from utils.yaml_files import load_yaml

CHECKPOINT_SECONDS = 60  # between the checkpoints for resuming
READ_EVERY = 20  # steps between two reads of the loss: each waits for the device
# What these options were in runs of versions that did not have them.
UNNAMED = {"values": "full", "subsample": 1, "stack": "refuse", "mixed": "refuse"}
# What a resumed run must share with the one it goes on with, besides the images and their noise.
FIXED = ("seed", "subset", "sides", "depth", "channels", "batch_size", "epochs", "lr", "increase_ratio", "init_scale",
         "precision", "values", "subsample", "stack", "mixed")  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, help="YAML or JSON file of options, as DIR/config.json; the command line goes first")
    add("--data", help="tree of images; its train/ folder where it has one")
    add("--noise", help=f"noise added while loading ({EXAMPLES}); none: images noisy already")
    add("--output", help="folder of the run")
    add("--noise-seed", type=int, default=0, help="seed of the fixed noise (default 0)")
    add("--seed", type=int, default=0, help="weights, order, crops and pairs (default 0)")
    add("--subset", type=int, help="train on so many images, drawn by the seed")
    add("--sides", type=int, nargs=2, help="only images with both sides in this range, px (published: 256 512)")
    add("--epochs", type=int, default=100, help="of the schedule (default 100)")
    add("--steps", type=int, help="so many steps in all, the schedule of --epochs laid over them")
    add("--batch-size", type=int, default=4, help="crops per step, of all processes (default 4)")
    add("--crop", type=int, default=256, help="side of the crops, px; less where images are smaller (default 256)")
    add("--depth", type=int, default=5, help="poolings of the U-Net (default 5)")
    add("--channels", type=int, default=3, help="of the images; 1: grey (default 3)")
    values.add_options(parser)
    add(
        "--subsample",
        type=int,
        default=1,
        help="train on every n-th pixel: for noise that nearer pixels share (default 1)",
    )
    add("--lr", type=float, default=3e-4, help="of Adam (default 3e-4)")
    add("--increase-ratio", type=float, default=2.0, help="Lambda at the end (default 2)")
    add("--init-scale", type=float, default=0.1, help="of the first weights; 1 for short trainings (default 0.1)")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the hardware has it")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), help="loader processes; 0: none")
    add("--val-clean", help="clean images, in one folder per set, to measure PSNR and SSIM on")
    add("--val-noise", help="noise added to these (default --noise)")
    add("--val-every", type=int, default=10, help="epochs between the measurements (default 10)")
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options, after those of --config. ValueError for missing and for impossible ones."""
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.config is not None:
        args = parser.parse_args(_config_options(args.config) + argv)
    for name in ("data", "noise", "output"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing; see --help")
    for name in ("subset", "epochs", "steps", "batch_size", "depth", "crop", "lr", "val_every", "init_scale",
                 "channels", "subsample"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0")
    if min(args.seed, args.noise_seed, args.workers) < 0:
        raise ValueError("--seed, --noise-seed and --workers must not be negative")
    values.check(args.values, "--values")
    args.precision = _choose_precision() if args.precision == "auto" else args.precision
    args.sides = tuple(args.sides) if args.sides else None
    return args


def _config_options(path: Path) -> list[str]:
    """The options that a YAML or JSON file names, as words of the command line."""
    try:
        config = OmegaConf.to_container(load_yaml(path))
        words = []
        for name, value in config.items():
            values = value if isinstance(value, list) else [value]
            if value is not None and value is not False:
                words += [f"--{name.replace('_', '-')}"] + [str(item) for item in values if item is not True]
        return words
    except (OSError, AttributeError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"--config {path} is no readable list of options ({error})") from error


def _choose_precision() -> str:
    """bf16 on GPUs and on CPUs that multiply it; elsewhere it is emulated and slower than float32."""
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # young in PyTorch
    return "bf16" if flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16") else "fp32"


# --- schedule -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Schedule:
    """Steps of a training and what changes over them (section 4.3 and the published code).

    Deviation: the release halves the rate one epoch earlier (in epoch 20 of 100, where 19 % are done).
    """

    steps: int
    epochs: int
    lr: float
    increase_ratio: float

    def epoch(self, step: int) -> int:
        """Epoch 1..epochs of a step 0..steps - 1."""
        return 1 + step * self.epochs // self.steps

    def rate(self, step: int) -> float:
        """Learning rate, halved at 20, 40, 60 and 80 % of the training."""
        return self.lr * 0.5 ** (5 * step // self.steps)

    def weight(self, step: int) -> float:
        """Lambda, the weight of the regulariser: increase_ratio * epoch / epochs."""
        return self.increase_ratio * self.epoch(step) / self.epochs

    def ends_epoch(self, step: int) -> bool:
        return step + 1 == self.steps or self.epoch(step + 1) != self.epoch(step)


# --- training -------------------------------------------------------------------------------------------------------
class Training:
    """The network, its optimiser and the files of a run. One instance per process; process 0 writes the files."""

    def __init__(self, args: argparse.Namespace, relatives: list[str], side: int):
        self.args, self.device = args, distributed.device()
        torch.manual_seed(args.seed)
        network = UNet(args.channels, depth=args.depth, init_scale=args.init_scale)
        self.network = network.to(self.device, memory_format=torch.channels_last)
        forward = DistributedDataParallel(self.network) if distributed.world_size() > 1 else self.network
        self.forward = torch.compile(forward) if args.compile else forward
        self.optimizer = torch.optim.Adam(self.network.parameters(), args.lr)
        steps = args.steps or args.epochs * max(1, len(relatives) // args.batch_size)
        self.schedule = Schedule(steps, min(args.epochs, steps), args.lr, args.increase_ratio)
        spec = NoiseSpec.parse(args.noise)
        rule = values.Values.parse(args.values)
        scale = values.rule_for_reading(rule, args.data)
        self.crops = Crops(
            Path(args.data), relatives, spec, args.noise_seed, side, args.channels, scale, args.subsample,
            args.max_pixels,
        )  # fmt: skip
        self.output = Path(args.output)
        self.validation = None
        if args.val_clean and distributed.is_main():
            val_spec = NoiseSpec.parse(args.val_noise or args.noise)
            self.validation = Validation(
                Path(args.val_clean), val_spec, args.channels, self.device, args.precision, args.subsample,
                args.max_pixels, rule,
            )  # fmt: skip
        self.settings = describe_source(args.data, spec, args.noise_seed) | {"crop": side, "steps": steps}
        self.settings |= {name: getattr(args, name) for name in FIXED}
        self.settings |= source_files(args.data, relatives)
        self.step = 0
        self.sums = torch.zeros(3, device=self.device)  # both terms over the epoch so far, and the number of steps

    def run(self) -> None:
        """Train from the last checkpoint to the end, then write unet.pth."""
        log = MetricsLog(self.output, "step", after=self.step) if distributed.is_main() else None
        ranks = distributed.rank(), distributed.world_size()
        order = IterationSampler(
            len(self.crops), self.args.batch_size, self.args.seed, *ranks, self.step, self.schedule.steps,
            option="--batch-size ",
        )  # fmt: skip
        loader = make_loader(self.crops, order, self.args.workers, pin=self.device.type == "cuda")
        batch, total = self.args.batch_size, self.schedule.steps * self.args.batch_size
        saved = time.monotonic()
        with Progress(total, "training", "img", self.step * batch, enabled=log is not None) as bar:
            for crops in loader:
                if isinstance(crops, str):
                    raise ImageError(crops)
                terms = self.train_step(crops.to(self.device, non_blocking=True))
                self.sums += torch.cat([terms, terms.new_ones(1)])
                if self.step % READ_EVERY == 0:
                    bar.update(0, epoch=self.schedule.epoch(self.step), loss=float(self._total_loss(terms)))
                bar.update(batch)
                epoch_ends = self.schedule.ends_epoch(self.step)
                if epoch_ends:
                    self.end_epoch(log)
                self.step += 1
                if log is not None and (epoch_ends or time.monotonic() - saved > CHECKPOINT_SECONDS):
                    self.save()
                    saved = time.monotonic()
        if log is not None:
            log.close()
            _save({name: value.cpu() for name, value in self.network.state_dict().items()}, self.output / "unet.pth")

    def train_step(self, crops: Tensor) -> Tensor:
        """One step on this process's part of the batch [B, C, S, S], as loaded. Returns both terms of the loss [2]."""
        noisy = unit_values(crops).contiguous(memory_format=torch.channels_last)
        reconstruction, regulariser = neighbor_loss(self.predict, noisy, self._draw_pairs(noisy))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step)
        self.optimizer.zero_grad()
        (reconstruction + self.schedule.weight(self.step) * regulariser).backward()
        self.optimizer.step()
        return torch.stack([reconstruction, regulariser]).detach()

    def predict(self, batch: Tensor) -> Tensor:
        with autocast(self.device, self.args.precision):
            return self.forward(batch)

    def _draw_pairs(self, noisy: Tensor) -> Tensor:
        """This process's part of the pairs of the whole batch, a function of the seed and the step."""
        generator = torch.Generator(self.device).manual_seed((self.args.seed * 2**40 + self.step) % 2**63)
        everyone = noisy.new_empty((self.args.batch_size, 1, *noisy.shape[2:]))
        return draw_pairs(everyone, generator).chunk(distributed.world_size())[distributed.rank()]

    def _total_loss(self, terms: Tensor) -> Tensor:
        return terms[0] + self.schedule.weight(self.step) * terms[1]

    def end_epoch(self, log: MetricsLog | None) -> None:
        """Write the epoch's row and, where due, the validation. ValueError where the training has diverged."""
        epoch = self.schedule.epoch(self.step)
        distributed.all_reduce_sum(self.sums)
        means = self.sums[:2] / self.sums[2]
        self.sums.zero_()
        if not torch.isfinite(means).all():
            raise ValueError(f"the loss is no longer finite in epoch {epoch}; use a smaller --lr or --precision fp32")
        if log is None:
            return
        row = {
            "epoch": epoch, "step": self.step + 1, "loss": float(self._total_loss(means)),
            "loss_rec": float(means[0]), "loss_reg": float(means[1]),
            "lambda": self.schedule.weight(self.step), "lr": self.schedule.rate(self.step),
        }  # fmt: skip
        if self.validation and (epoch % self.args.val_every == 0 or epoch == self.schedule.epochs):
            sheet = self.output / "samples" / f"epoch_{epoch:04d}.png"
            row |= self.validation.measure(self.network, sheet)
        log.write(row)

    # --- files ------------------------------------------------------------------------------------------------------
    def save(self) -> None:
        state = {
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "sums": self.sums, "settings": self.settings,
        }  # fmt: skip
        _save(state, self.output / "checkpoint.pth")

    def restore(self) -> None:
        """Take up the checkpoint, if there is one. ValueError where it is damaged or of another run."""
        path = self.output / "checkpoint.pth"
        if not path.exists():
            return
        try:
            state = load_tensors(path, self.device)
            before = UNNAMED | state["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be taken up ({error}); remove it to train from the start") from error
        for name, value in self.settings.items():
            if before.get(name, value if name.endswith("images") else None) != value:
                raise ValueError(
                    f"{self.output} holds a run with {name} {before.get(name)!r}, not {value!r}; "
                    "choose another --output, or remove it"
                )
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.sums = state["step"], state["sums"]

    def record(self) -> None:
        """Write config.json."""
        config = {name: value for name, value in vars(self.args).items() if name != "config"}
        write_text(self.output / "config.json", json.dumps(config, indent=1) + "\n")


def _save(state: dict, path: Path) -> None:
    """torch.save, atomically; by way of memory, as torch itself answers a full disk with no OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def _is_whole(path: Path) -> bool:
    """Whether the weights are there and undamaged; damaged ones are named, and written anew from the checkpoint."""
    try:
        return path.exists() and bool(load_tensors(path))
    except ValueError as error:
        print(f"warning: {error}; it is written anew from checkpoint.pth", file=sys.stderr)
        return False


def main(argv: list[str] | None = None) -> int:
    """Train a denoiser; see the module's docstring. Returns the exit code."""
    args = parse_arguments(argv)
    NoiseSpec.parse(args.noise)
    distributed.init()
    keep_freed_memory()
    try:
        root = Path(args.data)
        kept = args.channels if args.mixed == "keep" else None
        relatives = training_images(root, args.subset, args.sides, args.seed, args.stack, kept)
        rule, reason = values.resolve(args.values, root, relatives, args.channels, args.max_pixels)
        args.values = str(rule)
        training = Training(args, relatives, choose_crop(root, relatives, args.crop, args.depth, args.subsample))
        with ExitStack() as held:
            distributed.on_main(lambda: held.enter_context(locked(training.output)))
            training.restore()
            if training.step == training.schedule.steps and _is_whole(training.output / "unet.pth"):
                print(f"{training.output}/unet.pth is finished already", flush=True)
                return 0
            if distributed.is_main():
                training.record()
                print(reason, flush=True)
                going_on = f", going on at step {training.step}" if training.step else ""
                side = training.crops.side
                print(
                    f"{count_of(len(relatives), 'image')}, crops of {side} px, {args.precision}{going_on}", flush=True
                )
            training.run()
            if distributed.is_main():
                print(f"wrote {args.output}/unet.pth", flush=True)
    finally:
        distributed.close()
    return 0


if __name__ == "__main__":
    cli.run(main)
