"""Rows of results: what they must have, and what older ones are taken for."""

import json

import pytest

from utils.results import append_result, read_results

ROW = {"noise": "gauss255", "dataset": "digits", "seed": 0, "epoch": 1, "iteration": 10, "metric": "knn20_top1"}
ROW |= {"value": 50.0, "view": "noisy", "protocol": "full"}


def test_rows_from_before_there_were_objectives_are_dinov2s(tmp_path):
    methods = {"dinov2": "none", "nc": "nc", "nct": "nct", "n2n": "denoised", "clean": "clean", "untrained": "none"}
    lines = [json.dumps(ROW | {"method": method, "details": {}}) for method in methods]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    rows = read_results(tmp_path)
    assert {row["method"]: row["curriculum"] for row in rows} == methods
    assert [row["objective"] for row in rows] == ["dinov2"] * 5 + [""]
    append_result(tmp_path / "results.jsonl", ROW | {"method": "nc", "objective": "simclr", "curriculum": "nc"})
    assert read_results(tmp_path)[-1]["objective"] == "simclr"


def test_a_row_without_a_field_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks method"):
        append_result(tmp_path / "results.jsonl", ROW)
