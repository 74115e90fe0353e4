"""Revisited Oxford/Paris scores against recorded numbers, distractors, and damaged or hostile ground truths."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.eval import revisited
from tests.conftest import ROOT, golden

REVISITED_DIR = Path(os.environ.get("REVISITED_DIR", ROOT / ".data" / "revisited"))


def test_recorded_scores():
    recorded = golden("revisitop.json")
    scores = revisited.score(np.asarray(recorded["ranks"]), recorded["gnd"], tuple(recorded["kappas"]))
    for level, expected in recorded["expected"].items():
        score = scores[level]
        assert score.mean_ap == pytest.approx(expected["map"], abs=1e-9)
        assert list(score.precision_at.values()) == pytest.approx(expected["mp_at"], abs=1e-9)
        expected_aps = [np.nan if ap is None else ap for ap in expected["aps"]]
        assert score.average_precisions == pytest.approx(expected_aps, abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("name", ["roxford5k", "rparis6k"])
def test_recorded_scores_on_the_real_ground_truth(name):
    path = REVISITED_DIR / f"gnd_{name}.pkl"
    if not path.is_file():
        pytest.skip(f"no {path}: the ground truth is not shipped with the project (REVISITED_DIR names its folder)")
    recorded = golden("revisited_real_ground_truth.json")[name]
    truth = revisited.load_ground_truth(path)
    assert (len(truth.images), len(truth.queries)) == (recorded["n_images"], recorded["n_queries"])
    rng = np.random.RandomState(recorded["feature_seed"])
    database = rng.standard_normal((recorded["n_images"], recorded["dim"]))
    queries = rng.standard_normal((recorded["n_queries"], recorded["dim"]))
    for q, kinds in enumerate(truth.relevance):
        database[kinds["easy"]] += recorded["easy_pull"] * queries[q]
        database[kinds["hard"]] += recorded["hard_pull"] * queries[q]
    database /= np.linalg.norm(database, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores = revisited.score(revisited.rank(database @ queries.T), truth.relevance)
    for level, expected in recorded["expected"].items():
        assert scores[level].mean_ap == pytest.approx(expected["map"], abs=1e-6)
        assert list(scores[level].precision_at.values()) == pytest.approx(expected["mp_at_1_5_10"], abs=1e-6)


def test_perfect_and_worst_rankings():
    relevance = [{"easy": [0], "hard": [1], "junk": [2]}]
    perfect = revisited.score(np.array([[2], [0], [1], [3], [4]]), relevance)
    assert [perfect[level].mean_ap for level in revisited.LEVELS] == [1.0, 1.0, 1.0]
    worst = revisited.score(np.array([[3], [4], [0], [2], [1]]), relevance)
    # Easy: junk and hard leave the ranking, image 0 is third: precision 0 before it, 1/3 at it.
    assert worst["easy"].mean_ap == pytest.approx((0 + 1 / 3) / 2)
    assert worst["easy"].precision_at == {1: 0.0, 5: pytest.approx(1 / 3), 10: pytest.approx(1 / 3)}


def test_a_level_without_any_positive_is_not_a_number():
    scores = revisited.score(np.array([[0], [1]]), [{"easy": [0], "hard": [], "junk": []}])
    assert np.isnan(scores["hard"].mean_ap) and scores["easy"].mean_ap == 1.0


def test_distractors_by_chunks_equal_one_long_ranking():
    generator = torch.Generator().manual_seed(0)

    def unit(n):
        return torch.nn.functional.normalize(torch.randn(n, 8, generator=generator), dim=1)

    database, queries, distractors = unit(60), unit(5), unit(500)
    similarity = (database @ queries.T).numpy()
    relevance = [{"easy": [q, q + 10], "hard": [q + 20], "junk": [q + 30, q + 40]} for q in range(5)]
    ahead = revisited.count_ahead(similarity, distractors.split(37), queries)
    by_chunks = revisited.score(revisited.rank(similarity), relevance, ahead=ahead)
    whole = revisited.score(revisited.rank((torch.cat([database, distractors]) @ queries.T).numpy()), relevance)
    for level in revisited.LEVELS:
        assert by_chunks[level].mean_ap == pytest.approx(whole[level].mean_ap, abs=1e-12)
        assert by_chunks[level].precision_at == pytest.approx(whole[level].precision_at)
    assert ahead.max() > 0


def test_an_equal_distractor_does_not_come_before_the_database():
    queries = torch.tensor([[1.0, 0.0]])
    similarity = np.array([[0.5], [1.0]], dtype=np.float32)
    ahead = revisited.count_ahead(similarity, [torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.75, 0.0]])], queries)
    assert ahead.tolist() == [[2], [0]]


class _Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_pickle_ran",)


def _truth(**changes):
    entry = {"bbx": [0, 0, 4, 4], "easy": [0], "hard": [], "junk": [1]}
    return {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [entry]} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_Hostile(), "names the class"),
        (_truth(gnd=[{"bbx": [0, 0, 4, 4], "easy": [7], "hard": [], "junk": []}]), "outside of the 2 listed"),
        (_truth(imlist=["../../etc/passwd", "b"]), "outside of its folder"),
        (_truth(gnd=[]), "1 queries, but 0 ground truths"),
        (_truth(gnd=[{"bbx": [0, 0, 4, 4], "easy": [0]}]), "hard"),
        (_truth(gnd=[{"bbx": [0, 0, float("inf"), 4], "easy": [0], "hard": [], "junk": []}]), "4 finite edges"),
        (_truth(gnd=[{"bbx": [0, 0, 4, 4], "easy": [1e400], "hard": [], "junk": []}]), "is not a Revisited"),
        (_truth(gnd=[[]]), "is not a Revisited"),
        ({"images": []}, "imlist"),
    ],
)
def test_refused_ground_truths(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "gnd_x.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=message) as raised:
        revisited.load_ground_truth(path)
    assert str(path) in str(raised.value)
    assert not (tmp_path / "hostile_pickle_ran").exists()


def test_truncated_and_missing_ground_truth(tmp_path):
    path = tmp_path / "gnd_x.pkl"
    path.write_bytes(pickle.dumps(_truth())[:-20])
    with pytest.raises(ValueError, match="gnd_x.pkl"):
        revisited.load_ground_truth(path)
    with pytest.raises(ValueError, match="no ground truth"):
        revisited.load_ground_truth(tmp_path / "gnd_y.pkl")
