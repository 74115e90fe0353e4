"""The recorded steps under two ranks (gloo, FSDP2), the batch split: the same losses, centres and parameters."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.dinov2.train.steps import final_parameters, run_steps, steps_config, steps_model
from tests.ranks import run_ranks


def test_a_rank_that_a_signal_ends_is_not_started_again_and_leaves_its_stacks(tmp_path, capfd):
    one_aborts = "import os; print('begun', flush=True); os.environ['RANK'] == '1' and os.abort()"
    assert run_ranks(2, tmp_path, "-c", one_aborts) == [0, -6]
    said = capfd.readouterr()
    assert said.out.count("begun") == 2 and "Fatal Python error: Aborted" in said.err
    found = (tmp_path / "backtraces.txt").read_text()
    assert "['0', 'SIGABRT']" in found and found in said.err
    pattern = Path("/proc/sys/kernel/core_pattern")
    if shutil.which("gdb") and pattern.exists() and pattern.read_text().strip() == "core":
        assert "abort ()" in found and not list(tmp_path.rglob("core*"))


@pytest.mark.parametrize(
    "name",
    ["train_steps_centering_shared_head", "train_steps_sinkhorn_separate_head", "train_steps_anchored_head_frozen"],
)
def test_two_ranks_equal_one(name, tmp_path):
    output = tmp_path / "ranks.pth"
    assert run_ranks(2, tmp_path, "-m", "tests.dinov2.train.rank_steps", name, str(output)) == [0, 0]
    two = torch.load(output, weights_only=True)
    cfg = steps_config(name, dino={"koleo_weight": 0.0})
    model = steps_model(name, cfg)
    history, centers = run_steps(name, model, cfg)
    for one, other in zip(history, two["history"], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(two["centers"], centers, atol=1e-5, rtol=1e-5)
    for key, value in final_parameters(model).items():
        other = two["state"][key]
        if key.endswith("qkv.bias"):
            # Softmax does not see a bias of the keys: its gradient is rounding noise, which AdamW scales up to a step.
            value, other = (torch.cat((v[:384], v[768:])) for v in (value, other))
        difference = (other - value).abs()
        far = difference > 1e-5 * (1 + value.abs())
        # AdamW does the same to the odd weight whose gradients cancel, by less than a step: at most to one in 50,000.
        # To how many depends on the processor, whose float32 products round by the size of the batch.
        assert far.sum() <= max(4, 2e-5 * far.numel()) and difference.max() < 1e-4, f"{key}: {difference.max()}"
