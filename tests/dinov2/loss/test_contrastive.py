"""Losses between two crops against lightly's, value and gradient."""

import pytest
import torch

from dinov2.loss import info_nce, negative_cosine, nt_xent

lightly = pytest.importorskip("lightly.loss")
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


def views(images: int = 7, dim: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, dim, generator=generator).mul_(3).requires_grad_() for _ in range(2)]


def check(ours, theirs) -> None:
    results = []
    for loss in (ours, theirs):
        pair = views()
        value = loss(*pair)
        value.backward()
        results.append((value.detach(), *(view.grad for view in pair if view.grad is not None)))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, **CLOSE)


@pytest.mark.parametrize("temp", [0.1, 0.5])
def test_nt_xent(temp):
    check(lambda first, second: nt_xent(first, second, temp), lightly.NTXentLoss(temp))


def contrast_with_bank(queries, keys, temp):
    """MoCo's loss as lightly has it: each query against its key and a memory bank, here of the batch's other keys."""
    losses = []
    for i in range(len(queries)):
        others = torch.cat((keys[:i], keys[i + 1 :])).detach()
        loss = lightly.NTXentLoss(temp, memory_bank_size=(len(others), keys.shape[1]))
        loss.memory_bank.bank = torch.nn.functional.normalize(others, dim=1)
        loss.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
        losses.append(loss(queries[i : i + 1], keys[i : i + 1].detach()))
    return 2 * temp * torch.stack(losses).mean()


def test_info_nce():
    check(
        lambda queries, keys: info_nce(queries, keys.detach(), 0.2),
        lambda queries, keys: contrast_with_bank(queries, keys, 0.2),
    )


def test_negative_cosine():
    theirs = lightly.NegativeCosineSimilarity()
    check(negative_cosine, lambda predictions, targets: theirs(predictions, targets.detach()))
