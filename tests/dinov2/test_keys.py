"""Kind and bounds of the keys, as default.yaml says them."""

import pytest
from omegaconf import OmegaConf

from dinov2.keys import Key, check_choice, defaults, keys
from dinov2.models.vision_transformer import ARCHS
from dinov2.objectives import OBJECTIVES
from utils.images import MIXED
from utils.readers import STACKS


def choices_of(name: str) -> tuple[str, ...]:
    with pytest.raises(ValueError) as raised:
        keys()[name].check_bounds(name, "no such thing")
    return tuple(str(raised.value).partition("one of ")[2].split(", "))


def test_every_default_obeys_its_own_rule():
    cfg = OmegaConf.merge(defaults(), {"output_dir": "runs/x", "data": {"root": "images"}})
    for name, key in keys().items():
        key.check_kind(name, OmegaConf.select(cfg, name))
        key.check_bounds(name, OmegaConf.select(cfg, name))


def test_choices_are_those_of_the_code():
    assert choices_of("objective") == tuple(OBJECTIVES)
    assert choices_of("model.arch") == tuple(ARCHS)
    assert choices_of("data.mixed") == tuple(MIXED)
    assert choices_of("data.stack") == tuple(STACKS)


@pytest.mark.parametrize(
    "default, rule, good, bad, sentence",
    [
        (1, ">= 1", [1, 5], [0], "k=0 must be at least 1"),
        (0.1, "> 0", [1e-9], [0], "k=0 must be more than 0"),
        (None, "float in (0, 1) or null", [0.5, None], [0, 1], "must lie in \\(0, 1\\)"),
        (0.0, "in [0, 1)", [0, 0.9], [1.0, -0.1], "must lie in \\[0, 1\\)"),
        (
            [0.1, 0.5],
            "rising in [0, 1]",
            [[0, 1]],
            [[1, 0], [0.5], [0, 2]],
            "must be two numbers that rise within 0 and 1",
        ),
        ("a", "a (what it does, at length) | b [D]", ["a", "b"], ["c"], "k=c must be one of a, b"),
        ("x", "some words of a meaning, no rule", ["anything"], [], ""),
    ],
)
def test_bounds(default, rule, good, bad, sentence):
    key = Key.of(default, rule)
    for value in good:
        key.check_bounds("k", value)
    for value in bad:
        with pytest.raises(ValueError, match=sentence):
            key.check_bounds("k", value)


@pytest.mark.parametrize(
    "default, rule, value, sentence",
    [
        (None, "int >= 1 or null", "x", "k=x in f must be a whole number"),
        (None, "text or null", 3, "k=3 in f is a number to YAML"),
        (3, "", None, "k=null in f must be a whole number"),
        (3, "", True, "k=True in f must be a whole number"),
        ([1], "", 1, "k=1 in f must be a list, each entry a whole number"),
        ([], "", 1, "k=1 in f must be a list"),
    ],
)
def test_kinds(default, rule, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        Key.of(default, rule).check_kind("k", value, " in f")


def test_a_default_of_null_needs_a_kind():
    with pytest.raises(AssertionError, match="of no kind"):
        Key.of(None, "pixels")


def test_one_of_names_the_choices():
    with pytest.raises(ValueError, match="k=3 must be one of 1, 2"):
        check_choice("k", 3, (1, 2))
