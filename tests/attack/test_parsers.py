"""What users write and files hold, made up at random: it is taken as it stands, or refused in one line."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from dinov2.config import load_config, load_run_config, parse_value
from dinov2.data.index import build_index
from Neighbor2Neighbor.denoise import _parse_shard
from Neighbor2Neighbor.train import _config_options
from tests.dinov2.data.trees import make_tree
from utils.noise import NoiseSpec
from utils.report.data import read_run
from utils.results import append_json, read_json_lines, read_results

quick = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
few = settings(quick, max_examples=15)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SPICE = st.lists(st.sampled_from([*"${}\\'\"#[*&!x,?|>%@ \n", "${", ": ", " #", "1e3", "- "]))
ODD_TEXTS = st.one_of(TEXTS, SPICE.map("".join))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
)


def refused(function, *arguments):
    """What function returns, or None where it refuses, in one line."""
    try:
        return function(*arguments)
    except ValueError as error:
        assert str(error) and "\n" not in str(error), error


@quick
@given(st.one_of(TEXTS, st.from_regex(r"(gauss|shot|speckle)_?[0-9]{0,4}\.?[0-9]{0,4}", fullmatch=True)))
def test_a_noise_is_parsed_from_its_own_name(text):
    spec = refused(NoiseSpec.parse, text)
    assert spec is None or NoiseSpec.parse(str(spec)) == spec


@quick
@given(ODD_TEXTS.filter(lambda text: text not in ("", "null")))
def test_a_text_is_kept_to_the_letter(text):
    content = OmegaConf.create({"seed": 3, "root": parse_value("data.root", text)})
    assert content.root == text
    assert OmegaConf.create(OmegaConf.to_yaml(content)).root == text


@few
@given(
    st.sampled_from(["train.epochs", "crops.global_scale", "anchor.weights.shot3", "data.root", "x", "eval", ""]),
    ODD_TEXTS,
)
def test_an_override_is_taken_or_refused(key, text):
    cfg = refused(load_config, ["data.root=images", "output_dir=runs/x", f"{key}={text}"])
    assert cfg is None or isinstance(cfg, DictConfig)


@quick
@given(st.one_of(st.binary(max_size=60), ODD_TEXTS.map(str.encode), JSON.map(lambda value: json.dumps(value).encode())))
def test_a_config_file_is_read_or_refused_by_name(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_bytes(content)
    for read in (load_run_config, read_run, lambda run: _config_options(run / "config.yaml")):
        try:
            read(folder)
        except ValueError as error:
            assert "config.yaml" in str(error)


def test_a_file_of_aliases_is_refused_at_once(tmp_path):
    """Ten lines that stand for a billion values, and a list that holds itself."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    begun = time.monotonic()
    for text in ("\n".join(lines), "a: &a [*a]"):
        (tmp_path / "config.yaml").write_text(text)
        for read in (load_run_config, read_run, lambda run: _config_options(run / "config.yaml"),
                     lambda run: load_config([str(run / "config.yaml"), "data.root=x", "output_dir=y"])):  # fmt: skip
            with pytest.raises(ValueError, match="config.yaml.* aliases"):
                read(tmp_path)
    assert time.monotonic() - begun < 10


def test_aliases_in_reason_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("crops: {global_scale: &s [0.2, 1.0], local_scale: *s}")
    cfg = load_config([str(tmp_path / "x.yaml"), "data.root=x", "output_dir=y"])
    assert cfg.crops.local_scale == [0.2, 1.0]


@quick
@given(st.lists(st.one_of(st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode()))))
def test_lines_that_are_no_rows_are_left_out(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("run") / "results.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert all(isinstance(row, dict) for row in read_json_lines(path)) and read_results(path) == []
    append_json(path, {"a": "b"})
    assert read_json_lines(path)[-1] == {"a": "b"}


@few
@given(JSON, st.sampled_from(["groups", "times", "version", "split", None]))
def test_a_cached_list_is_used_or_made_anew(tmp_path_factory, value, key):
    root = make_tree(tmp_path_factory.mktemp("data"), classes=("ant",), splits=("train",), count=1)
    build_index(root, "train")
    cache = root / ".index-train.json"
    content = json.loads(cache.read_text())
    cache.write_text(json.dumps(value if key is None else content | {key: value}))
    assert build_index(root, "train").relatives == ["train/ant/0.png"]


@quick
@given(st.one_of(st.text("0123456789/ -x²", max_size=5), st.from_regex(r"[0-9]{0,2}/[0-9]{0,2}", fullmatch=True)))
def test_a_share_is_one_of_its_number(text):
    shard = refused(_parse_shard, text)
    assert shard is None or 0 <= shard[0] < shard[1]
