"""YAML from elsewhere: an alias stands for a whole part of the file, and a few of them in a row for more than fits."""

import io
from itertools import chain
from pathlib import Path

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf

LIMIT = 100_000  # values; our largest configuration has some 200


def load_yaml(path: Path | str) -> DictConfig | ListConfig:
    """OmegaConf.load(). ValueError also for a file whose aliases stand for more than LIMIT values."""
    text = Path(path).read_text(encoding="utf-8")
    if "*" in text and _count_values(yaml.compose(text, yaml.SafeLoader), {}) > LIMIT:
        raise ValueError(f"its aliases (*) stand for more than {LIMIT} values")
    return OmegaConf.load(io.StringIO(text))


def _count_values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """How many values a node holds when its aliases are written out; of one that holds itself, more than LIMIT."""
    if id(node) not in known:
        known[id(node)] = LIMIT + 1
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        children = chain(*children) if isinstance(node, yaml.MappingNode) else children
        known[id(node)] = 1 + sum(_count_values(child, known) for child in children)
    return known[id(node)]
