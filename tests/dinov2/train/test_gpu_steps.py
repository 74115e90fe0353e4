"""The recorded steps on a GPU: in float32, in bf16 within its band, compiled, and sharded over one rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from dinov2.train.placement import compile_parts, shard
from tests.dinov2.train import steps
from tests.dinov2.train.steps import (
    SETTINGS,
    check_three_steps,
    run_steps,
    steps_config,
)

pytestmark = pytest.mark.gpu
NAME = "train_steps_centering_shared_head"
TERMS = ("dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss")


def steps_model(name: str, cfg):
    return steps.steps_model(name, cfg).to("cuda")


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """Convolutions in TF32, as PyTorch has them by default, are nearer to bf16's precision than to float32's."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.compiler.set_stance("default")


@contextmanager
def lone_rank() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda:0"))
    try:
        yield
    finally:
        dist.destroy_process_group()


def assert_near(history, other, rtol: float) -> None:
    for one, two in zip(history, other, strict=True):
        for term in TERMS:
            assert two[term] == pytest.approx(one[term], rel=rtol), term


@pytest.mark.parametrize("name", SETTINGS)
def test_float32_is_as_recorded(name):
    check_three_steps(name, steps_model)


@pytest.mark.parametrize("name", SETTINGS)
def test_bf16_stays_in_its_band(name):
    cfg = steps_config(name)
    exact, _ = run_steps(name, steps_model(name, cfg), cfg)
    rounded, _ = run_steps(name, steps_model(name, cfg), cfg, dtype=torch.bfloat16)
    assert_near(exact, rounded, 0.02)


@pytest.mark.parametrize("dtype,rtol", [(None, 1e-4), (torch.bfloat16, 0.02)])
def test_compiled_blocks_and_heads_train_alike(dtype, rtol):
    cfg = steps_config(NAME)
    model = steps_model(NAME, cfg)
    for network in model.networks():
        compile_parts(network)
    compiled, _ = run_steps(NAME, model, cfg, dtype=dtype)
    torch.compiler.set_stance("force_eager")  # also what is compiled unasked: softmax and cross-entropies
    plain, _ = run_steps(NAME, steps_model(NAME, cfg), cfg, dtype=dtype)
    assert_near(plain, compiled, rtol)


@pytest.mark.parametrize("dtype,rtol", [(None, 1e-4), (torch.bfloat16, 0.02)])
def test_one_sharded_rank_trains_as_one_that_is_not(dtype, rtol):
    cfg = steps_config(NAME)
    plain, _ = run_steps(NAME, steps_model(NAME, cfg), cfg, dtype=dtype)
    with lone_rank():
        model = steps_model(NAME, cfg)
        for network in model.networks():
            shard(network, torch.device("cuda"), dtype)
        sharded, _ = run_steps(NAME, model, cfg, dtype=dtype)
    assert_near(plain, sharded, rtol)
