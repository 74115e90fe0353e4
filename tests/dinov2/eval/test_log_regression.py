"""Logistic regression: the path over C, the held-out part, few-shot draws."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from dinov2 import load_backbone
from dinov2.eval import common, log_regression
from tests.dinov2.eval.test_knn import features


def test_warm_started_path_reaches_the_same_models():
    train, test = features(90), features(60, seed=1)
    for c, model in log_regression.fit_path(train, [10.0, 0.01, 1.0], max_iter=1000):
        cold = LogisticRegression(C=c, max_iter=1000).fit(train.values.double().numpy(), train.labels.numpy())
        np.testing.assert_allclose(model.coef_, cold.coef_, atol=5e-3)
        assert log_regression.accuracy(model, test) == pytest.approx(
            100 * cold.score(test.values.double().numpy(), test.labels.numpy()), abs=2
        )


def test_c_is_chosen_on_held_out_images_alone(run, monkeypatch):
    cfg = common.load_settings(run, ["eval.log_regression.c_number=4", "eval.log_regression.c_max=1"])
    seen = []
    accuracy = log_regression.accuracy
    monkeypatch.setattr(log_regression, "accuracy", lambda m, t: (seen.append(set(t.names)), accuracy(m, t))[1])
    ((metric, value, details),) = log_regression.evaluate(load_backbone(run), cfg, common.Job(run, "x"))
    *chosen_on, reported_on = seen
    assert metric == "log_regression_top1" and value > 50
    assert len(chosen_on) == 4 and all(len(names) == 6 and names == chosen_on[0] for names in chosen_on)  # 60 / 10
    assert all(name.startswith("train/") for name in chosen_on[0])
    assert all(name.startswith("val/") for name in reported_on)
    scores = details["held_out_top1"]
    assert max(scores.values()) == scores[f"{details['C']:.3g}"]


def test_few_shot_variants(run):
    settings = ["eval.log_regression.n_per_class=[2]", "eval.log_regression.tries=2", "eval.log_regression.c_number=3"]
    rows = list(log_regression.evaluate(load_backbone(run), common.load_settings(run, settings), common.Job(run, "x")))
    assert [metric for metric, _, _ in rows] == ["log_regression_top1", "log_regression_top1_2_per_class"]
    details = rows[1][2]
    assert len(details["values"]) == len(details["C"]) == 2 and details["seeds"] == [0, 1]


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        next(log_regression.fit_path(features(10, classes=1), [1.0], 10))
