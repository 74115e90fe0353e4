"""Nearest neighbours against a brute-force count, few-shot draws, and sets that are too small."""

import numpy as np
import pytest
import torch

from dinov2 import load_backbone
from dinov2.eval import common, knn
from dinov2.eval.features import Features


def features(n, width=8, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    values = torch.randn(n, width, generator=generator) + torch.eye(classes, width)[labels]
    return Features(values, labels, [f"train/{i}" for i in range(n)], [f"class_{c}" for c in range(classes)])


def brute_force(train, test, k, temperature):
    a = train.values.double().numpy()
    b = test.values.double().numpy()
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    right = 0
    for row, label in zip(b @ a.T, test.labels.tolist(), strict=True):
        votes = np.zeros(len(train.classes))
        for i in np.argsort(-row)[:k]:
            votes[train.labels[i]] += np.exp(row[i] / temperature)
        right += votes.argmax() == label
    return 100 * right / len(test.labels)


@pytest.mark.parametrize("gallery_chunk", [7, 65536])
def test_equals_brute_force_in_any_chunks(monkeypatch, gallery_chunk):
    monkeypatch.setattr(knn, "GALLERY_CHUNK", gallery_chunk)
    monkeypatch.setattr(knn, "CHUNK", 5)
    train, test = features(60), features(33, seed=1)
    found = knn.accuracies(train, test, [1, 5, 20], 0.07)
    assert {k: found[k]["top1"] for k in found} == {
        k: pytest.approx(brute_force(train, test, k, 0.07)) for k in (1, 5, 20)
    }
    assert all(accuracy["top5"] == 100 for accuracy in found.values())  # three classes


def test_votes_do_not_overflow_at_small_temperatures():
    similarity = torch.tensor([[1.0, 0.99, 0.98]])
    votes = knn.vote(similarity, torch.tensor([[1, 0, 0]]), 3, 1e-4, 2)
    assert votes.isfinite().all() and votes.argmax() == 1


def test_more_neighbours_than_images(run):
    with pytest.raises(ValueError, match="eval.knn.k=200 is larger than the training set of 60"):
        knn.accuracies(features(60), features(9, seed=1), [10, 200], 0.07)
    cfg = common.load_settings(run, ["eval.knn.k=[3,61]"])
    rows = [metric for metric, *_ in knn.evaluate(load_backbone(run), cfg, common.Job(run, "x"))]
    assert rows == ["knn3_top1"]


def test_k_is_held_to_the_training_images_and_said(capsys):
    assert knn.limit_neighbours([10, 20], 60) == [10, 20] and capsys.readouterr().out == ""
    assert knn.limit_neighbours([10, 20, 200], 60) == [10, 20] and knn.limit_neighbours([100], 60) == [60]
    assert "eval.knn.k=[100] becomes [60], as there are 60 training images" in capsys.readouterr().out


def test_rows_and_few_shot_variants(run):
    cfg = common.load_settings(run, ["eval.knn.n_per_class=[4]", "eval.knn.tries=3"])
    rows = {m: (v, d) for m, v, d in knn.evaluate(load_backbone(run), cfg, common.Job(run, "x"))}
    assert list(rows) == ["knn3_top1", "knn10_top1", "knn3_top1_4_per_class", "knn4_top1_4_per_class"]
    value, details = rows["knn4_top1_4_per_class"]
    assert details["seeds"] == [0, 1, 2] and value == pytest.approx(np.mean(details["values"]))
    assert details["std"] == pytest.approx(np.std(details["values"])) and len(set(details["values"])) > 1
    assert rows["knn3_top1"][0] > 30  # four classes: even a random network tells digits apart


def test_few_per_class_is_balanced_and_seeded():
    train = features(30)
    few, rest = train.split_per_class(4, seed=0)
    assert few.labels.bincount().tolist() == [4, 4, 4] and len(rest.labels) == 18
    assert sorted(few.names + rest.names) == sorted(train.names)
    assert few.names == train.split_per_class(4, seed=0)[0].names != train.split_per_class(4, seed=1)[0].names
    with pytest.raises(ValueError, match="n_per_class=11, but class class_0 has 10"):
        train.split_per_class(11, seed=0)
