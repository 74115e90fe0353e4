"""The coding rate against its formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.loss import coding_rate


@pytest.mark.parametrize(("m", "d"), [(12, 5), (5, 12), (7, 7)])
def test_value_and_gradient(m, d):
    z = F.normalize(torch.randn(m, d, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
    rate = coding_rate(z, 0.05)
    (own,) = torch.autograd.grad(rate, z)
    exact = z.detach().double().requires_grad_()
    formula = torch.logdet(torch.eye(d) + d / (m * 0.05) * exact.t() @ exact) / 2 * (d + m) / (d * m)
    (wanted,) = torch.autograd.grad(formula, exact)
    torch.testing.assert_close(rate.double(), formula, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(own.double(), wanted, atol=1e-6, rtol=1e-5)


def test_embeddings_that_are_all_the_same_have_the_least():
    one = F.normalize(torch.ones(8, 4), dim=-1)
    assert coding_rate(one, 0.05) < coding_rate(torch.eye(4).repeat(2, 1), 0.05)
