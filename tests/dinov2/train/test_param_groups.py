"""Parameter groups against recorded multipliers, and what a schedule's values make of them."""

import pytest
from omegaconf import OmegaConf

from dinov2.config import load_config
from dinov2.objectives.distillation import build_network
from dinov2.train.optim import apply_schedule, build_optimizer, lr_multiplier, parameter_groups, wd_multiplier
from dinov2.train.schedules import StepValues
from tests.conftest import golden

RECORDED = golden("param_groups_vit_small.json")
DECAYS = RECORDED["layerwise_decay"], RECORDED["patch_embed_lr_mult"]
SMALL = ["dino.hidden=64", "dino.bottleneck=32", "dino.prototypes=128"]  # no group depends on these


@pytest.fixture(scope="module")
def settings():
    more = [f"optim.{key}={RECORDED[key]}" for key in ("layerwise_decay", "patch_embed_lr_mult")]
    return load_config([*SMALL, "model.registers=4", *more], validated=False)


@pytest.fixture(scope="module")
def student(settings):
    return build_network(settings)


@pytest.mark.parametrize("module", ["backbone", "dino_head"])
def test_groups_are_the_published_ones(settings, student, module):
    names = {parameter: name for name, parameter in student[module].named_parameters()}
    found = {
        names[parameter]: [group["lr_multiplier"], group["wd_multiplier"], group["is_last_layer"]]
        for group in parameter_groups(student[module], settings)
        for parameter in group["params"]
    }
    assert RECORDED["columns"] == ["lr_multiplier", "wd_multiplier", "is_last_layer"]
    assert found == RECORDED[module]


def test_every_parameter_is_in_one_group_of_few(settings, student):
    groups = build_optimizer(student, settings).param_groups
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(student.parameters()))
    assert len(groups) < 35, "parameters of equal multipliers share a group"


def test_schedule_reaches_the_groups(settings, student):
    optimizer = build_optimizer(student, settings)
    values = StepValues(
        lr=0.5, weight_decay=0.2, ema_momentum=0.9, teacher_temp=0.07, last_layer_lr=0.25, backbone_lr=0.125
    )
    apply_schedule(optimizer, values)
    names = {parameter: name for name, parameter in student.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            module, _, name = names[parameter].partition(".")
            blocks = len(student["backbone"].blocks) if module == "backbone" else 0
            lr = 0.125 if module == "backbone" else 0.25 if "last_layer" in name else 0.5
            assert group["lr"] == pytest.approx(lr * lr_multiplier(name, blocks, *DECAYS))
            assert group["weight_decay"] == pytest.approx(0.2 * wd_multiplier(name))
            assert group["betas"] == (0.9, 0.999)


def test_frozen_blocks_and_what_lies_before_them_have_no_rate():
    """Of frozen ones neither a rate nor, with it, a decay; the others keep theirs."""
    for name in ("patch_embed.proj.weight", "cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.ls1.gamma"):
        assert lr_multiplier(name, 12, *DECAYS, frozen=2) == 0 < lr_multiplier(name, 12, *DECAYS)
    for name in ("blocks.2.attn.qkv.weight", "norm.weight"):
        assert lr_multiplier(name, 12, *DECAYS, frozen=2) == lr_multiplier(name, 12, *DECAYS) > 0
    assert lr_multiplier("mlp.0.weight", 0, *DECAYS, frozen=2) == 1


def test_more_frozen_blocks_than_there_are_are_refused(student, settings):
    changed = OmegaConf.merge(settings, {"optim": {"frozen_blocks": 13}})
    with pytest.raises(ValueError, match="optim.frozen_blocks=13 is more than the 12 blocks of model.depth"):
        build_optimizer(student, changed)
