"""The robustness sheet: one row a noise and metric, by the same code as the main figures."""

import pytest

from dinov2.eval import common, knn, robustness
from utils.noise import ALL_NOISES
from utils.results import read_results


def sheet(run, *settings):
    return common.run("robustness", robustness.evaluate, "", robustness.one_per_noise, [f"run={run}", *settings])


def test_default_noises_are_all_nine_and_clean(run):
    assert [cfg.noise for cfg in robustness.one_per_noise(common.load_settings(run, []))] == ["none", *ALL_NOISES]


def test_rows_under_each_noise(run):
    sheet(run, "eval.robustness.noises=[none,gauss50,speckle1]", "eval.linear.epoch_length=3")
    rows = {(row["noise"], row["metric"]): row for row in read_results(run)}
    metrics = ("robustness_knn3_top1", "robustness_knn10_top1", "robustness_linear_top1")
    assert set(rows) == {(noise, metric) for noise in ("none", "gauss50", "speckle1.0") for metric in metrics}
    assert rows["none", metrics[0]]["view"] == "clean" and rows["gauss50", metrics[0]]["view"] == "noisy"
    assert rows["none", metrics[0]]["value"] > rows["speckle1.0", metrics[0]]["value"]
    common.run("knn", knn.evaluate, "", lambda cfg: [cfg], [f"run={run}"])
    main = {row["metric"]: row["value"] for row in read_results(run)}
    assert main["knn3_top1"] == rows["gauss50", "robustness_knn3_top1"]["value"]  # its own noise: the main figure
    count = len(read_results(run))
    sheet(run, "eval.robustness.noises=[gauss50,shot1]", "eval.linear.epoch_length=3")  # gauss50 is there
    assert {row["noise"] for row in read_results(run)[count:]} == {"shot1"}


def test_unknown_noise(run):
    with pytest.raises(ValueError, match="pepper"):
        sheet(run, "eval.robustness.noises=[pepper]")
