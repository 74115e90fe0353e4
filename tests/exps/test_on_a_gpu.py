"""The script for half an hour of a GPU: parts end in time, the finished are skipped, packs unpack to what they hold."""

import json
import os
import subprocess
import sys
import time

import pytest

from exps import on_a_gpu
from exps.on_a_gpu import Part
from tests.dinov2.train.tiny import make_tree

PYTHON = sys.executable


def part(*codes: str, together: bool = False) -> Part:
    return Part("part", 1, [[PYTHON, "-c", code] for code in codes], together)


@pytest.mark.parametrize(
    "codes,end,printed",
    [
        (("print(1)", "print(2)"), "finished", "1\n2\n"),
        (("raise SystemExit(3)", "print(2)"), "failed (exit codes [3])", ""),
    ],
)
def test_commands_run_in_order_up_to_the_first_failure(tmp_path, codes, end, printed):
    assert on_a_gpu.run_part(tmp_path, part(*codes), os.environ, 60) == end
    assert (tmp_path / "logs/part.log").read_text() == printed


def test_a_part_ends_in_time_with_all_that_it_started(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(120)'])"
    begin = time.monotonic()
    assert on_a_gpu.run_part(tmp_path, part(child, child, together=True), os.environ, 1.0) == "stopped"
    assert time.monotonic() - begin < 30
    assert "sleep(120)" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


def test_what_is_finished_is_skipped_and_results_are_small_files(tmp_path, monkeypatch, capsys):
    output, log = tmp_path / "output", tmp_path / "log"
    monkeypatch.setattr(on_a_gpu, "ROOT", tmp_path)
    monkeypatch.setattr(on_a_gpu, "PACK", tmp_path / "runs/pack")
    once = f"open({str(log)!r}, 'a').write('x')"
    found = [part(once), Part("broken", 1, [[PYTHON, "-c", f"{once}; raise SystemExit(1)"]])]
    monkeypatch.setattr(on_a_gpu, "parts", lambda args: found)
    row = {"iteration": 1, "live_knn_top1": 20.0}
    run = tmp_path / "runs/on_a_gpu/seed0/runs/gauss100/nct"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(json.dumps(row) + '\n{"cut": ')
    for _ in range(2):
        assert on_a_gpu.main(["--output", str(output), "--device", "cpu"]) == 0
    assert log.read_text() == "xxx"  # the broken one twice
    assert on_a_gpu.main(["--output", str(tmp_path / "again"), "--device", "cpu", "--only", "part"]) == 0
    assert (
        log.read_text() == "xxx"
        and (tmp_path / "again/curves.jsonl").read_bytes() == (output / "curves.jsonl").read_bytes()
    )
    summary = json.loads((output / "summary.json").read_text())
    assert summary["part"]["end"] == "finished" and summary["broken"]["end"].startswith("failed")
    rows = [json.loads(line) for line in (output / "curves.jsonl").read_text().splitlines()]
    assert rows == [{"run": "seed0/runs/gauss100/nct"} | row]
    assert len(list(output.iterdir())) <= 8


def test_a_pack_unpacks_to_what_was_packed(tmp_path, monkeypatch):
    tree = make_tree(tmp_path / "tiny")
    monkeypatch.setattr(on_a_gpu, "PACK", tmp_path / "pack")
    monkeypatch.setattr(on_a_gpu.subprocess, "run", lambda *_, **__: None)  # pip, which asks a network
    on_a_gpu.pack(tree)
    images, _ = on_a_gpu.unpack(tmp_path / "work", None, trial=False)
    assert images.name == "tiny"
    files = sorted(path.relative_to(tree) for path in tree.rglob("*.png"))
    assert files and files == sorted(path.relative_to(images) for path in images.rglob("*.png"))
    assert all((tree / file).read_bytes() == (images / file).read_bytes() for file in files)
