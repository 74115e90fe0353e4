"""The evaluators on a GPU that is not there: no tensor is on the wrong device, and no batch is waited for."""

import pytest
import torch

from dinov2 import load_backbone
from dinov2.checkpoint import list_checkpoints
from dinov2.eval import common, knn, linear
from dinov2.eval.features import extract
from tests.fake_cuda import FakeCuda

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the other tests of this folder take it"),
]


# Of a split: whether all are finite, and the labels' way there. None for each batch.
FEATURES = ["dinov2/eval/features.py check_finite", "dinov2/eval/features.py extract"]


def on_fake(run, evaluate, *overrides: str) -> tuple[object, FakeCuda]:
    """What `evaluate(backbone, cfg, job)` gives, and what it was seen to wait for."""
    cfg = common.load_settings(run, list(overrides))
    found = list_checkpoints(run)[-1]
    backbone = load_backbone(found.path)
    with FakeCuda() as gpu:
        backbone.to("cuda").eval()
        gpu.waits.clear(), gpu.copies.clear()
        return evaluate(backbone, cfg, common.Job(run, found.path.name)), gpu


def test_features(run):
    features, gpu = on_fake(run, lambda backbone, cfg, job: extract(backbone, cfg, "train"))
    assert features.values.is_cuda and len(features.values) == 60
    assert gpu.waits == FEATURES


def test_nearest_neighbours(run):
    rows, gpu = on_fake(run, lambda *arguments: list(knn.evaluate(*arguments)))
    assert [name for name, *_ in rows] == ["knn3_top1", "knn10_top1"]
    assert gpu.waits == [
        *FEATURES * 2,
        "dinov2/eval/knn.py accuracies",
        *["dinov2/eval/common.py accuracy_details"] * 2,
    ]


@pytest.mark.parametrize("protocol", ["exact", "cached"])
def test_linear_probe(run, protocol):
    """Of its iterations none waits."""
    rows, gpu = on_fake(run, lambda *arguments: list(linear.evaluate(*arguments)), f"eval.linear.protocol={protocol}")
    assert [name for name, *_ in rows] == ["linear_top1"]
    once = {"dinov2/eval/probes.py __init__", "dinov2/eval/linear.py summary", "dinov2/eval/common.py accuracy_details"}
    assert set(gpu.waits) == {
        *FEATURES,
        *once,
        *(["dinov2/eval/linear.py cache_crops"] if protocol == "cached" else []),
    }
