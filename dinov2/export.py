"""Writes a run's teacher backbone for other libraries.

    python -m dinov2.export run=DIR [epoch=N] format=huggingface|timm output=DIR

run: a run's folder; epoch: one of its kept epochs (the last one if not given). output: a folder that is not there yet.
huggingface: AutoModel.from_pretrained(output) and AutoImageProcessor.from_pretrained(output) load it offline.
timm: timm.create_model("local-dir:" + output, pretrained=True) does, as vit_*_patch14_dinov2 (reg4) with its sizes.
Both hold model.safetensors and config.json, and model.pretrained=output continues from them.
"""

from __future__ import annotations

import difflib
import json
import sys
from pathlib import Path

from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinov2.config import load_run_config
from dinov2.layers.block import SwiGLU
from dinov2.models.formats import to_huggingface, to_timm
from dinov2.models.pretrained import WEIGHTS, load_backbone
from dinov2.models.vision_transformer import ARCHS, VisionTransformer
from utils import cli
from utils.files import atomic_path
from utils.locks import sweep

KEYS = ("run", "epoch", "format", "output")
Files = dict[str, dict]  # name → content of the JSON files beside the weights


def image_size(model: VisionTransformer) -> int:
    """Pixels a side that the position embeddings are built for."""
    return round((model.pos_embed.shape[1] - 1) ** 0.5) * model.patch_size


def huggingface(model: VisionTransformer, cfg: DictConfig) -> tuple[dict[str, Tensor], Files]:
    """Weights and JSON files of a Hugging Face folder: Dinov2Model, or Dinov2WithRegistersModel."""
    patch_embed, block = model.patch_embed.proj, model.blocks[0]
    config = {
        "architectures": ["Dinov2WithRegistersModel" if model.registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if model.registers else "dinov2",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.heads,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "use_swiglu_ffn": isinstance(block.mlp, SwiGLU),
        "qkv_bias": True,
        "layer_norm_eps": model.norm.eps,
        "image_size": image_size(model),
        "patch_size": model.patch_size,
        "num_channels": patch_embed.in_channels,
        "drop_path_rate": 0.0,
        "torch_dtype": "float32",
    }
    if model.registers:
        config["num_register_tokens"] = model.registers
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": cfg.eval.resize},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": cfg.eval.crop, "width": cfg.eval.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(cfg.data.mean),
        "image_std": list(cfg.data.std),
        "do_convert_rgb": patch_embed.in_channels == 3,
    }
    return to_huggingface(model.state_dict()), {"config.json": config, "preprocessor_config.json": processor}


def timm(model: VisionTransformer, cfg: DictConfig) -> tuple[dict[str, Tensor], Files]:
    """Weights and config of a timm folder: the nearest vit_*_patch14_dinov2, its sizes as arguments."""
    patch_embed, mlp = model.patch_embed.proj, model.blocks[0].mlp
    size = image_size(model)
    arguments = {
        "img_size": size,
        "patch_size": model.patch_size,
        "in_chans": patch_embed.in_channels,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": model.heads,
        "init_values": 1e-5 if hasattr(model.blocks[0].ls1, "gamma") else None,
        "reg_tokens": model.registers,
        "no_embed_class": model.registers > 0,
    }
    if isinstance(mlp, SwiGLU):
        # timm's giant is the one whose blocks are SwiGLU; it takes the width as a ratio and cuts the product.
        name = "giant"
        arguments["mlp_ratio"] = (mlp.w12.out_features + 0.5) / model.embed_dim
    else:
        names = {ARCHS[arch][0]: arch.removeprefix("vit_") for arch in ("vit_small", "vit_base", "vit_large")}
        name = names.get(model.embed_dim, "small")
    pretrained = {
        "input_size": [patch_embed.in_channels, cfg.eval.crop, cfg.eval.crop],
        "interpolation": "bicubic",
        "crop_pct": cfg.eval.crop / cfg.eval.resize,
        "mean": list(cfg.data.mean),
        "std": list(cfg.data.std),
        "num_classes": 0,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
    }
    config = {
        "architecture": f"vit_{name}_patch14_{'reg4_' if model.registers else ''}dinov2",
        "num_classes": 0,
        "num_features": model.embed_dim,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }
    return to_timm(model.state_dict()), {"config.json": config}


FORMATS = {"huggingface": huggingface, "timm": timm}


def export(model: VisionTransformer, cfg: DictConfig, format: str, output: Path | str) -> None:
    """Writes the folder `output`, whole or not at all; cfg: the run's, for mean, std and the sizes of evaluation.

    ValueError for an unknown format or a folder that holds something.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format} must be one of {', '.join(FORMATS)}")
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output={output} exists already: choose a folder that does not")
    state, files = FORMATS[format](model, cfg)
    sweep(output.absolute().parent)
    with atomic_path(output.absolute()) as temporary:
        temporary.mkdir(parents=True)
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        try:
            save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # as on a full disk
            raise OSError(str(error)) from error


def parse(argv: list[str]) -> dict[str, str]:
    """The arguments by key. ValueError for an unknown one, or one that is missing."""
    given = {}
    for argument in argv:
        key, equals, value = argument.partition("=")
        if not equals or key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"did you mean {close[0]}=? " if close else ""
            raise ValueError(f"{argument!r} is no argument: {hint}give {', '.join(f'{k}=' for k in KEYS)}")
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
    cfg = load_run_config(given["run"])
    model = load_backbone(given["run"], int(given["epoch"]) if "epoch" in given else None)
    export(model, cfg, given["format"], given["output"])
    size = image_size(model)
    print(f"{given['output']}: {given['format']} folder; its features are this run's at {size} x {size} pixels "
          "(at other sizes each library interpolates position embeddings its own way)")  # fmt: skip


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]))
