"""The training loop: schedules, losses, clipping, AdamW, EMA, checkpoints. Knows no more of a stage than its data set.

Everything random at an iteration (images, crops, masks, drop path) is a function of (seed, iteration), so the position
is all that a resumed run needs, on any number of ranks.
"""

from __future__ import annotations

import gc
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._functorch import config as partitioner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dinov2 import checkpoint
from dinov2.data.augment import Augment, AugmentParameters
from dinov2.data.dataset import ImageDataset
from dinov2.data.loader import ResidentImages, make_loader
from dinov2.data.masking import sample_masks
from dinov2.data.packed import Packed
from dinov2.objectives.objective import GLOBAL_CROPS, CropBatch, Objective, index_masks
from dinov2.train.collapse import CollapseMonitor
from dinov2.train.optim import apply_schedule, build_optimizer, load_optimizer_state, optimizer_state
from dinov2.train.schedules import Schedules
from utils import distributed
from utils.metrics_log import MetricsLog
from utils.progress import Progress

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Terminated(SystemExit):
    """SIGTERM came: the run saved its position and left."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


def seed_of(*parts: object) -> int:
    """A 63-bit seed of its own for each tuple of parts."""
    return random.Random(repr(parts)).getrandbits(63)


def clip_gradients(student: nn.ModuleDict, limit: float) -> dict[str, Tensor]:
    """Clips each sub-module by itself; its gradient norms before that."""
    norms = {}
    for name, module in student.items():
        norm = nn.utils.clip_grad_norm_(module.parameters(), limit or float("inf"))
        norms[name] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return norms


def shard(network: nn.ModuleDict, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """FSDP2 over all ranks: each block, then the backbone and each head by themselves.

    dtype: that of autocast, in which the blocks' weights are gathered: it would round most of them anyway. A block asks
    for the weights of the next one before it computes, as in DINOv3.
    """
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    # The residual stream enters a block as it is, in float32.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    for module in network.values():
        blocks = list(getattr(module, "blocks", []))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        for block, following in pairwise(blocks):
            block.set_modules_to_forward_prefetch([following])
        # Left to itself, the outermost module stays whole after a forward without backward: the EMA works on shards.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def compiling(cfg: DictConfig, device: torch.device) -> bool:
    """Whether train.compile asks for the compiler; if not, it is switched off for what would use it unasked."""
    on = device.type == "cuda" if cfg.train.compile is None else cfg.train.compile
    if device.type == "cuda":
        torch.compiler.set_stance("default" if on else "force_eager")
    return on


def compile_parts(network: nn.ModuleDict) -> None:
    """torch.compile of blocks and heads. Of what is inside them: FSDP's gathering and diagnostics stay around it."""
    torch._dynamo.config.recompile_limit = 64  # all blocks of all networks are one function: of several shapes
    # Activations and normalised tokens are made again in the backward pass rather than kept for its matrix products.
    partitioner.ban_recompute_materialized_backward = False
    for module in network.values():
        for part in getattr(module, "blocks", None) or module.children():
            part.forward = torch.compile(part.forward)


def whole_state(network: nn.ModuleDict) -> dict[str, Tensor]:
    """The state dict with shards gathered, on the CPU. All ranks call it."""
    state = network.state_dict()
    return {name: (v.full_tensor() if hasattr(v, "full_tensor") else v).cpu() for name, v in state.items()}


class BatchMaker:
    """Turns the canvases of one iteration into micro-batches of crops and masks, the same for any number of ranks.

    `plan` draws the random parameters on the CPU, in the loader's workers if there are any; a call applies them.
    """

    def __init__(self, cfg: DictConfig, device: torch.device):
        self.cfg, self.device = cfg, device
        self.augment = Augment(cfg.crops, cfg.data.mean, cfg.data.std)
        self.grid = (cfg.crops.global_size // cfg.model.patch_size,) * 2
        self.rank_batch_size = cfg.train.batch_size // distributed.world_size()  # images of this rank
        self.micro_batch_size = self.rank_batch_size // cfg.train.accumulate
        self.first = distributed.rank() * self.rank_batch_size  # image of this rank in the batch of all ranks

    def masks(self, iteration: int) -> Tensor:
        """Masks of all global crops of all ranks.  # [2, batch_size, N] bool"""
        cfg, total = self.cfg, self.cfg.train.batch_size
        generator = random.Random(seed_of(cfg.seed, iteration, "masks"))
        masks = sample_masks(
            GLOBAL_CROPS * total, self.grid, cfg.ibot.mask_probability, tuple(cfg.ibot.mask_ratio), generator
        )
        return torch.from_numpy(masks).unflatten(0, (GLOBAL_CROPS, total))

    def micro_batches(self) -> list[slice]:
        """The images of each micro-batch, within those of this rank."""
        size = self.micro_batch_size
        return [slice(start, start + size) for start in range(0, self.rank_batch_size, size)]

    def plan(self, iteration: int, sizes: Tensor) -> Packed:
        """Crop parameters and masks of this rank's images of sizes [rank_batch_size, 2], by micro-batches."""
        cfg, masks, tensors = self.cfg, self.masks(iteration), []
        for images in self.micro_batches():
            position = self.first + images.start  # of the micro-batch in the batch of all ranks
            generator = torch.Generator().manual_seed(seed_of(cfg.seed, iteration, "crops"))
            parameters = self.augment.sample(sizes[images], generator, position, cfg.train.batch_size)
            own_masks = masks[:, position : position + self.micro_batch_size].flatten(0, 1)
            tensors += [*parameters.tensors(), own_masks, *index_masks(own_masks)]
        return Packed.of(tensors)

    def __call__(self, data) -> Iterator[CropBatch]:
        tensors = iter(data.plan.tensors())
        for images in self.micro_batches():
            parameters = AugmentParameters.of(tensors)
            views, sizes = [canvas[images] for canvas in data.canvases], data.sizes[images]
            masks, masked_indices, mask_weights = islice(tensors, 3)
            yield CropBatch(
                global_crops=self.augment.apply_global(views[0], sizes, parameters),
                local_crops=self.augment.apply_local(views[0], sizes, parameters),
                masks=masks,
                other_global_crops=self.augment.apply_global(views[1], sizes, parameters) if len(views) > 1 else None,
                masked_indices=masked_indices,
                mask_weights=mask_weights,
            )


class HostCopy:
    """A tensor on its way to the host; `values` waits for the work before the copy, not for later work."""

    def __init__(self, tensor: Tensor):
        self.copied, self.host = None, tensor
        if tensor.is_cuda:
            self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def values(self) -> list:
        if self.copied:
            self.copied.synchronize()
        return self.host.tolist()


class LossMonitor:
    """Loss terms of the last step, averaged over ranks. They are copied to the host after the step, and read when the
    next one has been launched, so that the host never waits for a GPU.

    Stops the run at the first NaN or inf, and tells when any rank was asked to leave.
    """

    def __init__(self) -> None:
        self.leaving = False  # this rank was asked to
        self.all_leaving = False  # some rank was: known to all one step later
        self.pending: tuple[int, list[str], HostCopy] | None = None
        self.terms: dict[str, float] = {}

    def ask_to_leave(self, *_: object) -> None:
        self.leaving = True

    def put(self, iteration: int, terms: dict[str, Tensor]) -> None:
        flag = torch.full((), float(self.leaving), device=next(iter(terms.values())).device)
        stacked = torch.stack([*(term.detach().float() for term in terms.values()), flag])
        self.pending = iteration, list(terms), HostCopy(distributed.all_reduce_mean(stacked))

    def read(self) -> bool:
        """Updates `terms` to the last step's. True when the run is to leave; FloatingPointError on NaN or inf."""
        if self.pending is None:
            return self.all_leaving
        (iteration, names, copy), self.pending = self.pending, None
        *values, leaving = copy.values()
        self.terms = dict(zip(names, values, strict=True))
        wrong = [name for name, value in self.terms.items() if value != value or abs(value) == float("inf")]
        if wrong:
            raise FloatingPointError(f"{wrong[0]} is {self.terms[wrong[0]]} at iteration {iteration}")
        self.all_leaving |= leaving > 0
        return self.all_leaving


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
        self.autocast_dtype = PRECISIONS[cfg.train.precision]
        if distributed.world_size() > 1:
            for network in model.networks():  # CPUs have no norm of float32 tokens by weights in bf16
                shard(network, self.device, self.autocast_dtype if self.device.type == "cuda" else None)
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
        self.make_batches = BatchMaker(cfg, self.device)
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
        total = self.stop_epoch * self.length
        log = MetricsLog(self.run, after=self.iteration or -1) if distributed.is_main() else None
        cfg = self.cfg
        batches = self.load_batches(total)
        bar = Progress(
            total * cfg.train.batch_size,
            self.run.name,
            "img",
            self.iteration * cfg.train.batch_size,
            enabled=distributed.is_main(),
        )
        try:
            with bar, collected_by_hand():
                if self.iteration == 0:
                    self.measure_knn(log)
                clock, waited, steps = time.perf_counter(), 0.0, 0
                while self.iteration < total:
                    if self.monitor.all_leaving:
                        self.monitor.read()  # nothing is saved before its losses are known to be finite
                        if self.saved != self.iteration:  # else it would replace one that is kept for evaluation
                            self.save(evaluate=False)
                        raise Terminated()
                    asked = time.perf_counter()
                    data = next(batches)
                    waited += time.perf_counter() - asked
                    self.model.observing = distributed.is_main() and (self.iteration + 1) % cfg.train.log_every == 0
                    self.model.information = self.collapse.window(self.iteration)
                    terms, row = self.step(data.iteration, self.make_batches(data))
                    self.monitor.read()  # of the step before
                    self.monitor.put(self.iteration, terms)
                    self.iteration, steps = self.iteration + 1, steps + 1
                    shown = {name: value for name, value in self.monitor.terms.items() if name == "total_loss"}
                    bar.update(cfg.train.batch_size, **shown)
                    if self.iteration % cfg.train.log_every == 0 or self.iteration == total:
                        self.monitor.read()
                        seconds = time.perf_counter() - clock
                        row |= self.monitor.terms | self.cost(seconds, steps, waited) | self.model.diagnostics
                        row |= self.collapse.read(self.iteration, steps)
                        if log:
                            log.write({"iteration": self.iteration, "epoch": self.iteration / self.length} | row)
                        self.collapse.report()
                        clock, waited, steps = time.perf_counter(), 0.0, 0
                    if self.iteration % self.length == 0:
                        self.end_epoch(log)
                self.collapse.report(at_end=True)
        finally:
            signal.signal(signal.SIGTERM, previous)
            if log:
                log.close()

    def load_batches(self, stop_iteration: int) -> Iterator:
        data = self.cfg.data
        resident = ResidentImages(self.dataset, data.workers, self.device) if data.resident else None
        return iter(
            make_loader(
                self.dataset,
                self.cfg.train.batch_size,
                self.cfg.seed,
                self.iteration,
                stop_iteration,
                distributed.rank(),
                distributed.world_size(),
                data.workers,
                self.device,
                resident,
                self.make_batches.plan,
            )
        )

    def step(self, iteration: int, batches: Iterator[CropBatch]) -> tuple[dict[str, Tensor], dict[str, float]]:
        """One optimiser step: the terms to display, and this iteration's schedule."""
        cfg, model = self.cfg, self.model
        torch.manual_seed(seed_of(cfg.seed, iteration, distributed.rank()))  # drop path
        values = self.schedules(iteration)
        apply_schedule(self.optimizer, values)
        self.optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor] = {}
        dtype = self.autocast_dtype
        progress = iteration / max(self.cfg.train.epochs * self.length, 1)
        for batch in batches:
            with torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext():
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

    def end_epoch(self, log: MetricsLog | None) -> None:
        epoch, train = self.iteration // self.length, self.cfg.train
        self.monitor.read()  # as above
        evaluate = epoch % train.eval_every == 0 or epoch in self.keep or epoch == self.stop_epoch
        if evaluate or epoch % train.checkpoint_every == 0:
            self.save(evaluate)
        if train.knn_every and epoch % train.knn_every == 0:
            self.measure_knn(log)
        gc.collect()

    def measure_knn(self, log: MetricsLog | None) -> None:
        """A row with the live kNN figure; the one at iteration 0 is the untrained backbone's."""
        if not (self.live_knn and self.cfg.train.knn_every):
            return
        accuracy = self.live_knn(self.model.eval().published()["backbone"])
        self.model.train()
        if log and accuracy is not None:
            log.write({"iteration": self.iteration, "epoch": self.iteration / self.length, "live_knn_top1": accuracy})
