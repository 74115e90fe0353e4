"""When two figures differ: over seeds, over validation images, or as two counts."""

import base64

import numpy as np
import pytest

from utils.significance import Difference, difference


def row(value, seed=0, correct=None, images=None):
    details = {"images": images} if images else {}
    if correct is not None:
        bits = base64.b64encode(np.packbits(np.array(correct, dtype=np.uint8))).decode()
        details, value = {"images": len(correct), "correct": bits}, 100 * float(np.mean(correct))
    return {"value": value, "seed": seed, "details": details}


def test_three_common_seeds_are_paired():
    a, b = ([row(v, s) for s, v in enumerate(values)] for values in ((61.0, 52.0, 71.0), (60.0, 50.0, 70.0)))
    gap = difference(a, b[::-1])  # the order of the rows does not matter
    assert gap.over == "seeds, paired" and gap.points == pytest.approx(4 / 3)
    assert gap.error == pytest.approx(np.std([1, 2, 1], ddof=1) / 3**0.5)
    assert gap.sign == 1 and difference(b, a).sign == -1


def test_more_seeds_on_one_side_are_not_paired():
    a = [row(v, s) for s, v in enumerate((61.0, 52.0, 71.0, 60.0))]
    b = [row(v, s) for s, v in enumerate((60.0, 50.0, 70.0))]
    gap = difference(a, b)
    expected = np.hypot(np.std([61, 52, 71, 60], ddof=1) / 2, np.std([60, 50, 70], ddof=1) / 3**0.5)
    assert gap.over == "seeds" and gap.error == pytest.approx(expected) and gap.sign == 0


def test_images_are_paired_where_seeds_are_few():
    rng = np.random.default_rng(0)
    hard = rng.random(403)  # not a multiple of 8
    a, b = hard < 0.62, hard < 0.58
    gap = difference([row(0, 0, a)], [row(0, 1, b), row(0, 2, b)])
    assert gap.over == "images" and gap.points == pytest.approx(100 * (a.mean() - b.mean()))
    assert gap.error == pytest.approx(100 * np.std(a.astype(float) - b, ddof=1) / 403**0.5)
    unpaired = difference([row(100 * a.mean(), 0, images=403)], [row(100 * b.mean(), 1, images=403)])
    assert gap.sign == 1 and unpaired.error > 2 * gap.error and unpaired.sign == 0


def test_seeds_are_averaged_for_each_image():
    gap = difference([row(0, 0, [1, 0, 1, 0]), row(0, 1, [1, 1, 0, 0])], [row(0, 0, [0, 0, 0, 0])])
    assert gap.points == 50 and gap.error == pytest.approx(100 * np.std([1, 0.5, 0.5, 0], ddof=1) / 2)


def test_older_rows_are_two_counts():
    gap = difference([row(60.0, images=400)], [row(50.0, images=400)])
    assert gap.over == "counts" and gap.error == pytest.approx(100 * (2 * 0.245 / 400) ** 0.5, rel=0.01)
    assert gap.sign == 1
    # one side without bits, or lists of other lengths: no pairs
    assert difference([row(0, 0, [1, 0] * 9)], [row(50.0, images=18)]).over == "counts"
    assert difference([row(0, 0, [1, 0] * 9)], [row(0, 0, [1, 0] * 8)]).over == "counts"
    assert difference([row(0.0, images=9)], [row(0.0, images=9)]).error > 0


def test_without_a_number_of_images_nothing_is_told():
    gap = difference([row(90.0)], [row(10.0)])
    assert gap.error is None and gap.sign == 0 and str(gap) == "+80.0, standard error not known"


def test_equal_figures_cannot_be_told_apart():
    assert Difference(0.0, 0.0, "images").sign == 0 and Difference(4.0, 2.0, "images").sign == 0
    assert str(Difference(-4.04, 1.25, "images")) == "-4.0, standard error 1.2"
