"""Nested dicts, as configurations and states are: by dotted names, and with their references escaped."""

import re
from collections.abc import Callable, Iterator


def walk(content: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted name and value of everything in a nested dict, each section before what it holds."""
    for key, value in content.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")


def flatten(content: dict) -> dict[str, object]:
    """{"a": {"b": 1}} → {"a.b": 1}"""
    return {name: value for name, value in walk(content) if not isinstance(value, dict)}


def escaped(content: object) -> object:
    """content with every ${ in its texts escaped, so that OmegaConf reads two characters, not a reference."""
    return _map_texts(content, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def unescaped(content: object) -> object:
    """content with its texts as they were before escaped()."""
    return _map_texts(content, lambda text: re.sub(r"(\\*)\1\\\$\{", r"\1${", text))


def _map_texts(content: object, change: Callable[[str], str]) -> object:
    """Plain content, including nested lists and dicts, with each text changed; keys stay."""
    if isinstance(content, dict):
        return {key: _map_texts(value, change) for key, value in content.items()}
    if isinstance(content, list):
        return [_map_texts(value, change) for value in content]
    return change(content) if isinstance(content, str) else content
