"""Writes a run's teacher backbone for other libraries.

    python -m dinov2.export run=DIR [epoch=N] format=huggingface|timm|onnx output=DIR

run: a run's folder, or any weights that dinov2.load_backbone takes; epoch: one of a run's kept epochs (the last one if
not given). output: a folder that is not there yet.
huggingface: AutoModel.from_pretrained(output) and AutoImageProcessor.from_pretrained(output) load it offline.
timm: timm.create_model("local-dir:" + output, pretrained=True) does, as vit_*_patch14_dinov2 (reg4) with its sizes.
Both hold model.safetensors and config.json, and model.pretrained=output continues from them.
onnx: model.onnx reads images [B, C, crop, crop] of any B, as preprocessor_config.json says, and gives cls [B, D] and
patches [B, N, D]. It needs onnx and onnxscript.
"""

import json
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinov2.keys import check_choice
from dinov2.layers.block import MLP_RATIO, SwiGLU
from dinov2.layers.rope import BASE
from dinov2.models.formats import to_huggingface, to_timm
from dinov2.models.pretrained import read_backbone
from dinov2.models.vision_transformer import ARCHS, VisionTransformer
from dinov2.models.weights import SAFETENSORS, grid_side
from utils import cli
from utils.files import atomic_path
from utils.locks import sweep
from utils.text import did_you_mean
from utils.values import configured_rule

KEYS = ("run", "epoch", "format", "output")
PROCESSOR = "preprocessor_config.json"
ONNX_BYTES = 1_900_000_000  # of weights, beyond which they lie in a file beside model.onnx, which holds 2 GiB


def image_size(model: VisionTransformer, cfg: DictConfig) -> int:
    """Pixels per side that the position embeddings are built for; the crop for rotary ones, which fit any size."""
    return cfg.eval.crop if model.pos_embed is None else grid_side(model.pos_embed) * model.patch_size


def huggingface(model: VisionTransformer, cfg: DictConfig, folder: Path) -> None:
    """A folder of Dinov2Model, Dinov2WithRegistersModel or DINOv3ViTModel."""
    config = {
        "architectures": ["Dinov2WithRegistersModel" if model.registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if model.registers else "dinov2",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.heads,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "use_swiglu_ffn": isinstance(model.blocks[0].mlp, SwiGLU),
        "qkv_bias": True,
        "layer_norm_eps": model.norm.eps,
        "image_size": image_size(model, cfg),
        "patch_size": model.patch_size,
        "num_channels": model.patch_embed.proj.in_channels,
        "drop_path_rate": 0.0,
        "torch_dtype": "float32",
    }
    if model.pos_embed is None:
        if config["use_swiglu_ffn"]:
            raise ValueError("model.pos_embed=rope with model.ffn=swiglu has no counterpart in transformers")
        config |= {"architectures": ["DINOv3ViTModel"], "model_type": "dinov3_vit"}
        config |= {"intermediate_size": MLP_RATIO * model.embed_dim, "key_bias": False, "rope_theta": BASE}
    if model.registers:
        config["num_register_tokens"] = model.registers
    write_folder(folder, to_huggingface(model.state_dict()), {"config.json": config, PROCESSOR: processor(cfg)})


def processor(cfg: DictConfig) -> dict:
    """The evaluation's resize, crop and normalisation as a Hugging Face image processor.

    data.values=range=[lo,hi] is a factor and a shift of the mean; beyond lo and hi theirs does not clip. With log there
    is no such: it takes images that are scaled to [0, 1] already. With full it takes those of 8 bits.
    """
    values = configured_rule(cfg.data["values"])
    factor = 1 / (values.high - values.low) if values.kind == "range" else 1 / 255
    shift = values.low * factor if values.kind == "range" else 0.0
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": cfg.eval.resize},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": cfg.eval.crop, "width": cfg.eval.crop},
        "do_rescale": values.kind != "log",
        "rescale_factor": factor,
        "do_normalize": True,
        "image_mean": [mean + shift for mean in cfg.data.mean],
        "image_std": list(cfg.data.std),
        "do_convert_rgb": cfg.data.in_chans == 3,
    }


def timm(model: VisionTransformer, cfg: DictConfig, folder: Path) -> None:
    """A timm folder: the nearest vit_*_patch14_dinov2 or vit_*_patch16_dinov3_qkvb, its sizes as arguments."""
    channels, mlp = model.patch_embed.proj.in_channels, model.blocks[0].mlp
    arguments = {
        "img_size": image_size(model, cfg),
        "patch_size": model.patch_size,
        "in_chans": channels,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.heads,
        "init_values": 1e-5 if hasattr(model.blocks[0].ls1, "gamma") else None,
    }
    kind = f"patch14_{'reg4_' if model.registers else ''}dinov2"
    if model.pos_embed is None:
        kind, arguments["num_reg_tokens"] = "patch16_dinov3_qkvb", model.registers
    else:
        arguments |= {"reg_tokens": model.registers, "no_embed_class": model.registers > 0}
    if isinstance(mlp, SwiGLU):
        # timm's giant is the one whose blocks are SwiGLU; it takes the width as a ratio and cuts the product.
        name = "giant"
        arguments["mlp_ratio"] = (mlp.w12.out_features + 0.5) / model.embed_dim
    else:
        names = {ARCHS[arch][0]: arch.removeprefix("vit_") for arch in ("vit_small", "vit_base", "vit_large")}
        name = names.get(model.embed_dim, "small")
    pretrained = {
        "input_size": [channels, cfg.eval.crop, cfg.eval.crop],
        "interpolation": "bicubic",
        "crop_pct": cfg.eval.crop / cfg.eval.resize,
        "mean": list(cfg.data.mean),
        "std": list(cfg.data.std),
        "num_classes": 0,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
    }
    config = {
        "architecture": f"vit_{name}_{kind}",
        "num_classes": 0,
        "num_features": model.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    write_folder(folder, to_timm(model.state_dict()), {"config.json": config})


class _Features(torch.nn.Module):
    """A backbone whose outputs are tensors with names."""

    def __init__(self, backbone: VisionTransformer):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # [B, C, H, W] → [B, D], [B, N, D]
        out = self.backbone(images)
        return out["x_norm_clstoken"], out["x_norm_patchtokens"]


def onnx(model: VisionTransformer, cfg: DictConfig, folder: Path) -> None:
    """A folder with model.onnx, for images of the evaluation's crop in batches of any size."""
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ValueError("format=onnx needs onnx and onnxscript: pip install onnx onnxscript") from None
    images = torch.zeros(2, cfg.data.in_chans, cfg.eval.crop, cfg.eval.crop)
    weights = sum(4 * value.numel() for value in model.state_dict().values())
    torch.onnx.export(
        _Features(model).eval(),
        (images,),
        folder / "model.onnx",
        dynamo=True,
        input_names=["images"],
        output_names=["cls", "patches"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=weights > ONNX_BYTES,
        verbose=False,
    )
    write_folder(folder, None, {PROCESSOR: processor(cfg)})


FORMATS = {"huggingface": huggingface, "timm": timm, "onnx": onnx}


def write_folder(folder: Path, state: dict[str, Tensor] | None, files: dict[str, dict]) -> None:
    """JSON files by name and, where the format has such, the weights."""
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    if state is not None:
        try:
            save_file(state, folder / SAFETENSORS, metadata={"format": "pt"})
        except SafetensorError as error:  # as on a full disk
            raise OSError(str(error)) from error


def export(model: VisionTransformer, cfg: DictConfig, format: str, output: Path | str) -> None:
    """Writes the folder `output`, whole or not at all; cfg: the run's, for mean, std and the sizes of evaluation.

    ValueError for an unknown format or a folder that holds something.
    """
    check_choice("format", format, FORMATS)
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output={output} exists already: choose a folder that does not")
    sweep(output.absolute().parent)
    with atomic_path(output.absolute()) as temporary:
        temporary.mkdir(parents=True)
        FORMATS[format](model, cfg, temporary)


def parse(argv: list[str]) -> dict[str, str]:
    """The arguments by key. ValueError for an unknown one, or one that is missing."""
    given = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key not in KEYS:
            names = [f"{known}=" for known in KEYS]
            hint = did_you_mean(f"{key}=", names, after=" ")
            raise ValueError(f"{argument!r} is no argument: {hint}give {', '.join(names)}")
        given[key] = value
    missing = [key for key in ("run", "format", "output") if not given.get(key)]
    if missing:
        raise ValueError(f"{missing[0]}= is missing; --help shows the arguments")
    if not given.get("epoch", "0").isdecimal():
        raise ValueError(f"epoch={given['epoch']} must be a whole number")
    return given


def main(argv: list[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return
    given = parse(argv)
    model, cfg = read_backbone(given["run"], int(given["epoch"]) if "epoch" in given else None)
    export(model, cfg, given["format"], given["output"])
    size = image_size(model, cfg)
    print(f"{given['output']}: {given['format']} folder; its features are this run's at {size} x {size} pixels "
          "(at other sizes each library interpolates position embeddings its own way)")  # fmt: skip


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
