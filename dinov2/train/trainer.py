"""The training loop: schedules, losses, clipping, AdamW, EMA, checkpoints. Knows no more of a stage than its data set.

Everything random at an iteration (images, crops, masks, drop path) is a function of (seed, iteration), so the position
is all that a resumed run needs, on any number of ranks.
"""

import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dinov2 import checkpoint
from dinov2.data.dataset import ImageDataset
from dinov2.data.loader import ImageBatch, ResidentImages, make_loader
from dinov2.objectives.objective import CropBatch, Objective
from dinov2.train.batches import BatchMaker, seed_of
from dinov2.train.collapse import CollapseMonitor
from dinov2.train.loss_monitor import LossMonitor
from dinov2.train.optim import apply_schedule, build_optimizer, clip_gradients, load_optimizer_state, optimizer_state
from dinov2.train.placement import compile_parts, compiling, shard, whole_state
from dinov2.train.schedules import Schedules
from utils import distributed
from utils.metrics_log import MetricsLog
from utils.precision import DTYPES, autocast
from utils.progress import Progress


class Terminated(SystemExit):
    """SIGTERM came: the run saved its position and left."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Garbage is collected when it is asked for alone: it would come in the midst of launching a step's kernels."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Trainer:
    """Trains `model` under `cfg` in the folder cfg.output_dir until the epoch `stop_epoch` of its schedule.

    dataset: gives one view of each image, or two: the second one becomes CropBatch.other_global_crops.
    keep: epochs kept for evaluation beside every train.eval_every-th.
    prepare: called when the model stands on its device; start_fresh: with model and optimiser, if there is no
    checkpoint to resume.
    live_knn: backbone → kNN accuracy in percent, or None; called at iteration 0 and every train.knn_every epochs.
    identity: hash of the run, written into its checkpoints.
    """

    def __init__(
        self,
        cfg: DictConfig,
        model: Objective,
        dataset: ImageDataset,
        stop_epoch: int,
        keep: tuple[int, ...] = (),
        prepare: Callable[[Objective], None] = lambda model: None,
        start_fresh: Callable[[Objective, torch.optim.Optimizer], None] = lambda model, optimizer: None,
        live_knn: Callable[[nn.Module], float | None] | None = None,
        identity: str = "",
    ):
        self.cfg, self.dataset, self.stop_epoch, self.keep, self.live_knn = cfg, dataset, stop_epoch, keep, live_knn
        self.run, self.device = Path(cfg.output_dir), distributed.device()
        self.length, self.identity = cfg.train.epoch_length, identity
        self.model = model.to(self.device).train()
        if distributed.world_size() > 1:
            for network in model.networks():  # CPUs have no norm of float32 tokens by weights in bf16
                shard(network, self.device, DTYPES[cfg.train.precision] if self.device.type == "cuda" else None)
        prepare(model)
        backbone = model.student["backbone"]
        backbone.activation_checkpointing = cfg.train.activation_checkpointing
        if compiling(cfg, self.device):
            for network in model.networks():
                compile_parts(network)
        self.optimizer = build_optimizer(model.student, cfg)
        self.schedules = Schedules(cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.train.precision == "fp16")
        self.monitor, self.collapse = LossMonitor(), CollapseMonitor(cfg)
        self.log: MetricsLog | None = None  # of the main rank, while it trains
        self.make_batches = BatchMaker(cfg)
        self.iteration = self.saved = self.resume()
        if self.iteration == 0:
            start_fresh(model, self.optimizer)

    # -- position -------------------------------------------------------------------------------------------------

    def state(self) -> dict:
        optimizer = optimizer_state(self.model.student, self.optimizer)
        scaler = {k: torch.tensor(float(v)) for k, v in self.scaler.state_dict().items()}
        return {"model": self.model.checkpoint_state(), "optimizer": optimizer, "scaler": scaler}

    def resume(self) -> int:
        """Loads the latest whole checkpoint; the number of iterations done."""
        found = checkpoint.latest(self.run)
        if found is None:
            return 0
        state = checkpoint.load(found, self.state())
        self.model.load_checkpoint_state(state["model"])
        load_optimizer_state(self.model.student, self.optimizer, state["optimizer"])
        own = self.scaler.state_dict()  # empty without fp16; some of its values are integers, and must be so again
        self.scaler.load_state_dict({k: type(v)(state["scaler"][k].item()) for k, v in own.items()})
        distributed.print_on_main(f"resumes from {found.path} (iteration {found.iteration})")
        return found.iteration

    def save(self, evaluate: bool) -> None:
        teacher = whole_state(self.model.published()) if evaluate else None
        epoch = self.iteration // self.length
        keep_last = self.cfg.train.keep_last
        checkpoint.save(self.run, self.state(), self.iteration, epoch, teacher, keep_last, self.identity)
        self.saved = self.iteration

    # -- loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Trains to the stop epoch. SIGTERM saves and leaves; a resumed fit goes on with the very next image."""
        previous = signal.signal(signal.SIGTERM, self.monitor.ask_to_leave)
        self.log = MetricsLog(self.run, after=self.iteration or -1) if distributed.is_main() else None
        try:
            with collected_by_hand():
                self.train_epochs(self.stop_epoch * self.length)
        finally:
            signal.signal(signal.SIGTERM, previous)
            if self.log:
                self.log.close()

    def train_epochs(self, total: int) -> None:
        """The iterations up to `total`, with a row of the log every so many of them, and what ends each epoch."""
        every, images, is_main = self.cfg.train.log_every, self.cfg.train.batch_size, distributed.is_main()
        batches = self.load_batches(total)
        if self.iteration == 0:
            self.measure_knn()
        with Progress(total * images, self.run.name, "img", self.iteration * images, enabled=is_main) as bar:
            clock, waited, steps = time.perf_counter(), 0.0, 0
            while self.iteration < total:
                if self.monitor.all_leaving:
                    self.save_and_leave()
                asked = time.perf_counter()
                data = next(batches)
                waited += time.perf_counter() - asked
                self.model.observing = is_main and (self.iteration + 1) % every == 0
                self.model.information = self.collapse.window(self.iteration)
                terms, row = self.step(data.iteration, self.make_batches(data))
                self.monitor.read()  # of the step before
                self.monitor.put(self.iteration, terms)
                self.iteration, steps = self.iteration + 1, steps + 1
                bar.update(images, **{name: v for name, v in self.monitor.terms.items() if name == "total_loss"})
                if self.iteration % every == 0 or self.iteration == total:
                    self.monitor.read()
                    row |= self.monitor.terms | self.cost(time.perf_counter() - clock, steps, waited)
                    self.write_row(row | self.model.diagnostics | self.collapse.read(self.iteration, steps))
                    self.collapse.report()
                    clock, waited, steps = time.perf_counter(), 0.0, 0
                if self.iteration % self.length == 0:
                    self.end_epoch()
        self.collapse.report(at_end=True)

    def load_batches(self, stop_iteration: int) -> Iterator[ImageBatch]:
        cfg, data = self.cfg, self.cfg.data
        resident = ResidentImages(self.dataset, data.workers, self.device) if data.resident else None
        order = cfg.train.batch_size, cfg.seed, self.iteration, stop_iteration
        ranks = distributed.rank(), distributed.world_size()
        plan = self.make_batches.plan
        return iter(make_loader(self.dataset, *order, *ranks, data.workers, self.device, resident, plan))

    def step(self, iteration: int, batches: Iterator[CropBatch]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """One optimiser step: the terms to display, and this iteration's schedule."""
        cfg, model = self.cfg, self.model
        torch.manual_seed(seed_of(cfg.seed, iteration, distributed.rank()))  # drop path
        values = self.schedules(iteration)
        apply_schedule(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        progress = iteration / max(self.cfg.train.epochs * self.length, 1)
        for batch in batches:
            with autocast(self.device, self.cfg.train.precision):
                loss, new = model(batch, values.teacher_temp, progress)
            self.scaler.scale(loss / cfg.train.accumulate).backward()
            for name, value in ({"total_loss": loss} | new).items():
                terms[name] = terms.get(name, 0.0) + value.detach() / cfg.train.accumulate
        self.scaler.unscale_(self.optimizer)
        norms = clip_gradients(model.student, cfg.optim.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        model.finish_step(values.ema_momentum)
        if not self.scaler.is_enabled():  # a scaler skips steps whose gradients overflow, and goes on
            terms |= {f"grad_norm_{name}": norm for name, norm in norms.items()}
        return terms, asdict(values)

    def cost(self, seconds: float, steps: int, waited: float) -> dict[str, float]:
        images = steps * self.cfg.train.batch_size
        cost = {"images_per_s": images / seconds, "data_wait": waited / seconds, "seconds": seconds}
        if self.device.type == "cuda":
            cost["gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return cost

    def write_row(self, row: dict[str, float | str]) -> None:
        if self.log:
            self.log.write({"iteration": self.iteration, "epoch": self.iteration / self.length} | row)

    def save_and_leave(self) -> NoReturn:
        self.monitor.read()  # nothing is saved before its losses are known to be finite
        if self.saved != self.iteration:  # else it would replace one that is kept for evaluation
            self.save(evaluate=False)
        raise Terminated()

    def end_epoch(self) -> None:
        epoch, train = self.iteration // self.length, self.cfg.train
        self.monitor.read()  # as above
        evaluate = epoch % train.eval_every == 0 or epoch in self.keep or epoch == self.stop_epoch
        if evaluate or epoch % train.checkpoint_every == 0:
            self.save(evaluate)
        if train.knn_every and epoch % train.knn_every == 0:
            self.measure_knn()
        gc.collect()

    def measure_knn(self) -> None:
        """A row with the live kNN figure; the one at iteration 0 is the untrained backbone's."""
        if not (self.live_knn and self.cfg.train.knn_every):
            return
        accuracy = self.live_knn(self.model.eval().published()["backbone"])
        self.model.train()
        if accuracy is not None:
            self.write_row({"live_knn_top1": accuracy})
