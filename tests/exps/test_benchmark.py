"""The benchmark as a user runs it, and the figures that it derives."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dinov2.config import load_config
from exps import benchmark, benchmark_cases
from tests import killing

ROOT = Path(__file__).resolve().parents[2]
TINY = ["quickstart", "dinov2", "data.root=none", "output_dir=none", "train.batch_size=4"]
OTHER = """
import time

def step(cfg, device, precision):
    assert cfg.train.batch_size == 4 and device == "cpu" and precision == "fp32"
    return lambda: time.sleep(0.4)

def data(cfg, paths):
    assert all(path.suffix == ".jpg" for path in paths)
    return lambda: time.sleep(0.8)
"""


def run(*options, cwd):
    command = [sys.executable, ROOT / "exps/benchmark.py", "--device", "cpu", *options]
    command = [str(word) for word in command]
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_table_json_and_comparison(tmp_path):
    (tmp_path / "other.py").write_text(OTHER)
    small = ["--scale", "quickstart", "--batch-size", 4, "--precision", "fp32"]
    short = ["--turns", 2, "--warm-up", 1, "--iterations", 4]
    only = ["--only", "step", "data", "both", "checkpoint"]
    done = run(*small, *short, *only, "--compare", "other.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "runs/benchmark.json").read_text())
    cases = {(case["section"], case["name"]): case for case in content["cases"]}
    assert all(len(case["seconds"]) == (1 if section == "both" else 2) for (section, _), case in cases.items())
    assert cases["step", "compared fp32"]["median"] == pytest.approx(0.4, abs=0.2)
    assert cases["step", "NCT fp32"]["flops"] > 1.05 * cases["step", "DINOv2 fp32"]["flops"]
    both = cases["both", "trainer fp32"]["figures"]
    assert 0 <= both["data_wait"] < 1 and both["images_per_s"] > 0
    assert 0.5e6 < cases["checkpoint", "save"]["figures"]["bytes"] < 1e9
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == len(cases) + 1
    (row,) = (line for line in rows if "DINOv2 fp32" in line.split("|")[2])
    ratio = cases["step", "compared fp32"]["median"] / cases["step", "DINOv2 fp32"]["median"]
    words = f"{ratio:.2f}x the speed of" if ratio >= 1 else f"{1 / ratio:.2f}x the time of"
    assert f"{words} compared fp32" in row
    assert not list(Path(tmp_path).glob("benchmark-*"))


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "neither.py").write_text("x = 1\n")
    for options, words in (
        (("--compare", "neither.py"), "neither step(cfg, device, precision) nor data"),
        (("--compare", "missing.py"), "missing.py"),
        (("--scale", "imagenet10"), "no overlay 'imagenet10'"),
        (("--only", "step", "model.patch_size=5"), "patch_size"),
        (("--precision", "fp32", "fp16"), "use bf16 or fp32"),
    ):
        done = run(*options, cwd=tmp_path)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_terminated_it_leaves_nothing(tmp_path, monkeypatch):
    """SIGTERM in the midst of a turn: the cases' processes end with it, and its folder goes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    log = tmp_path / "log"
    options = ["--device", "cpu", "--scale", "quickstart", "--batch-size", "4", "--precision", "fp32", "--only", "data"]

    def own_session(argv):
        os.setsid()
        return benchmark.main(argv)

    process = killing.start(own_session, options, log)
    try:
        assert killing.wait_for(lambda: log.exists() and "turn" in log.read_text(), process), log.read_text()
        assert members(process) > 1 and list(tmp_path.glob("benchmark-*"))
        assert killing.end(process, signal.SIGTERM) == 143
        end = time.monotonic() + 30  # the server of processes sees that it is alone, and goes
        while members(process):
            assert time.monotonic() < end, "processes are left"
            time.sleep(0.1)
        assert not list(tmp_path.glob("benchmark-*"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def members(session: int) -> int:
    """Processes of a session, by /proc."""
    count = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            count += int(stat.read_text().rpartition(")")[2].split()[3]) == session
    return count


def test_a_failing_case_is_named(tmp_path):
    job = benchmark_cases.Job(OmegaConf.to_yaml(load_config(TINY)), "cpu", str(tmp_path))
    factory = partial(benchmark_cases.matrix_product, job, precision="int3")
    measurement = benchmark.Measurement("data", "decoding", factory)
    with pytest.raises(ValueError, match="decoding: 'int3'"), benchmark.Process(measurement, "cpu") as process:
        process.receive()


@pytest.mark.parametrize("anchored", [False, True])
def test_flops_are_those_of_the_formula(anchored):
    """Matrix products of the step, counted, against 2 * m * n * k written out for a ViT and its head."""
    cfg = load_config([*TINY, "crops.local_number=3"])
    job = benchmark_cases.Job(OmegaConf.to_yaml(cfg), "cpu", "")
    width, depth, patch, head = 192, cfg.model.depth, cfg.model.patch_size, cfg.dino
    masked = benchmark_cases.random_batch(cfg, 2, "cpu").masked_indices.numel() / 2  # of an image

    def backbone(side, kept, times=1.0, embedding=1.0):
        """kept: tokens that go through the end of the last block, its attention's projection and its MLP."""
        patches = (side // patch) ** 2
        tokens = patches + 1
        blocks = depth * tokens * (2 * 12 * width**2 + 4 * tokens * width) - (tokens - kept) * 2 * 9 * width**2
        return times * blocks + embedding * patches * 2 * 3 * patch**2 * width

    products = width * head.hidden + head.hidden**2 + head.hidden * head.bottleneck + head.bottleneck * head.prototypes

    def heads(tokens, times=1.0):
        return times * 2 * tokens * products

    kept_tokens = 1 + masked / 2  # tokens of a global crop
    teacher = 2 * backbone(cfg.crops.global_size, kept_tokens) + heads(2 + masked)
    # Backward: two products for each one of the forward; pixels need no gradient.
    student = 2 * backbone(cfg.crops.global_size, kept_tokens, 3, 2) + 3 * backbone(cfg.crops.local_size, 1, 3, 2)
    student += heads(5 + masked, 3)
    counted = benchmark_cases.step_flops(job, anchored)
    assert counted == pytest.approx(student + (2 if anchored else 1) * teacher, rel=0.02)
