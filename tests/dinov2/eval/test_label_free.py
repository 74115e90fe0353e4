"""Figures without labels: each moves the right way, rows, data without labels, the choice of the best checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch

from dinov2.eval import common, floors, knn, label_free, pca
from tests.dinov2.eval.conftest import make_run
from utils.images import write_image
from utils.results import append_result, read_results


def evaluate(run, *arguments, name="label_free", evaluator=label_free.evaluate):
    return common.run(name, evaluator, "", lambda cfg: [cfg], [f"run={run}", *arguments])


def flat(root, images=24):
    """Images of one folder, without classes and splits."""
    rng = np.random.default_rng(0)
    for i in range(images):
        write_image(root / f"{i}.png", rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    return root


def structured(noise, images=300, width=32, seed=0):
    """Two versions of features with five clusters, each under a noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    scene = 3 * torch.randn(5, width, generator=generator)[torch.arange(images) % 5]
    scene += torch.randn(images, width, generator=generator)
    return [scene + noise * torch.randn(images, width, generator=generator) for _ in range(2)]


def test_ranks_are_those_of_the_spectrum():
    flat_spectrum = torch.linalg.qr(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert label_free.rankme(flat_spectrum) == pytest.approx(8, rel=1e-4)
    assert label_free.rankme(flat_spectrum[:, :3]) == pytest.approx(3, rel=1e-4)
    collapsed = torch.ones(50, 8) + 1e-3 * flat_spectrum
    assert label_free.rankme(collapsed) < 1.2  # all images alike
    assert label_free.rankme(collapsed - collapsed.mean(dim=0)) > 5  # what is left about their mean


def test_agreement_counts_common_neighbours():
    values = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(values, dim=1)
    similarity = (rows @ rows.T).fill_diagonal_(-2)
    found = label_free.neighbours(values, 4)
    assert torch.equal(found.sort().values, similarity.topk(4).indices.sort().values)
    assert label_free.neighbour_agreement(values, 3 * values, 4) == 100
    twins = torch.ones(9, 6)  # all alike: an image is still no neighbour of itself
    assert (label_free.neighbours(twins, 3) != torch.arange(9)[:, None]).all()


def test_noise_in_the_features_lowers_agreement_and_similarity_and_raises_rankme():
    clean, noisy, random = structured(0.2), structured(2.0), structured(100.0)
    agreements = [label_free.neighbour_agreement(*pair, 10) for pair in (clean, noisy, random)]
    assert agreements[0] > 50 > agreements[1] > 1.5 * agreements[2]
    assert agreements[2] == pytest.approx(100 * 10 / 299, abs=1.5)  # by chance
    cosines = [label_free.centred_cosine(*pair) for pair in (clean, noisy, random)]
    assert cosines[0] > 0.9 > cosines[1] > 0.3 > cosines[2]
    ranks = [label_free.rankme(pair[0]) for pair in (clean, noisy, random)]
    assert ranks == sorted(ranks)  # why rank alone does not choose a checkpoint here


def test_rows_of_a_noisy_run(run):
    logged = {"iteration": 10, "information_cls_share": 0.1}, {"iteration": 20, "information_cls_ratio": 0.2}
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in logged)
    )  # by an older version, then by ours
    evaluate(run, "checkpoints=all", "eval.label_free.k=3", "eval.label_free.images=30")
    rows = {(row["epoch"], row["metric"]): row for row in read_results(run)}
    assert [metric for epoch, metric in rows if epoch == 1] == [
        "rankme", "effective_rank", "neighbour_agreement", "information",
    ]  # fmt: skip
    assert rows[1, "information"]["value"] == 10 and rows[2, "information"]["value"] == 20
    agreement = rows[1, "neighbour_agreement"]
    assert agreement["details"]["between"] == "noises" and agreement["details"]["images"] == 30
    assert agreement["details"]["by_chance"] == pytest.approx(100 * 3 / 29)
    assert agreement["details"]["by_chance"] < agreement["value"] < 100
    evaluate(run, "checkpoints=all", "eval.label_free.k=3", "eval.label_free.images=30")
    assert len(read_results(run)) == len(rows)  # there already


def test_denoised_copies_are_compared_where_there_are_some(run, digits, tmp_path, capsys):
    copies = tmp_path / "copies"
    shutil.copytree(digits / "train", copies / "train")
    (copies / "manifest.json").write_text(json.dumps({"kind": "denoised", "noise": "gauss50", "noise_seed": 0}))
    evaluate(run, f"data.denoised_root={copies}", "eval.label_free.k=3")
    values = {row["metric"]: row["value"] for row in read_results(run)}
    assert 0 < values["cosine_to_denoised"] < 1
    assert values["neighbour_agreement"] < values["denoised_agreement"] < 100  # the copies are the clean images
    (copies / "manifest.json").write_text(json.dumps({"kind": "denoised", "noise": "gauss255"}))
    evaluate(run, f"data.denoised_root={copies}", "eval.label_free.k=4")
    assert "denoised copies are left out" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["knn", "linear", "log_regression", "robustness"])
def test_evaluators_that_need_labels_give_way(tmp_path, capsys, name):
    import importlib

    run = make_run(tmp_path / "run", flat(tmp_path / "photos"), "noise=none")
    evaluator = importlib.import_module(f"dinov2.eval.{name}").evaluate
    assert evaluate(run, "checkpoints=all", "eval.label_free.k=3", name=name, evaluator=evaluator) == 0
    assert f"{name} needs labels, but " in capsys.readouterr().out
    rows = read_results(run)
    assert {row["metric"] for row in rows} == {"rankme", "effective_rank", "neighbour_agreement"}
    assert {row["details"]["between"] for row in rows if "between" in row["details"]} == {"crops"}
    evaluate(run, "checkpoints=all", "eval.label_free.k=3")
    assert len(read_results(run)) == len(rows)
    write_image(tmp_path / "photos" / "more.png", np.zeros((40, 40, 3), np.uint8))
    common._digest_images.cache_clear()  # as in the next call of the program
    evaluate(run, "checkpoints=all", "eval.label_free.k=3")
    assert len(read_results(run)) == 2 * len(rows)  # other images: evaluated anew


def test_pictures_and_floors_of_a_flat_folder(tmp_path, capsys):
    run = make_run(tmp_path / "run", flat(tmp_path / "photos"), "noise=none", epochs=(1,))
    evaluate(run, name="pca", evaluator=pca.evaluate)
    assert (run / "pca.png").exists()
    assert floors.run([f"run={run}"]) == 0
    assert "no floors: " in capsys.readouterr().out


def test_best_checkpoint_without_labels(run):
    """Labels decide where there are some."""
    with pytest.raises(ValueError, match="has no linear probe, kNN or label-free figures yet"):
        common.choose_checkpoints(run, "best")
    for iteration, value in ((10, 30.0), (20, 20.0)):
        row = {"method": "nct", "noise": "gauss50", "dataset": "d", "seed": 0, "epoch": 1, "iteration": iteration}
        row |= {"view": "noisy", "protocol": "full"}
        append_result(run / "results.jsonl", row | {"metric": "rankme", "value": 100 - value})
        append_result(run / "results.jsonl", row | {"metric": "neighbour_agreement", "value": value})
    assert common.choose_checkpoints(run, "best")[0].iteration == 10
    append_result(run / "results.jsonl", row | {"metric": "knn20_top1", "value": 1.0})
    assert common.choose_checkpoints(run, "best")[0].iteration == 20


def test_more_neighbours_than_images(tmp_path, capsys):
    run = make_run(tmp_path / "run", flat(tmp_path / "photos", images=4), "noise=none", epochs=(1,))
    evaluate(run)
    assert "eval.label_free.k becomes 1, as there are 4 images" in capsys.readouterr().out
    assert [row["details"]["k"] for row in read_results(run) if row["metric"] == "neighbour_agreement"] == [1]
    alone = make_run(tmp_path / "alone", flat(tmp_path / "photo", images=1), "noise=none", epochs=(1,))
    with pytest.raises(ValueError, match="a single training image"):
        evaluate(alone)


def test_knn_still_refuses_what_is_wrong_with_labels(run):
    with pytest.raises(ValueError, match="n_per_class=99, but class"):
        evaluate(run, "eval.knn.n_per_class=[99]", name="knn", evaluator=knn.evaluate)
