"""Public weights of every form: the features of transformers and timm, and settings that follow from files."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dinov2
from dinov2.config import load_config, load_defaults
from dinov2.export import export
from dinov2.models.formats import from_huggingface, to_huggingface
from dinov2.models.pretrained import load_pretrained
from dinov2.models.vision_transformer import VisionTransformer, build_backbone
from dinov2.models.weights import read_model_keys, read_weights
from tests.conftest import fill_parameters
from tests.dinov2.test_export import randomise

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

CLOSE = dict(atol=1e-5, rtol=1e-5)
SMALL = dict(hidden_size=192, num_hidden_layers=2, num_attention_heads=3)
V2 = dict(SMALL, image_size=56, patch_size=14)
PEERS = {
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**V2)),
    "dinov2_reg": lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**V2)),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SMALL, intermediate_size=768, num_register_tokens=4)
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Peer name → (model of transformers with random weights, the folder that it saved)."""
    root, made = tmp_path_factory.mktemp("public"), {}
    for name, build in PEERS.items():
        model = randomise(build())
        model.save_pretrained(root / name)
        made[name] = (model, root / name)
    return made


def images(height=56, width=None, channels=3):
    return torch.randn(2, channels, height, width or height, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def tokens(vit, x, masks=None):
    out = vit(x, masks)
    return torch.cat((out["x_norm_clstoken"][:, None], out["x_norm_regtokens"], out["x_norm_patchtokens"]), dim=1)


@pytest.mark.parametrize("name", PEERS)
def test_a_folder_of_transformers_alone_is_enough(name, folders):
    """At its own size and at others, masked and not, with the architecture read from the folder."""
    theirs, folder = folders[name]
    vit = dinov2.load_backbone(folder)
    patch = vit.patch_size
    for rows, columns in ((4, 4), (6, 3), (3, 5)):
        x = images(rows * patch, columns * patch)
        masks = torch.rand(2, rows * columns, generator=torch.Generator().manual_seed(0)) < 0.4
        with torch.no_grad():
            torch.testing.assert_close(tokens(vit, x), theirs(x).last_hidden_state, **CLOSE)
            masked = theirs(x, bool_masked_pos=masks).last_hidden_state
        torch.testing.assert_close(tokens(vit, x, masks), masked, **CLOSE)


def test_dinov3_crops_of_two_sizes_and_inner_layers(folders):
    """Packed crops have the tokens that each has by itself; the blocks' outputs are transformers'."""
    theirs, folder = folders["dinov3"]
    vit, large, small = dinov2.load_backbone(folder), images(64), images(32, 48)
    together = vit([large, small])
    for out, x in zip(together, (large, small), strict=True):
        torch.testing.assert_close(out["x_norm_patchtokens"], vit(x)["x_norm_patchtokens"], **CLOSE)
    with torch.no_grad():
        hidden = theirs(large, output_hidden_states=True).hidden_states
    inner = vit.get_intermediate_layers(large, n=[0, 1], return_class_token=True, norm=False)
    for (patches, cls), their_layer in zip(inner, hidden[1:], strict=True):
        torch.testing.assert_close(patches, their_layer[:, 5:], **CLOSE)
        torch.testing.assert_close(cls, their_layer[:, 0], **CLOSE)


def of_meta(folder):
    """A DINOv3's tensors as the public .pth names them, with what only its own training reads."""
    state = read_weights(folder).state
    named = {name.replace("register_tokens", "storage_tokens"): value for name, value in state.items()}
    for name in [name for name in named if name.endswith("qkv.bias")]:
        mask = torch.ones_like(named[name])
        mask[192:384] = 0
        named[name] = named[name] + 7 * (1 - mask)  # a bias of the keys, which is masked
        named[name + "_mask"] = mask
    periods = 100.0 ** (torch.arange(16) / 16)
    return named | {"rope_embed.periods": periods.bfloat16(), "local_cls_norm.weight": torch.ones(192)}


def test_dinov3_files_of_meta_and_timm_are_the_same_model(folders, tmp_path):
    theirs, folder = folders["dinov3"]
    torch.save(of_meta(folder), tmp_path / "meta.pth")
    export(dinov2.load_backbone(folder), load_defaults(), "timm", tmp_path / "timm")
    peer = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    x = images(224)
    with torch.no_grad():
        expected = theirs(x).last_hidden_state
        torch.testing.assert_close(peer.forward_features(x), expected, **CLOSE)
    for given in (tmp_path / "meta.pth", tmp_path / "timm"):
        torch.testing.assert_close(tokens(dinov2.load_backbone(given), x), expected, **CLOSE)
    export(dinov2.load_backbone(tmp_path / "meta.pth"), load_defaults(), "huggingface", tmp_path / "hf")
    again, report = transformers.AutoModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(again).__name__ == "DINOv3ViTModel" and not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x).last_hidden_state, expected, **CLOSE)


def test_timm_without_biases_of_queries_and_values(tmp_path):
    """The published B and L have none in timm's files."""
    peer = randomise(timm.create_model("vit_small_patch16_dinov3", depth=2))
    save_file(peer.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(
            tokens(dinov2.load_backbone(tmp_path), images(64)), peer.forward_features(images(64)), **CLOSE
        )


def test_a_dinov3_is_named_there_and_back_to_the_bit(folders):
    state = read_weights(folders["dinov3"][1]).state
    back = from_huggingface(to_huggingface(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    older = {f"model.{name}" if name.startswith("layer.") else name: v for name, v in to_huggingface(state).items()}
    assert all(torch.equal(from_huggingface(older)[name], state[name]) for name in state)


def test_the_bias_of_the_keys_of_a_dinov3_does_not_train(folders):
    vit = dinov2.load_backbone(folders["dinov3"][1]).train().requires_grad_(True)
    vit(images(32))["x_norm_patchtokens"].square().sum().backward()
    for block in vit.blocks:
        query, key, value = block.attn.qkv.bias.grad.chunk(3)
        assert not key.any() and query.any() and value.any()


@pytest.mark.parametrize("name, registers", [("dinov2", 0), ("dinov2_reg", 4), ("dinov3", 4)])
def test_settings_follow_from_the_file(name, registers, folders, tmp_path):
    _, folder = folders[name]
    cfg = load_continued(["imagenet100", "nct", *files(folder)])
    expected = dict(arch="vit_tiny", depth=2, registers=registers, ffn="mlp")
    expected |= dict(patch_size=16, pos_embed="rope", norm_eps=1e-5) if name == "dinov3" else dict(patch_size=14)
    assert {key: cfg.model[key] for key in expected} == expected
    weights = read_weights(folder)
    assert (weights.channels, weights.image_size) == (3, None if name == "dinov3" else 56)
    for key in ("patch_size", "depth", "arch"):  # what the user says must agree
        given = {"patch_size": 8, "depth": 3, "arch": "vit_small"}[key]
        with pytest.raises(
            ValueError, match=f"model.{key}={given}, but .*{name} has {expected[key]}: leave model.{key}"
        ):
            load_continued(["imagenet100", "nct", *files(folder), f"model.{key}={given}"])
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("model: {registers: 2}\n")
    with pytest.raises(ValueError, match=f"model.registers=2, but .* has {registers}"):
        load_continued([str(overlay), *files(folder)])


def load_continued(words, **more):
    return load_config(words, read_model_keys=read_model_keys, **more)


def files(folder):
    return [f"model.pretrained={folder}", "crops.local_size=112", "crops.global_size=224", "noise=gauss255",
            "data.root=x", "output_dir=y"]  # fmt: skip


def test_a_crop_that_the_patch_does_not_divide_is_said_with_the_nearest(folders):
    with pytest.raises(ValueError, match="crops.local_size=96 is no multiple of model.patch_size=14: take .*=98"):
        words = ["imagenet100", f"model.pretrained={folders['dinov2'][1]}", "data.root=x", "output_dir=y"]
        load_continued(words)


def test_meta_s_dinov2_files_interpolate_as_they_were_trained(folders, tmp_path):
    for name, expected in (("dinov2", (0.1, False)), ("dinov2_reg", (0.0, True))):
        torch.save(read_weights(folders[name][1]).state, tmp_path / "meta.pth")
        model = read_weights(tmp_path / "meta.pth").model
        assert (model["interpolate_offset"], model["interpolate_antialias"]) == expected


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("name", ["dinov2", "dinov3"])
def test_other_channels_start_from_the_mean_kernel(name, channels, folders):
    """An image whose channels are all alike has the tokens of the grey image in the file's model."""
    theirs, folder = folders[name]
    words = [f"model.pretrained={folder}", f"data.in_chans={channels}"]
    cfg = load_continued(words, validated=False)
    vit = build_backbone(cfg, drop_path=False).eval()
    load_pretrained(vit, folder)
    size = 4 * vit.patch_size
    grey = images(size, channels=1)
    vit.interpolate_offset = 0.0
    with torch.no_grad():
        expected = theirs(grey.expand(-1, 3, -1, -1)).last_hidden_state
    if name == "dinov3":
        torch.testing.assert_close(tokens(vit, grey.expand(-1, channels, -1, -1)), expected, **CLOSE)
    else:  # its position embeddings are built for the crops of 224 pixels here
        assert vit.pos_embed.shape[1] == 1 + 16 * 16
        got = vit.patch_embed(grey.expand(-1, channels, -1, -1))
        with torch.no_grad():
            kernel = theirs.embeddings.patch_embeddings(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(got, kernel, **CLOSE)


def test_a_bare_file_says_all_that_it_can(tmp_path):
    """Grey, without any config: sizes and channels from the tensors, normalisation from ImageNet's average."""
    vit = fill_parameters(VisionTransformer("vit_tiny", 32, 8, 1, depth=3, layerscale=0.0, ffn="swiglu"))
    torch.save(vit.state_dict(), tmp_path / "grey.pth")
    other = dinov2.load_backbone(tmp_path / "grey.pth")
    assert other.settings.data.mean == pytest.approx([0.449], abs=1e-3) and other.settings.eval.crop == 224
    torch.testing.assert_close(tokens(other, images(32, channels=1)), tokens(vit.eval(), images(32, channels=1)))
    with pytest.raises(ValueError, match=r"images of shape \[2, 3, 32, 32\]: this backbone takes \[B, 1, H, W\]"):
        other(images(32))
    with pytest.raises(ValueError, match=r"images of shape \[1, 32, 32\]: this backbone takes \[B, 1, H, W\]"):
        other(images(32, channels=1)[0])


def test_the_transform_follows_from_the_folder(folders, tmp_path):
    """preprocessor_config.json of Hugging Face, config.json of timm."""
    _, folder = folders["dinov2"]
    cfg = load_config(
        ["eval.resize=64", "eval.crop=56", "data.mean=[0.1,0.2,0.3]", "data.std=[1,2,3]"], validated=False
    )
    array = np.random.default_rng(0).integers(0, 256, (70, 80, 3), dtype=np.uint8)
    for form in ("huggingface", "timm"):
        export(dinov2.load_backbone(folder), cfg, form, tmp_path / form)
        vit = dinov2.load_backbone(tmp_path / form)
        assert list(vit.settings.data.mean) == [0.1, 0.2, 0.3] and vit.settings.eval.resize == 64
        batch = vit.transform([array, array[:, ::-1]])
        assert batch.shape == (2, 3, 56, 56)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "huggingface")
    theirs = processor(array, return_tensors="pt").pixel_values[0]
    assert (theirs - batch[0]).abs().max() < 1.5 / 255


def change(folder, target, **changes):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(hidden_act="relu"), "its config.json has hidden_act relu, known is gelu"),
        (
            dict(model_type="vit"),
            "its config.json has model_type vit, known is dinov2, dinov2_with_registers, dinov3_vit",
        ),
        (dict(rope_theta=10), "its config.json has rope_theta 10, known is 100"),
        (dict(num_attention_heads=6), "its config.json has 6 heads, known are 3 of 192"),
    ],
)
def test_a_relative_of_another_kind_is_one_sentence(changes, sentence, folders, tmp_path):
    with pytest.raises(ValueError, match=f"other holds no backbone that can be used: {sentence}"):
        read_weights(change(folders["dinov3"][1], tmp_path / "other", **changes))


def test_what_is_not_known_is_one_sentence(folders, tmp_path):
    state = of_meta(folders["dinov3"][1])
    torch.save(state | {"rope_embed.periods": 10.0 ** (torch.arange(16) / 16)}, tmp_path / "periods.pth")
    with pytest.raises(ValueError, match="periods.pth .* other periods than those of base 100"):
        read_weights(tmp_path / "periods.pth")
    torch.save(VisionTransformer("vit_tiny", 32, 8, depth=1).state_dict(), tmp_path / "own.pth")
    narrow = {name: value[..., :100] for name, value in torch.load(tmp_path / "own.pth").items()}
    narrow["patch_embed.proj.weight"] = torch.zeros(100, 3, 8, 8)
    torch.save(narrow, tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="its tokens are 100 wide, known are 192, 384, 768, 1024, 1536"):
        read_weights(tmp_path / "narrow.pth")
    with pytest.raises(ValueError, match="nothing/model.safetensors can't be read as a safetensors file"):
        (tmp_path / "nothing").mkdir()
        read_weights(tmp_path / "nothing")
