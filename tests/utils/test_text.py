"""Phrases of messages."""

from utils.text import count_of, did_you_mean, duration, list_some, one_line


def test_a_hint_names_the_most_alike_word_or_nothing():
    assert did_you_mean("knnn", ["linear", "knn"], ": ") == ": did you mean knn?"
    assert did_you_mean("xyz", ["linear", "knn"], ": ", " ") == ""
    assert did_you_mean("xyz", ["base_lr"], after=" ", cutoff=0.0) == "did you mean base_lr? "


def test_long_lists_are_cut_and_the_rest_counted():
    assert list_some(["b", "a"]) == "a, b"
    assert list_some("gfedcba") == "a, b, c, d, e and 2 more"


def test_a_count_agrees_with_its_noun_and_an_error_fits_a_line():
    assert [count_of(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert one_line(ValueError("cut\n  at 3")) == "cut at 3" and one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_durations():
    assert [duration(s) for s in (0, 45.4, 89, 600, 3599, 12_000)] == [
        "0 s",
        "45 s",
        "89 s",
        "10 min",
        "1 h 00 min",
        "3 h 20 min",
    ]
