"""Side-by-side classifiers: each must evolve exactly as a lone nn.Linear under torch's own SGD and cosine schedule."""

import pytest
import torch
from torch import nn

from dinov2.eval.probes import FeatureSet, Probes

DEPTH, WIDTH, CLASSES, RATES = 4, 6, 7, [0.01, 0.1, 0.5]


def test_each_classifier_equals_a_lone_linear_layer():
    probes = Probes(DEPTH, WIDTH, CLASSES, RATES, seed=0, device="cpu")
    generator = torch.Generator().manual_seed(1)
    steps = 12
    batches = [
        (torch.randn(16, (DEPTH + 1) * WIDTH, generator=generator), torch.randint(CLASSES, (16,), generator=generator))
        for _ in range(steps)
    ]
    lone = []
    for s, weights in zip(probes.slices, probes.weights, strict=True):
        for i, rate in enumerate(RATES):
            layer = nn.Linear(s.stop - s.start, CLASSES)
            rows = weights[i * CLASSES : (i + 1) * CLASSES]
            layer.weight.data.copy_(rows[:, :-1])
            layer.bias.data.copy_(rows[:, -1])
            optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=0)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
            for features, labels in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(features[:, s]), labels).backward()
                optimizer.step()
                schedule.step()
            lone.append((s, layer))
    for i, (features, labels) in enumerate(batches):
        probes.step(features, labels, i / steps)
    features, labels = batches[0]
    expected_hits = []
    for number, (s, layer) in enumerate(lone):
        group, i = divmod(number, len(RATES))
        rows = probes.weights[group][i * CLASSES : (i + 1) * CLASSES]
        torch.testing.assert_close(rows[:, :-1], layer.weight.data, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rows[:, -1], layer.bias.data, rtol=1e-4, atol=1e-6)
        order = layer(features[:, s]).topk(5, dim=1).indices == labels[:, None]
        expected_hits.append([order[:, 0].sum().item(), order.any(dim=1).sum().item()])
    assert probes.hits(features, labels).sum(dim=2).tolist() == expected_hits


def test_no_image_is_no_hit():
    """What a rank counts when there are more ranks than validation images."""
    probes = Probes(DEPTH, WIDTH, CLASSES, RATES, seed=0, device="cpu")
    hits = probes.hits(torch.zeros(0, (DEPTH + 1) * WIDTH), torch.zeros(0, dtype=torch.long))
    assert hits.sum(dim=2).tolist() == [[0, 0]] * len(probes.names)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_diverged_classifier_gets_nothing_right(broken):
    """Infinite logits and NaN come first in an order of logits, where they would hit by chance."""
    probes = Probes(DEPTH, WIDTH, CLASSES, RATES, seed=0, device="cpu")
    features, labels = torch.randn(40, (DEPTH + 1) * WIDTH), torch.arange(40) % CLASSES
    before = probes.hits(features, labels)
    probes.weights[0][CLASSES : 2 * CLASSES] = broken  # of the first feature set's second learning rate
    after = probes.hits(features, labels)
    assert not after[1].any()
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and torch.equal(after[3:], before[3:])


def test_start_is_as_published():
    probes = Probes(DEPTH, WIDTH, 50, RATES, seed=0, device="cpu")
    for weights in probes.weights:
        assert weights[:, -1].abs().max() == 0
        assert weights[:, :-1].std().item() == pytest.approx(0.01, rel=0.1)
    assert len(probes.names) == len(set(probes.names)) == 2 * 2 * len(RATES)


def test_feature_sets_read_the_right_columns():
    # columns: CLS of blocks -4, -3, -2, -1, then the mean patch token
    row = torch.arange(5).repeat_interleave(WIDTH)
    read = {
        (f.blocks, f.average): row[f.columns(DEPTH, WIDTH)].unique().tolist()
        for f in Probes(DEPTH, WIDTH, 2, [1.0], 0, "cpu").sets
    }
    assert read == {(1, False): [3], (1, True): [3, 4], (4, False): [0, 1, 2, 3], (4, True): [0, 1, 2, 3, 4]}
    assert [f.blocks for f in Probes(1, WIDTH, 2, [1.0], 0, "cpu").sets] == [
        1,
        1,
    ]  # a model of one block has no last four
    assert FeatureSet(1, True).columns(1, WIDTH) == slice(0, 2 * WIDTH)


def test_state_is_taken_up():
    first, second = (Probes(2, WIDTH, 3, RATES, seed, "cpu") for seed in (0, 1))
    features, labels = torch.randn(8, 3 * WIDTH), torch.randint(3, (8,))
    first.step(features, labels, 0.0)
    second.load_state_dict(first.state_dict())
    for probes in (first, second):
        probes.step(features, labels, 0.5)
    for a, b in zip(first.weights, second.weights, strict=True):
        assert torch.equal(a, b)
