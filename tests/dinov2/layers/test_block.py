"""What a block keeps for its backward pass."""

from unittest import mock

import pytest
import torch

from dinov2.layers.block import FFN


@pytest.mark.parametrize("kind", FFN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_the_activation_again_and_nothing_else(kind, dtype):
    torch.manual_seed(0)
    layer = FFN[kind](8, 24)
    first, last = layer.children()
    x, finished = torch.randn(6, 8, requires_grad=True), []
    last.register_forward_hook(lambda *_: finished.append(1))

    def run(on_a_gpu: bool):
        """Output and gradients, and how many numbers of the hidden width are kept for each token."""
        kept = []
        with (
            mock.patch.object(torch.Tensor, "is_cuda", on_a_gpu),
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            out = layer(x)
        gradients = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])
        hidden = {t.data_ptr(): t.shape[1] for t in kept if len(t) == 6 and t.shape[1] > 8}
        return [out, *gradients], sum(hidden.values())

    plain, many = run(on_a_gpu=False)
    again, few = run(on_a_gpu=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert few == first.out_features < many
    assert len(finished) == 2  # the product behind the activation is not computed again
