"""What is compiled on a GPU: traced whole, without a break, and equal to what a CPU computes."""

from functools import partial
from unittest import mock

import pytest
import torch

from dinov2.data import augment, resample
from dinov2.data.augment import Augment, AugmentParameters, Normalize
from dinov2.data.packed import Packed
from dinov2.layers.attention import Packing
from dinov2.layers.block import Block
from dinov2.loss import prototypes
from dinov2.objectives.distillation import build_network
from dinov2.train.placement import compile_parts
from tests.dinov2.data.test_augment import MEAN, STD, batch, crops_config, generator
from tests.dinov2.train.steps import steps_config

traced = partial(torch.compile, backend="aot_eager", fullgraph=True)  # what a compiler is given, run as it stands


def test_crops_for_all_images_at_once_are_those_of_each_alone(monkeypatch):
    """Within the one level that the two ways of resampling differ by; solarising jumps, so a few values may lie far."""
    whole = Augment(crops_config(), MEAN, STD)
    canvas, sizes, _ = batch(20)
    parameters = whole.sample(sizes, generator())
    packed = Packed.of(parameters.tensors())
    sent = AugmentParameters.of(iter(packed.tensors()))
    for one, other in zip(packed.tensors(), parameters.tensors(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    monkeypatch.setattr(augment, "cut", partial(resample.cut, dense=True))
    for way, drawn, size in ((whole.apply_global, "global_crops", 32), (whole.apply_local, "local_crops", 16)):
        settings = (size, 9, 128 / 255, *Normalize(MEAN, STD).on(torch.empty(1, 3)))
        at_once = augment._crops_without_choices(canvas, getattr(sent, drawn).tensors(), *settings)
        difference = (at_once - way(canvas, sizes, parameters)).abs()
        assert at_once.shape == difference.shape and (difference > 2 / 255 / 0.224).float().mean() < 0.002
        assert difference.mean() < 0.005


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_targets_and_losses_traced_are_the_same(kept):
    torch.manual_seed(0)
    student, center, out = torch.randn(6, 40), torch.randn(1, 40), torch.empty(2, 6, 40, dtype=kept)
    logits, log_sum = torch.randn(6, 40), torch.randn(6, 1)
    for place, way in zip(out, (lambda f: f, traced), strict=True):
        way(prototypes._softmax_into.__wrapped__)(place, logits, center, torch.tensor(0.04))
    torch.testing.assert_close(out[0], out[1])
    torch.testing.assert_close(out[0].float().sum(1), torch.ones(6), atol=2e-2, rtol=0)
    losses = [way(prototypes._row_losses.__wrapped__)(student, 0.1, [out[0]]) for way in (lambda f: f, traced)]
    torch.testing.assert_close(losses[0], losses[1])
    gradients = torch.empty(2, 6, 40)
    for place, way in zip(gradients, (lambda f: f, traced), strict=True):
        way(prototypes._gradient_into.__wrapped__)(place, student, log_sum, 0.1, [(out[0], torch.ones(6, 1))])
    torch.testing.assert_close(gradients[0], gradients[1])
    target = out[0].clone()  # whose memory the gradient may take
    traced(prototypes._gradient_into.__wrapped__)(target, student, log_sum, 0.1, [(target, torch.ones(6, 1))])
    torch.testing.assert_close(target, gradients[0].to(kept))


@pytest.mark.parametrize("drop_path", [0.0, 0.1])
def test_blocks_and_heads_are_traced_whole(drop_path):
    tiny = {"arch": "vit_tiny", "depth": 2, "drop_path": drop_path}
    cfg = steps_config("train_steps_centering_shared_head", model=tiny)
    network = build_network(cfg, drop_path=True)
    crops, read = [torch.randn(4, 3, 64, 64), torch.randn(6, 3, 32, 32)], [torch.tensor([1, 5]), torch.tensor([0])]

    def outputs():
        torch.manual_seed(0)
        tokens = network["backbone"](crops, [None, None], read)[0]["x_norm_patchtokens"]
        return network["dino_head"](tokens)

    plain = outputs()
    with mock.patch("torch.compile", traced):
        compile_parts(network)
    compiled = outputs()
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
    assert "blocks.0.attn.qkv.weight" in network["backbone"].state_dict()


def test_a_compiled_block_keeps_what_matrix_products_give_alone():
    """Neither activations nor normalised tokens, which elementwise passes make again."""
    block, x, kept = Block(64, 2, "mlp", 1e-5, drop_path=0.0), torch.randn(2 * 300, 64, requires_grad=True), {}
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True)):
        compile_parts(torch.nn.ModuleDict({"network": torch.nn.ModuleDict({"block": block})}))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        block(x, Packing(((2, 300),)))
    widths = [(t.shape[1], t.dtype) for t in kept.values() if len(t) == len(x) and t.shape[1] > 1]
    # The tokens that enter; what fc1 gives; what attention, its projection and fc2 give.
    assert sorted(widths, key=str) == [(256, torch.bfloat16), *[(64, torch.bfloat16)] * 3, (64, torch.float32)]
