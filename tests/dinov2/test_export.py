"""Weights in and out of transformers and timm: loaded there strictly, the same features, and back again."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dinov2 import checkpoint, load_backbone
from dinov2.config import load_config, load_defaults, save_run_config
from dinov2.data.eval_transforms import CentreCrop, Preprocess
from dinov2.export import export, main, processor
from dinov2.models.formats import from_huggingface, from_timm, to_huggingface, to_timm
from dinov2.models.pretrained import load_pretrained
from dinov2.models.vision_transformer import VisionTransformer, build_backbone
from tests.conftest import ROOT, fill_parameters
from tests.dinov2.data.trees import picture
from tests.dinov2.train.tiny import settings
from utils import cli

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

CLOSE = dict(atol=1e-5, rtol=1e-5)
FORMS = [(registers, ffn) for registers in (0, 4) for ffn in ("mlp", "swiglu")]
forms = pytest.mark.parametrize("registers, ffn", FORMS)


def backbone(registers=0, ffn="mlp", image_size=56, patch_size=14, in_chans=3, layerscale=1e-5, **more):
    """ViT-S of two blocks, every parameter (mask token and biases too) away from its first value."""
    more |= dict(depth=2, registers=registers, ffn=ffn, layerscale=layerscale)
    vit = VisionTransformer("vit_small", image_size, patch_size, in_chans, **more)
    return fill_parameters(vit).eval()


def images(size=56, channels=3, width=None):
    return torch.randn(2, channels, size, width or size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def tokens(vit, x, masks=None):
    out = vit(x, masks)
    return torch.cat((out["x_norm_clstoken"][:, None], out["x_norm_regtokens"], out["x_norm_patchtokens"]), dim=1)


def from_folder(folder):
    model, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def randomise(model, seed=1):
    """Every parameter of a peer drawn anew, so that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


@forms
def test_hugging_face_loads_ours(registers, ffn, tmp_path):
    vit = backbone(registers, ffn)
    export(vit, load_defaults(), "huggingface", tmp_path / "hf")
    theirs = from_folder(tmp_path / "hf")
    assert type(theirs).__name__ == ("Dinov2WithRegistersModel" if registers else "Dinov2Model")
    masks = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    with torch.no_grad():
        torch.testing.assert_close(theirs(images()).last_hidden_state, tokens(vit, images()), **CLOSE)
        masked = theirs(images(), bool_masked_pos=masks).last_hidden_state
    torch.testing.assert_close(masked, tokens(vit, images(), masks), **CLOSE)


@forms
def test_ours_loads_hugging_face(registers, ffn, tmp_path):
    sizes = dict(hidden_size=384, num_hidden_layers=2, num_attention_heads=6, image_size=56, patch_size=14)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=4, use_swiglu_ffn=ffn == "swiglu")
        theirs = transformers.Dinov2WithRegistersModel(config)
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, use_swiglu_ffn=ffn == "swiglu"))
    randomise(theirs).save_pretrained(tmp_path)
    # Of another size, too: theirs interpolates to the exact size, antialiased with registers alone.
    vit = backbone(registers, ffn, interpolate_offset=0.0, interpolate_antialias=registers > 0)
    load_pretrained(vit, tmp_path)
    for x in (images(), images(84, width=42)):
        with torch.no_grad():
            torch.testing.assert_close(tokens(vit, x), theirs(x).last_hidden_state, **CLOSE)


def test_position_embeddings_for_larger_images_are_hugging_faces(tmp_path):
    """High-resolution continuation: embeddings of 56 pixels, built into a model of 98, are what theirs uses there."""
    vit = backbone()
    export(vit, load_defaults(), "huggingface", tmp_path / "hf")
    larger = backbone(image_size=98)
    load_pretrained(larger, tmp_path / "hf")
    with torch.no_grad():
        theirs = from_folder(tmp_path / "hf")(images(98)).last_hidden_state
    torch.testing.assert_close(tokens(larger, images(98)), theirs, **CLOSE)


@pytest.mark.parametrize("registers", [0, 4])
def test_timm_by_its_own_name_loads_ours(registers):
    vit = backbone(registers)
    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    theirs = timm.create_model(name, img_size=56, depth=2).eval()
    theirs.load_state_dict(to_timm(vit.state_dict()), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(images()), tokens(vit, images()), **CLOSE)
    load_pretrained_from_timm(randomise(theirs), registers, "mlp")


def load_pretrained_from_timm(theirs, registers, ffn):
    vit = backbone(registers, ffn)
    vit.load_state_dict(from_timm(theirs.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(tokens(vit, images()), theirs.forward_features(images()), **CLOSE)
    assert not vit.mask_token.any()


@forms
def test_timm_loads_our_folder(registers, ffn, tmp_path):
    vit = backbone(registers, ffn, layerscale=0.0 if ffn == "mlp" and registers else 1e-5)
    export(vit, load_defaults(), "timm", tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs.forward_features(images()), tokens(vit, images()), **CLOSE)
    if hasattr(vit.blocks[0].ls1, "gamma"):
        load_pretrained_from_timm(randomise(theirs), registers, ffn)


@forms
def test_names_go_there_and_back_to_the_bit(registers, ffn):
    state = backbone(registers, ffn).state_dict()
    back = from_huggingface(to_huggingface(state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    back = from_timm(to_timm(state))
    folded = {"mask_token"} | ({"cls_token", "pos_embed"} if registers else set())  # timm keeps these otherwise
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state.keys() - folded)
    start = state["cls_token"] + state["pos_embed"][:, :1]
    assert torch.equal(back["cls_token"] + back["pos_embed"][:, :1], start)


def test_other_sizes_and_channels_and_no_layerscale(tmp_path):
    vit = backbone(image_size=32, patch_size=8, in_chans=5, layerscale=0.0)
    cfg = load_config(["data.in_chans=5", "data.mean=[0,0,0,0,0]", "data.std=[1,1,1,1,1]"], validated=False)
    x = images(32, channels=5)
    for name in ("huggingface", "timm"):
        export(vit, cfg, name, tmp_path / name)
    theirs = from_folder(tmp_path / "huggingface")
    other = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).last_hidden_state, tokens(vit, x), **CLOSE)
        torch.testing.assert_close(other.forward_features(x), tokens(vit, x), **CLOSE)


@pytest.mark.parametrize("more", [{}, dict(pos_embed="rope", registers=4)], ids=["learned", "rope"])
def test_onnx_runtime_has_our_features_in_any_batch(more, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    vit = fill_parameters(VisionTransformer("vit_tiny", 28, 14, depth=1, **more)).eval()
    cfg = load_config(["eval.crop=42", "eval.resize=48"], validated=False)
    export(vit, cfg, "onnx", tmp_path / "onnx")
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"model.onnx", "preprocessor_config.json"}
    session = runtime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    for batch in (1, 3):
        x = images(42)[:1].repeat(batch, 1, 1, 1) * torch.arange(1, batch + 1).view(-1, 1, 1, 1)
        cls, patches = session.run(["cls", "patches"], {"images": x.numpy()})
        with torch.no_grad():
            out = vit(x)
        np.testing.assert_allclose(cls, out["x_norm_clstoken"], **CLOSE)
        np.testing.assert_allclose(patches, out["x_norm_patchtokens"], **CLOSE)


def test_onnx_without_its_library_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="format=onnx needs onnx and onnxscript: pip install onnx onnxscript"):
        export(backbone(), load_defaults(), "onnx", tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 5])
def test_image_processor_of_other_channels(channels, tmp_path):
    more = [f"data.in_chans={channels}", *(f"data.{key}={[0.4] * channels}" for key in ("mean", "std"))]
    cfg = load_config([*more, "eval.crop=28", "eval.resize=32"], validated=False)
    export(backbone(in_chans=channels), cfg, "huggingface", tmp_path / "hf")
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels), dtype=np.uint8)
    process = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = process(image, return_tensors="pt", input_data_format="channels_last").pixel_values
    assert (theirs - Preprocess(cfg)(image)).abs().max() < 1.5 / 255 / 0.4


def test_image_processor_of_other_values(tmp_path):
    """12 bits above an offset, as a 16-bit file and as floats; logarithms are left to the caller."""
    cfg = load_config(["data.values=range=[100,4000]", "eval.crop=28", "eval.resize=32"], validated=False)
    export(backbone(), cfg, "huggingface", tmp_path / "hf")
    image = np.random.default_rng(0).integers(1000, 3000, (40, 50, 3), dtype=np.uint16)  # resized, within the range
    process = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    theirs = process(image.astype(np.float32), return_tensors="pt").pixel_values
    torch.testing.assert_close(theirs, Preprocess(cfg)(image), atol=1e-4, rtol=0)
    log = load_config(["data.values=log=[1,100]"], validated=False)
    assert processor(log)["do_rescale"] is False and processor(log)["image_mean"] == list(log.data.mean)


def write_run(run, *more):
    """A finished run of tiny settings, kept at epochs 2 and 4."""
    cfg = load_config(settings(run.parent / "data", run, *more))
    save_run_config(cfg, run)
    for epoch in (2, 4):
        torch.manual_seed(epoch)
        teacher = {f"backbone.{name}": value for name, value in build_backbone(cfg).state_dict().items()}
        checkpoint.save(run, {"iteration": torch.tensor(3 * epoch)}, 3 * epoch, epoch, teacher, keep_last=1)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


def test_command_line_exports_a_run(run, tmp_path, capsys):
    folder = tmp_path / "out" / "hf"
    arguments = [f"run={run}", "format=huggingface", f"output={folder}"]
    command, env = [sys.executable, "-m", "dinov2.export", *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "at 16 x 16 pixels" in done.stdout, done.stderr
    names = {"model.safetensors", "config.json", "preprocessor_config.json"}
    assert {path.name for path in folder.iterdir()} == names and [folder] == list(folder.parent.iterdir())
    with torch.no_grad():
        theirs = from_folder(folder)(images(16)).last_hidden_state
    torch.testing.assert_close(theirs, tokens(load_backbone(run), images(16)), **CLOSE)
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.run(lambda: main(arguments))
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: output={folder} exists already: choose a folder that does not\n"


def test_epoch_is_chosen_and_continues_elsewhere(run, tmp_path):
    main([f"run={run}", "epoch=2", "format=timm", f"output={tmp_path / 'timm'}"])
    vit = build_backbone(load_config(settings(tmp_path, tmp_path / "x")))
    for given in (tmp_path / "timm", tmp_path / "timm" / "model.safetensors"):
        load_pretrained(vit, given)
        x = images(16)
        torch.testing.assert_close(tokens(vit.eval(), x), tokens(load_backbone(run, epoch=2), x), **CLOSE)
    assert not torch.allclose(tokens(vit, x), tokens(load_backbone(run), x), atol=1e-3)


def test_image_processor_is_the_evaluation_transform(run, tmp_path):
    """Offline, and to a grey level: theirs rounds the resized image to 8 bits."""
    main([f"run={run}", "format=huggingface", f"output={tmp_path / 'hf'}"])
    image = picture(0, 40, 50)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")(image, return_tensors="pt").pixel_values
    canvas = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    cfg = load_config(settings(tmp_path, tmp_path / "x"))
    ours = CentreCrop(cfg.eval.resize, cfg.eval.crop, cfg.data.mean, cfg.data.std)(canvas, torch.tensor([[40, 50]]))
    assert (theirs - ours).abs().max() < 1.5 / 255 / 0.22


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["format=timm", "output=x"], "run= is missing"),
        (["run={run}", "format=timm"], "output= is missing"),
        (["run={run}", "output=x", "fromat=timm"], "'fromat=timm' is no argument: did you mean format="),
        (["run={run}", "output=x", "format=keras"], "format=keras must be one of huggingface, timm, onnx"),
        (["run={run}", "output=x", "format=timm", "epoch=last"], "epoch=last must be a whole number"),
        (["run={run}", "output=x", "format=timm", "epoch=3"], r"no kept checkpoint at epoch 3 \(kept: 2, 4\)"),
        (["run={run}/checkpoints", "output=x", "format=timm", "epoch=2"], "epoch=2, but .* is no run's folder"),
        (["run=nowhere", "output=x", "format=timm"], "nowhere is missing: name a run"),
    ],
)
def test_wrong_arguments_are_one_sentence(run, arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        main([argument.format(run=run) for argument in arguments])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dinov2.export.save_file", no_space)
    with pytest.raises(OSError, match="No space"):
        export(backbone(), load_defaults(), "timm", tmp_path / "timm")
    assert not list(tmp_path.iterdir())


def test_timm_knows_name_and_preprocessing(tmp_path):
    export(backbone(4), load_defaults(), "timm", tmp_path / "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["architecture"] == "vit_small_patch14_reg4_dinov2"
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert theirs.pretrained_cfg["mean"] == [0.485, 0.456, 0.406] and theirs.pretrained_cfg["crop_pct"] == 224 / 256
