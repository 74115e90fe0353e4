"""What a plan of dinov2.pretrain costs: bytes on the disk, and seconds by the first batches on this machine."""

import shutil
import tempfile
import time
from pathlib import Path

from omegaconf import OmegaConf

from dinov2.run import stages
from dinov2.run.options import Options
from dinov2.run.survey import Survey

MEASURED_S = 3.0  # seconds of training steps that the estimate is made of


def costs_of(o: Options, survey: Survey, found: dict) -> dict[str, float]:
    """Seconds of the parts by name, and bytes of disk as "disk". found: what Neighbor2Neighbor.outlook says."""
    from dinov2.train import curriculum  # here, as it loads PyTorch

    depth = 4 if survey.deep or o.copies == "npy" else 1
    runs = {}
    for method in o.methods:
        cfg = stages.load_settings(stages.train_arguments(o, o.noises[0], method, o.seeds[0]))
        runs |= {str(stage.run): stage for stage in curriculum.plan(cfg)}
    steps = int(o.denoiser[o.denoiser.index("--steps") + 1])
    costs = {"denoiser": steps * found["step_s"]}
    costs["denoised copy"] = survey.count * survey.pixels / 1e6 * found["megapixel_s"]
    costs["disk"] = survey.count * survey.pixels * survey.channels * depth
    times: dict[bool, tuple[float, int]] = {}
    for stage in runs.values():
        anchored = bool(stage.anchor)
        if anchored not in times:
            times[anchored] = measure_training(stage)
        seconds, size = times[anchored]
        train = stage.cfg.train
        kept = len({*range(train.eval_every, stage.stop_epoch + 1, train.eval_every), *stage.keep}) + train.keep_last
        costs["disk"] += kept * size * len(o.seeds)
        costs[stage.run.name] = seconds * stage.stop_epoch * train.epoch_length * len(o.seeds) / o.gpus
    return costs


def measure_training(stage) -> tuple[float, int]:
    """Seconds of an iteration of a stage, by some on the folder's own images, and bytes of a checkpoint."""
    import torch

    from dinov2.data.dataset import dataset_from_config
    from dinov2.train import curriculum
    from dinov2.train.trainer import Trainer

    model = curriculum.build_model(stage)
    counted = [model.student, model.student, *model.trained(), model.published()]  # moments; networks; for evaluation
    size = 4 * sum(p.numel() for network in counted for p in network.parameters())
    images = dataset_from_config(stage.cfg, "train", ("noisy",) * (2 if stage.anchor else 1))
    images.keep(list(range(min(64, len(images)))))
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


def check_disk(output: str, need: float) -> None:
    """Says how much is needed and free. ValueError where what is not there yet does not fit."""
    there = sum(path.lstat().st_size for path in Path(output).rglob("*"))
    free = shutil.disk_usage(output).free
    print(f"disk: {need / 1e9:.2g} GB needed for checkpoints and the denoised copy, {free / 1e9:.3g} GB free")
    if need - there > free:
        raise ValueError(
            f"{output} lies on a disk with {free / 1e9:.3g} GB free, {need / 1e9:.3g} GB are needed: give --output on "
            "another one, or keep fewer checkpoints (train.eval_every=N)"
        )
