"""Backbones from runs and files, continuation from public weights, other sizes and channels, the published sizes."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dinov2 import checkpoint, load_backbone
from dinov2.config import load_config, save_run_config
from dinov2.models.pretrained import load_pretrained
from dinov2.models.vision_transformer import VisionTransformer, build_backbone
from dinov2.models.weights import read_model_keys
from dinov2.train.__main__ import main
from tests.conftest import fill_parameters, seeded_input
from tests.dinov2.train.test_curriculum import SHORT, write_denoised
from tests.dinov2.train.tiny import make_tree, settings
from utils.results import read_json_lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run kept at epochs 2 and 4, each with a backbone of its own."""
    run = tmp_path_factory.mktemp("runs") / "run"
    cfg = load_config(settings(run.parent / "data", run))
    save_run_config(cfg, run)
    for epoch in (2, 4):
        teacher = {f"backbone.{name}": value for name, value in of_epoch(cfg, epoch).state_dict().items()}
        teacher["dino_head.mlp.0.weight"] = torch.zeros(16, 192)
        checkpoint.save(run, {"iteration": torch.tensor(3 * epoch)}, 3 * epoch, epoch, teacher, keep_last=1)
    checkpoint.save(run, {"iteration": torch.tensor(14)}, 14, 4, None, keep_last=1)  # for resuming, later
    return run


def of_epoch(cfg, epoch: int) -> VisionTransformer:
    torch.manual_seed(epoch)
    return build_backbone(cfg, drop_path=False).eval()


def assert_is_epoch(model: VisionTransformer, run, epoch: int) -> None:
    expected = of_epoch(load_config(settings(run.parent / "data", run)), epoch).state_dict()
    state = model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert model(torch.zeros(1, 3, 16, 16))["x_norm_clstoken"].shape == (1, 192)


def test_backbone_of_a_run_a_checkpoint_or_its_file(run):
    assert_is_epoch(load_backbone(run), run, 4)
    assert_is_epoch(load_backbone(str(run)), run, 4)
    assert_is_epoch(load_backbone(run, epoch=2), run, 2)
    first = checkpoint.list_checkpoints(run)[0]
    assert_is_epoch(load_backbone(first.path), run, 2)
    assert_is_epoch(load_backbone(first.teacher), run, 2)


def test_public_file_with_a_config_beside_it(run, tmp_path):
    shutil.copy(run / "config.yaml", tmp_path)
    state = of_epoch(load_config(settings(tmp_path, tmp_path)), 2).state_dict()
    torch.save(state, tmp_path / "public.pth")
    save_file(state, tmp_path / "public.safetensors")
    for name in ("public.pth", "public.safetensors"):
        assert_is_epoch(load_backbone(tmp_path / name), run, 2)


def test_what_is_no_backbone_is_one_sentence(run, tmp_path):
    with pytest.raises(ValueError, match=r"no kept checkpoint at epoch 3 \(kept: 2, 4\)"):
        load_backbone(run, epoch=3)
    with pytest.raises(
        ValueError, match="nowhere.pth is missing: name a run, one of its checkpoints, or a file of weights"
    ):
        load_backbone(tmp_path / "nowhere.pth")
    shutil.copy(run / "config.yaml", tmp_path)
    with pytest.raises(ValueError, match="has no kept checkpoint yet"):
        load_backbone(tmp_path)
    contents = {"list.pth": [torch.zeros(1)], "head.pth": {"dino_head.weight": torch.zeros(1)}, "empty.pth": {}}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} holds no backbone that can be used: it has no patch_embed"):
            load_backbone(tmp_path / name)
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.safetensors can't be read as a safetensors file"):
        load_backbone(tmp_path / "text.safetensors")
    whole = checkpoint.list_checkpoints(run)[0].teacher.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pth can't be read as a torch file"):
        load_backbone(tmp_path / "cut.pth")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (dict(depth=2), r"blocks\.1\.norm1\.weight is missing; blocks\.1\.norm1\.bias is missing; .* \(and \d+ more\)"),
        (dict(registers=4), r"register_tokens is missing$"),
        (dict(ffn="swiglu"), r"blocks\.0\.mlp\.w12\.weight is missing"),
        (dict(layerscale=0.0), r"blocks\.0\.ls1\.gamma is unknown to the model; blocks\.0\.ls2\.gamma is unknown"),
        (dict(patch_size=8), r"patch_embed\.proj\.weight is \[192, 3, 4, 4\], the model wants \[192, 3, 8, 8\]$"),
        (dict(arch="vit_small"), r"cls_token is \[1, 1, 192\], the model wants \[1, 1, 384\]"),
    ],
)
def test_another_architecture_names_the_first_keys(run, change, sentence):
    own = dict(arch="vit_tiny", image_size=16, patch_size=4, depth=1)
    with pytest.raises(ValueError, match=rf"teacher_checkpoint\.pth is of another architecture: .*{sentence}"):
        load_pretrained(VisionTransformer(**(own | change)), checkpoint.list_checkpoints(run)[0].teacher)


def test_position_embeddings_that_form_no_square_are_refused(tmp_path):
    vit = VisionTransformer("vit_tiny", image_size=16, patch_size=4, depth=1)
    torch.save(vit.state_dict() | {"pos_embed": torch.zeros(1, 1 + 15, 192)}, tmp_path / "odd.pth")
    with pytest.raises(
        ValueError,
        match=r"odd\.pth holds no backbone that can be used: its position embeddings, 15 patches, are no square",
    ):
        load_pretrained(vit, tmp_path / "odd.pth")


@pytest.mark.parametrize("target", [8, 32, 48])
def test_position_embeddings_of_another_size_are_interpolated(target, tmp_path):
    """A ramp over the grid stays the same ramp (to the border's half cell); all else is carried to the bit."""
    source = fill_parameters(VisionTransformer("vit_tiny", image_size=64, patch_size=4, depth=1))
    rows = torch.linspace(-1, 1, 16)[:, None].expand(16, 16)
    with torch.no_grad():
        source.pos_embed[0, 1:, 0] = rows.flatten()
        source.pos_embed[0, 1:, 1] = rows.T.flatten()
    torch.save(source.state_dict(), tmp_path / "public.pth")
    vit = VisionTransformer("vit_tiny", image_size=target, patch_size=4, depth=1)
    load_pretrained(vit, tmp_path / "public.pth")
    side = target // 4
    grid = vit.pos_embed[0, 1:].detach().unflatten(0, (side, side))
    centres = (torch.arange(side) + 0.5) / side * 16 - 0.5  # of the new cells, in old ones
    expected = (centres / 15 * 2 - 1).clamp(-1, 1)
    for channel, ramp in ((0, expected[:, None]), (1, expected[None, :])):
        torch.testing.assert_close(grid[..., channel], ramp.expand(side, side), atol=0.05, rtol=0)
    assert torch.equal(vit.pos_embed[:, 0], source.pos_embed[:, 0])
    rest = {name: value for name, value in vit.state_dict().items() if name != "pos_embed"}
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in rest.items())


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """Weights of another library's making, for 8 pixels: half the crops of the tiny settings."""
    vit = fill_parameters(VisionTransformer("vit_tiny", image_size=8, patch_size=4, depth=1))
    path = tmp_path_factory.mktemp("public") / "public.safetensors"
    save_file(vit.state_dict(), path)
    return path


def test_continued_pretraining_warms_the_heads_up_first(public, tmp_path, capsys):
    tree, run = make_tree(tmp_path / "tiny"), tmp_path / "run"
    more = [f"model.pretrained={public}", "optim.head_warmup_epochs=2", "optim.warmup_epochs=0", "train.epochs=3"]
    more += ["teacher.momentum=0.5", "teacher.final_momentum=0.5"]
    main(settings(tree, run, "train.eval_every=1", "optim.freeze_last_layer_epochs=0", *more))
    said = f"backbone from {public}; heads start fresh, alone for 2 epochs"
    assert said in capsys.readouterr().out
    vit = build_backbone(load_config(settings(tree, run)), drop_path=False)
    load_pretrained(vit, public)
    first, second, third = (checkpoint.load_tensors(c.teacher)["teacher"] for c in checkpoint.list_checkpoints(run))
    for name, value in vit.state_dict().items():
        # Two epochs of the heads alone: the teacher's backbone is an average of what never moved.
        torch.testing.assert_close(second[f"backbone.{name}"], value, atol=1e-6, rtol=1e-6, msg=name)
    assert any(not torch.equal(first[name], second[name]) for name in first if name.startswith("dino_head."))
    moved = [name for name in third if not torch.allclose(third[name], second[name], atol=1e-5)]
    assert sum(name.startswith("backbone.blocks.0.") for name in moved) > 3
    rows = read_json_lines(run / "metrics.jsonl")
    assert [row["backbone_lr"] == 0 for row in rows] == [True] * 6 + [False] * 3
    assert all(row["lr"] > 0 for row in rows)


def test_pretrained_weights_that_do_not_fit_stop_the_run(run, tmp_path):
    tree = make_tree(tmp_path / "tiny", images=2)
    teacher = checkpoint.list_checkpoints(run)[0].teacher
    with pytest.raises(
        ValueError, match=r"model\.registers=1, but .*_checkpoint\.pth has 0: leave model\.registers out"
    ):
        main(settings(tree, tmp_path / "new", f"model.pretrained={teacher}", "model.registers=1"))
    assert checkpoint.latest(tmp_path / "new") is None


@pytest.mark.parametrize("channels", [1, 5])
def test_other_channels(channels):
    more = [f"data.in_chans={channels}", *(f"data.{key}={[0.5] * channels}" for key in ("mean", "std"))]
    vit = build_backbone(load_config(settings("x", "y", *more)))
    torch.manual_seed(0)
    x = torch.randn(2, channels, 16, 16)
    out = vit.eval()(x)
    assert out["x_norm_patchtokens"].shape == (2, 16, 192)
    for channel in range(channels):  # each of them counts
        changed = x.clone()
        changed[:, channel] += 1
        assert not torch.allclose(vit(changed)["x_norm_clstoken"], out["x_norm_clstoken"])


# timm's name, and the parameters of the public model (86.58M, 304.37M, 1,136.48M) at 518 pixels, without registers.
PUBLISHED = {
    "vit_small": ("vit_small_patch14_dinov2", 22_056_576, {}),
    "vit_base": ("vit_base_patch14_dinov2", 86_580_480, {}),
    "vit_large": ("vit_large_patch14_dinov2", 304_368_640, {}),
    "vit_giant2": ("vit_giant_patch14_dinov2", 1_136_480_768, {"ffn": "swiglu"}),
}


@pytest.mark.parametrize("arch", PUBLISHED)
@pytest.mark.parametrize("registers", [0, 4])
def test_published_sizes(arch, registers):
    """timm has no mask token and, with registers, no position embedding of the CLS token."""
    timm = pytest.importorskip("timm")
    name, published, more = PUBLISHED[arch]
    with torch.device("meta"):
        vit = VisionTransformer(arch, image_size=518, patch_size=14, registers=registers, **more)
        peer = timm.create_model(name.replace("dinov2", "reg4_dinov2") if registers else name, num_classes=0)
    count = sum(parameter.numel() for parameter in vit.parameters())
    assert count == published + registers * vit.embed_dim
    theirs = sum(parameter.numel() for parameter in peer.parameters())
    assert count == theirs + (2 if registers else 1) * vit.embed_dim


def test_features_do_not_depend_on_the_file_s_form(run, tmp_path):
    """A half-precision file is read into full precision."""
    vit = of_epoch(load_config(settings(tmp_path, tmp_path)), 2)
    halves = {name: value.bfloat16() for name, value in vit.state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    other = of_epoch(load_config(settings(tmp_path, tmp_path)), 4)
    load_pretrained(other, tmp_path / "half.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in other.parameters())
    x = seeded_input(0, (2, 3, 16, 16))
    with torch.no_grad():
        np.testing.assert_allclose(other(x)["x_norm_clstoken"], vit(x)["x_norm_clstoken"], atol=0.05)


def test_nct_from_public_weights_anchored_to_them(tmp_path, capsys):
    """A DINOv3 of three channels on grey images: packed crops, a frozen block, no head of its own."""
    rope = dict(pos_embed="rope", registers=1, norm_eps=1e-5)
    vit = fill_parameters(VisionTransformer("vit_tiny", patch_size=4, depth=2, **rope))
    save_file(vit.state_dict(), tmp_path / "public.safetensors")
    tree = make_tree(tmp_path / "tiny", images=4)
    write_denoised(tree)
    tiny = [setting for setting in settings(tree, tmp_path / "nct", *SHORT) if not setting.startswith("model.")]
    more = [f"model.pretrained={tmp_path / 'public.safetensors'}", "model.drop_path=0.2", "optim.head_warmup_epochs=1",
            "optim.frozen_blocks=1", "anchor.pretrained=true", "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.2]",
            "train.eval_every=1", "optim.warmup_epochs=0"]  # fmt: skip
    main(["nct", *tiny, *more])
    said = capsys.readouterr().out
    assert said.count(f"anchored to the backbone of {tmp_path / 'public.safetensors'}") == 1
    assert "heads start fresh, alone for 1 epochs (arch vit_tiny, depth 2, patch_size 4, registers 1, ffn mlp," in said
    rows = read_json_lines(tmp_path / "nct/denoised/metrics.jsonl")
    assert [row["backbone_lr"] == 0 for row in rows] == [True] * 3 + [False] * 3
    rows = read_json_lines(tmp_path / "nct/metrics.jsonl")
    assert all(row["backbone_lr"] > 0 and row["anchor_ibot_loss"] > 0 for row in rows) and len(rows) == 6
    trained = load_backbone(tmp_path / "nct")
    assert trained.settings.model.pos_embed == "rope" and trained.patch_embed.proj.in_channels == 1
    kernel = vit.patch_embed.proj.weight.sum(1, keepdim=True)
    torch.testing.assert_close(trained.patch_embed.proj.weight, kernel, atol=1e-6, rtol=1e-6)
    for name, value in vit.blocks.state_dict().items():
        same = torch.allclose(trained.blocks.state_dict()[name], value, atol=1e-5)
        assert same or not name.startswith("0."), name
        assert not same or not name.endswith("fc1.weight") or name.startswith("0."), name
        if name.endswith("qkv.bias"):
            assert torch.allclose(trained.blocks.state_dict()[name][192:384], value[192:384]), "the keys' bias is none"


@pytest.mark.parametrize(
    "more, sentence",
    [
        ([], "anchor.pretrained=true needs model.pretrained, the file to anchor to"),
        (
            ["model.pretrained={public}", "anchor.head=frozen"],
            "anchor.head=frozen: the file of model.pretrained has no",
        ),
        (["model.pretrained={public}.gone"], "public.safetensors.gone can't be read"),
    ],
)
def test_impossible_continuations(more, sentence, public, tmp_path):
    tiny = [setting for setting in settings("x", tmp_path, *SHORT) if not setting.startswith("model.")]
    with pytest.raises(ValueError, match=sentence):
        given = [text.format(public=public) for text in more]
        words = ["nct", *tiny, "model.patch_size=4", "anchor.pretrained=true", *given]
        load_config(words, read_model_keys=read_model_keys)
