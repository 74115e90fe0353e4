"""Type and bounds of every key, read from default.yaml, which also holds defaults, meanings and sources.

A comment there may begin with a rule, which ends at the first semicolon: choices, as `a (what it does) | b`, or
    [int | float | bool | text]  [>= N | > N | in [a, b] | rising in [a, b]]  [or null]
where a round bracket excludes that end and `rising` describes a pair. Without a type it is that of the default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from omegaconf import OmegaConf

from utils.nested import flatten
from utils.text import did_you_mean

PAGE = Path(__file__).parent / "configs" / "default.yaml"
FREE_FORM = ("anchor.weights", "curriculum.noisy_set")  # sections whose keys are the user's
RENAMED = {"eval.linear.cached_share": "eval.linear.cached_fraction"}  # old name in saved configs: today's
KINDS = {"int": int, "float": float, "bool": bool, "text": str}
NAMES = {bool: "true or false", int: "a whole number", float: "a number", dict: "{key: value}", str: "a text"}
NUMBER, NOTE = r"-?\d[\d.e-]*", r"( [(\[][^|]*)?"
RULE = re.compile(
    rf"(?P<choices>\w+{NOTE}( \| \w+{NOTE})+)|(?P<kind>int|float|bool|text)?\s*((?P<least>>=?) (?P<bound>{NUMBER})"
    rf"|(?P<rising>rising )?in (?P<left>[\[(])(?P<low>{NUMBER}), (?P<high>{NUMBER})(?P<right>[\])]))?"
    r"\s*(?P<null>or null)?"
)
LINE = re.compile(r"(?P<indent> *)(?P<name>\w+):(?P<value>[^#]*)(# *(?P<comment>.*))?")


@dataclass(frozen=True)
class Key:
    """What values a key may have."""

    kind: type  # of the value, or of the entries of a list: str, int, float, bool, dict, or object for anything
    rule: dict[str, str | None]  # the groups of RULE
    many: bool  # a list

    @classmethod
    def of(cls, default: object, rule: str = "") -> Key:
        """The key with this default. AssertionError if it is null and the rule names no type."""
        many = isinstance(default, list)
        example = next(iter(default), None) if many else default
        read = RULE.fullmatch(rule.strip())
        found = read.groupdict() if read else {}
        assert many or example is not None or found.get("kind"), f"null, and of no kind: {rule}"
        kind = KINDS[found["kind"]] if found.get("kind") else object if example is None else type(example)
        return cls(kind, found, many)

    def check_kind(self, name: str, value: object, source: str = "") -> None:
        """ValueError if the type of value is wrong. source: " in FILE", for the message."""
        if value is None and self.rule.get("null"):
            return
        entries = list(value) if OmegaConf.is_list(value) else [value]
        if self.many != OmegaConf.is_list(value) or not all(self._holds(entry) for entry in entries):
            raise ValueError(f"{name}={'null' if value is None else value}{source} must be {self}")
        if self.kind is str and not self.many and isinstance(value, int | float):
            raise ValueError(f"{name}={value}{source} is a number to YAML, maybe another than was written: quote it")

    def _holds(self, value: object) -> bool:
        if self.kind is dict:
            return OmegaConf.is_dict(value)
        if self.kind is bool or isinstance(value, bool):
            return self.kind in (bool, object) and isinstance(value, bool)
        kinds = {int: int, float: int | float, str: str | int | float}
        return self.kind is object or isinstance(value, kinds[self.kind])

    def __str__(self) -> str:
        one = NAMES.get(self.kind)
        return f"a list, each entry {one}" if self.many and one else one or "a list"

    def check_bounds(self, name: str, value: object) -> None:
        """ValueError if value, of the right type, lies outside the bounds."""
        rule = self.rule
        if value is None:
            return
        if choices := rule.get("choices"):
            check_choice(name, value, [choice.split()[0] for choice in choices.split("|")])
        elif rule.get("least"):
            least, strict = float(rule["bound"]), rule["least"] == ">"
            if value < least or (strict and value == least):
                raise ValueError(f"{name}={value} must be {'more than' if strict else 'at least'} {rule['bound']}")
        elif rule.get("low"):
            self._check_range(name, list(value) if self.many else [value])

    def _check_range(self, name: str, values: list) -> None:
        rule, low, high = self.rule, float(self.rule["low"]), float(self.rule["high"])
        above = all(value > low if rule["left"] == "(" else value >= low for value in values)
        below = all(value < high if rule["right"] == ")" else value <= high for value in values)
        if rule["rising"] and not (len(values) == 2 and values[0] <= values[1] and above and below):
            raise ValueError(f"{name}={values} must be two numbers that rise within {rule['low']} and {rule['high']}")
        if not (above and below):
            ends = f"{rule['left']}{rule['low']}, {rule['high']}{rule['right']}"
            raise ValueError(f"{name}={values if self.many else values[0]} must lie in {ends}")


@lru_cache(maxsize=1)
def defaults() -> dict:
    """default.yaml, unresolved; read once, because parsing takes longer than everything else."""
    return OmegaConf.to_container(OmegaConf.load(PAGE))


@lru_cache(maxsize=1)
def keys() -> dict[str, Key]:
    """Every key that holds a value, by its dotted name."""
    rules = _read_rules(PAGE.read_text())
    return {name: Key.of(default, rules.get(name, "")) for name, default in flatten(defaults()).items()}


def _read_rules(text: str) -> dict[str, str]:
    """The part of each key's comment before the first semicolon, by the dotted name."""
    found, path = {}, []
    for line in text.splitlines():
        if (match := LINE.fullmatch(line)) and not line.lstrip().startswith("-"):
            path = [*path[: len(match["indent"]) // 2], match["name"]]
            found[".".join(path)] = (match["comment"] or "").partition(";")[0]
    return found


STAGE = {  # keys of an entry of curriculum.stages
    name: Key.of(default, rule)
    for name, default, rule in (
        ("view", "", "noisy | denoised | clean | mix"),
        ("noise", None, "text or null"),
        ("epochs", 0, ""),
        ("stop", None, "int or null"),
        ("dir", "", ""),
        ("init", "", "scratch | restart | continue"),
        ("from_epoch", None, "int or null"),
        ("anchor", None, "bool or null"),
        ("mix", [0.0], "float in [0, 1] or null"),
        ("set", {}, ""),
        ("method", None, "text or null"),
    )
}


def suggest_key(name: str, known: Iterable[str], cutoff: float) -> str:
    """ "; did you mean KEY?", for messages on a key that does not exist: its new name, or the most alike of `known`."""
    return did_you_mean(RENAMED.get(name, name), known, "; ", cutoff=cutoff)


def check_choice(name: str, value: object, allowed: Iterable) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value} must be one of {', '.join(map(str, allowed))}")
