"""Training on a GPU waits for it in one place and sends it two things a step; on a fake device where there is none."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

from dinov2.config import load_config
from dinov2.data.dataset import dataset_from_config
from dinov2.objectives import OBJECTIVES
from dinov2.train.anchor import with_anchor
from dinov2.train.trainer import Trainer
from tests.dinov2.train.tiny import make_tree, settings
from tests.fake_cuda import FakeCuda, without_backward

ALLOWED = ["dinov2/train/loss_monitor.py values"]  # of the losses of the step before
REAL = torch.cuda.is_available()
needs_cuda_build = pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
TWO_CROPS = {"simclr", "mocov3", "simsiam"}
KINDS = [("dinov2", False, "0.0"), ("dinov2", False, "0.1"), ("dinov2", False, "0.3"), ("dinov2", True, "0.0")]
KINDS += [(name, False, "0.0") for name in OBJECTIVES if name != "dinov2"]  # objective, anchored, drop path


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("data") / "tiny")


def trainer_of(tree, output, name: str, anchored: bool, drop_path: str) -> Trainer:
    more = [
        f"objective={name}",
        f"model.drop_path={drop_path}",
        *(["crops.local_number=0"] if name in TWO_CROPS else []),
        *(["dino.prototypes=0"] if name == "simdinov2" else []),
    ]
    cfg = load_config(
        settings(tree, output, "train.precision=bf16", "train.log_every=100", f"data.denoised_root={tree}", *more)
    )
    torch.manual_seed(0)
    objective = OBJECTIVES[cfg.objective]
    model = with_anchor(objective)(cfg, weight=1.0) if anchored else objective(cfg)
    views = ("noisy", "denoised") if anchored else ("noisy",)
    return Trainer(cfg, model, dataset_from_config(cfg, "train", views), stop_epoch=1)


def few_steps(trainer: Trainer, number: int, last) -> None:
    """Steps as `fit` takes them, the last one inside of `last`."""
    batches = trainer.load_batches(number)
    for iteration in range(number):
        with last() if iteration == number - 1 else nullcontext():
            data = next(batches)
            terms, _ = trainer.step(iteration, trainer.make_batches(data))
            trainer.monitor.read()
            trainer.monitor.put(iteration, terms)
    trainer.monitor.read()
    assert trainer.monitor.terms["total_loss"] != 0  # simdinov2: below 0


@needs_cuda_build
@pytest.mark.skipif(REAL, reason="there is a GPU: the test below takes it")
@pytest.mark.parametrize("objective,anchored,drop_path", KINDS)
def test_a_step_waits_for_the_losses_before_it_alone(tree, tmp_path, objective, anchored, drop_path):
    seen = {}

    @contextmanager
    def counted():
        gpu.waits.clear(), gpu.copies.clear()
        yield
        seen.update(waits=list(gpu.waits), copies=list(gpu.copies))

    with FakeCuda() as gpu:
        trainer = trainer_of(tree, tmp_path, objective, anchored, drop_path)
        assert all(p.is_cuda for p in trainer.model.parameters())
        with without_backward(trainer.model.student):
            few_steps(trainer, 2, counted)
    assert seen["waits"] == ALLOWED
    views = 2 if anchored else 1
    assert seen["copies"] == ["dinov2/data/loader.py _move"] * views + ["dinov2/data/packed.py to"]


@needs_cuda_build
@pytest.mark.skipif(REAL, reason="there is a GPU")
@pytest.mark.parametrize("wait", [torch.nonzero, lambda x: x[x > 0], torch.Tensor.item, torch.Tensor.cpu])
def test_the_fake_device_sees_a_wait_and_mixed_devices(wait):
    with FakeCuda() as gpu:
        x = torch.ones(1, device="cuda")
        wait(x)
        assert len(gpu.waits) == 1
        torch.tensor(1.0, device="cuda")
        assert len(gpu.waits) == 2
        with pytest.raises(RuntimeError, match="cuda:0 and on the CPU"):
            x + torch.ones(3)


@pytest.mark.gpu
@pytest.mark.parametrize("objective,anchored,drop_path", KINDS)
def test_a_step_on_a_gpu_waits_for_nothing(tree, tmp_path, objective, anchored, drop_path):
    """The event is no wait in PyTorch's eyes: none is left of the fake device's list. The first steps compile."""

    @contextmanager
    def guarded():
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    few_steps(trainer_of(tree, tmp_path, objective, anchored, drop_path), 5, guarded)
