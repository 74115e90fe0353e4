"""Every objective: it learns, goes on bit for bit, publishes a backbone, and is found by its name."""

import pytest
import torch

from dinov2 import checkpoint, load_backbone
from dinov2.config import load_config, load_run_config
from dinov2.objectives import OBJECTIVES
from dinov2.train import curriculum
from dinov2.train.__main__ import main
from dinov2.train.anchor import can_be_anchored
from tests.conftest import fill_parameters, golden
from tests.dinov2.objectives.rank_gradients import NAMES, TWO_CROPS, batch_of, config_of, gradients, spread
from tests.dinov2.train.steps import DISPLAYED, recorded_batch, steps_config
from tests.dinov2.train.test_curriculum import SHORT, write_denoised
from tests.dinov2.train.tiny import make_tree, settings
from tests.ranks import run_ranks
from utils.results import read_json_lines

OTHERS = [name for name in OBJECTIVES if name != "dinov2"]
SMALL = ("projector.hidden=16", "projector.dim=8", "projector.predictor=8", "train.batch_size=12")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    tree = make_tree(tmp_path_factory.mktemp("data") / "tiny")
    write_denoised(tree)
    return tree


def command(tree, run, name: str, *more: str) -> list[str]:
    own = {"simdinov2": ["dino.prototypes=0"], **dict.fromkeys(TWO_CROPS, ["crops.local_number=0"])}.get(name, [])
    return settings(tree, run, f"objective={name}", *own, *SMALL, *more)


@pytest.mark.parametrize("name", OTHERS)
def test_it_learns_and_goes_on_bit_for_bit(tree, tmp_path, name):
    main(command(tree, tmp_path / "whole", name, "train.knn_every=2"))
    for stop in (2, 4):
        stage = f"curriculum.stages=[{{view: noisy, epochs: 4, stop: {stop}, dir: {tmp_path / 'parts'}}}]"
        main(command(tree, tmp_path / "parts", name, "train.knn_every=2", stage))
    states = [
        checkpoint.load_tensors(checkpoint.latest(tmp_path / run).teacher)["teacher"] for run in ("whole", "parts")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    rows = read_json_lines(tmp_path / "whole" / "metrics.jsonl")
    assert len([row for row in rows if "live_knn_top1" in row]) == 3
    losses = [row["total_loss"] for row in rows if "total_loss" in row]
    assert all(abs(loss) < 100 for loss in losses)
    assert ("embedding_spread" if name in NAMES else "student_entropy") in rows[1]
    backbone = load_backbone(tmp_path / "whole")
    assert all(torch.equal(value, states[0][f"backbone.{key}"]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("name", OTHERS)
def test_steps_on_one_batch_lower_its_loss(name):
    torch.manual_seed(0)
    cfg = config_of(name) if name in TWO_CROPS else config_of(name, "crops.local_number=0")
    model = OBJECTIVES[name](cfg).train()
    for network in model.trained():
        spread(network)
    batch, optimizer, losses = batch_of(), torch.optim.AdamW(model.student.parameters(), lr=1e-3), []
    for _ in range(8):
        loss, terms = model(batch, 0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and terms
    if model.teacher is not None:
        before = model.teacher["backbone"].norm.weight.clone()
        model.finish_step(0.5)
        wanted = (before + model.student["backbone"].norm.weight) / 2
        torch.testing.assert_close(model.teacher["backbone"].norm.weight, wanted)


def test_two_ranks_have_the_gradients_of_one(tmp_path):
    """The images of the other rank repel too, and batch normalisation is over both."""
    output = tmp_path / "ranks.pth"
    command = ("-m", "tests.dinov2.objectives.rank_gradients", str(output))
    assert run_ranks(2, tmp_path, *command) == [0, 0]
    two = torch.load(output, weights_only=True)
    for name in NAMES:
        one = gradients(name)
        assert one.keys() == two[name].keys()
        for key, value in one.items():
            # Float32 products round by the size of the batch, on some processors more than on others.
            atol = 1e-5 * max(1.0, float(value.abs().max()))
            torch.testing.assert_close(two[name][key], value, atol=atol, rtol=1e-4, msg=f"{name} {key}")


@pytest.mark.parametrize("name", ["dino", "ibot"])
def test_terms_are_the_recorded_ones(name):
    """Of a recorded step of DINOv2, which has the same terms; it displays iBOT's halved."""
    recording = "train_steps_centering_shared_head"
    recorded = golden(f"{recording}.npz")
    more = {"objective": name} | ({"ibot": {"mask_probability": 0.0}} if name == "dino" else {})
    model = OBJECTIVES[name](steps_config(recording, **more))
    fill_parameters(model.student, "student.")
    model.teacher.load_state_dict(model.student.state_dict())
    temp = recorded["step0/schedule"].tolist()[3]
    loss, terms = model.train()(recorded_batch(recorded, 0), temp)
    assert terms.keys() == {"dino_local_crops_loss", "dino_global_crops_loss", "ibot_loss"} - (
        {"ibot_loss"} if name == "dino" else set()
    )
    for key, value in terms.items():
        wanted = recorded[f"step0/{DISPLAYED[key]}"] * (2 if key == "ibot_loss" else 1)
        assert float(value) == pytest.approx(float(wanted), rel=1e-4)
    assert float(loss) == pytest.approx(float(sum(terms.values())))


@pytest.mark.parametrize("name", OTHERS)
def test_curricula(tree, tmp_path, name):
    """nc for all; nct for those that learn from a teacher's targets, a sentence for the others."""
    methods = ("nct", "anchor.weights={gauss50: 1.0}") if can_be_anchored(name) else ("nc",)
    own = [f"curriculum.denoised_dir={tmp_path / 'denoised'}", *SHORT]
    main([methods[0], *command(tree, tmp_path / "run", name, *methods[1:], *own)])
    terms = read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert any(key.startswith("anchor_") for key in terms) == can_be_anchored(name)
    assert load_run_config(tmp_path / "denoised").objective == name
    if not can_be_anchored(name):
        with pytest.raises(
            ValueError, match=rf"objective={name} learns from no teacher's targets.*take nc, or .* dino"
        ):
            main(["nct", *command(tree, tmp_path / "nct", name, *own, "anchor.weights={gauss50: 1.0}")])


def test_an_overlay_lies_over_the_scale_and_under_what_is_given(tmp_path):
    given = ["data.root=x", "output_dir=x"]
    cfg = load_config(["imagenet100", "nc", "objective=simclr", *given])
    assert (cfg.method, cfg.objective, cfg.crops.local_number, cfg.crops.global_scale[0]) == ("nc", "simclr", 0, 0.08)
    assert cfg.train.batch_size == load_config(["imagenet100", "nc", *given]).train.batch_size
    assert load_config(["quickstart", "objective=simclr", *given]).crops.global_scale[0] == 0.4  # of little data
    assert load_config(["quickstart", "projector.temp=0.7", "objective=simclr", *given]).projector.temp == 0.7
    own = tmp_path / "own.yaml"
    own.write_text("objective: simsiam\nprojector: {dim: 64}\n")
    cfg = load_config(["quickstart", str(own), *given])
    assert (cfg.objective, cfg.projector.dim, cfg.projector.predictor) == ("simsiam", 64, 128)


def test_wrong_objectives_are_one_sentence():
    with pytest.raises(
        ValueError, match=r"objective=simclear must be one of dino, dinov2, ibot, mocov3, simclr, simdinov2, simsiam"
    ):
        load_config(["quickstart", "objective=simclear", "data.root=x", "output_dir=x"])
    wrong = {"simclr": "crops.local_number=2", "dino": "ibot.mask_probability=0.5", "simdinov2": "dino.prototypes=8"}
    for name, more in wrong.items():
        cfg = load_config(["quickstart", f"objective={name}", more, "data.root=x", "output_dir=x"])
        with pytest.raises(ValueError, match=rf"objective={name} .*{more} must be 0"):
            OBJECTIVES[name](cfg)
    cfg = load_config(["quickstart", "dino.prototypes=0", "data.root=x", "output_dir=x"])
    with pytest.raises(ValueError, match="objective=dinov2 .*dino.prototypes=0 must be at least 1"):
        OBJECTIVES["dinov2"](cfg)


def test_every_objective_has_an_overlay_that_names_it():
    for name in OBJECTIVES:
        assert load_config(["quickstart", f"objective={name}", "data.root=x", "output_dir=x"]).objective == name
        stage = curriculum.plan(load_config(["quickstart", f"objective={name}", "data.root=x", "output_dir=x"]))[0]
        assert type(curriculum.build_model(stage)) is OBJECTIVES[name]
