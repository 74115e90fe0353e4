"""Features over ranks, here played one after another in one process."""

import pytest
import torch
from torch import nn

from dinov2.config import load_run_config
from dinov2.eval import features
from dinov2.eval.features import features_of, labelled_dataset
from utils import distributed


@pytest.mark.parametrize("images", [5, 2])
def test_every_rank_makes_as_many_passes_whatever_its_share_of_the_images(run, images, monkeypatch):
    """A sharded network gathers its weights in each: a rank with fewer passes would leave the others waiting."""
    cfg = load_run_config(run)
    cfg.eval.batch_size = 4
    dataset = labelled_dataset(cfg, "val").keep(range(images))
    passes, total = [], torch.zeros(images, 1)

    def read(backbone: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        passes[-1] += 1
        return batch.mean((1, 2, 3))[:, None]

    monkeypatch.setattr(features, "check_finite", lambda *_: None)
    alone = features_of(nn.Identity(), cfg, dataset, lambda _, batch: batch.mean((1, 2, 3))[:, None])
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        passes.append(0)
        total += features_of(nn.Identity(), cfg, dataset, read)  # summed over the ranks by all_reduce_sum elsewhere
    assert passes == [-(-images // 4)] * 4
    torch.testing.assert_close(total, alone)
