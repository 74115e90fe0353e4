"""Attention over packed sequences: one kernel for all lengths gives what a call for each length gives."""

import pytest
import torch

from dinov2.layers.attention import Packing, attend_per_size, attend_varlen

SIZES = [(64, ((4, 197), (16, 37))), (32, ((3, 17), (5, 5), (2, 50)))]  # features a head, (sequences, tokens)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_starts_are_the_cumulative_lengths(device):
    packing = Packing.on(torch.device(device), SIZES[1][1])
    lengths = [tokens for sequences, tokens in packing.groups for _ in range(sequences)]
    expected = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    assert packing.sequences == len(lengths) and sum(packing.sizes) == sum(lengths)
    if device == "cuda":
        torch.testing.assert_close(packing.starts.cpu(), expected, atol=0, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim,groups", SIZES)
def test_all_lengths_in_one_kernel_equal_a_call_each(dim, groups, dtype):
    """Both are as near to float32 as each other, in the output and in the gradient."""
    torch.manual_seed(0)
    packing = Packing.on(torch.device("cuda"), groups)
    qkv = torch.randn(sum(packing.sizes), 3, 6, dim, device="cuda").to(dtype)
    weights = torch.randn(len(qkv), 6 * dim, device="cuda")
    found = []
    for attend, of in ((attend_per_size, torch.float32), (attend_per_size, dtype), (attend_varlen, dtype)):
        x = qkv.to(of).requires_grad_()
        out = attend(x, packing)
        (out.float() * weights).sum().backward()
        found.append((out.detach().float(), x.grad.float()))
    exact, each, whole = found
    for true, one, other in zip(exact, each, whole, strict=True):
        scale = true.norm()
        assert (other - true).norm() < 2 * (one - true).norm() + 1e-3 * scale
        assert (other - true).norm() < 2e-2 * scale
