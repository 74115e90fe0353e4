"""All tools under one command, as it is installed: noise-robust-dino TOOL [ARGUMENT...], or python -m dinov2 TOOL ...

noise-robust-dino pretrain DIR
noise-robust-dino embed runs/DIR/none/nct DIR --output features.parquet
"""

import runpy
import sys

from utils.text import did_you_mean

TOOLS = {  # name: module that runs by `python -m`, and what for
    "pretrain": ("dinov2.pretrain", "a folder of images to a backbone: denoiser, denoised copy, curriculum, report"),
    "embed": ("dinov2.embed", "features of a folder as .parquet, .npy or .csv"),
    "train": ("dinov2.train", "one pretraining run from its configuration"),
    "export": ("dinov2.export", "a backbone for timm, transformers, ONNX or the public DINOv2 code"),
    "denoiser": ("Neighbor2Neighbor.train", "train the denoiser on noisy images alone"),
    "denoise": ("Neighbor2Neighbor.denoise", "a denoised copy of a folder"),
    "check": ("Neighbor2Neighbor.check", "whether a folder's noise is of the kind that the denoiser needs"),
    "noise": ("utils.generate_noise", "a noisy copy of a folder"),
    "knn": ("dinov2.eval.knn", "evaluate a run by nearest neighbours"),
    "linear": ("dinov2.eval.linear", "evaluate a run by a linear probe"),
    "report": ("utils.report", "tables of runs, and report.html"),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__, *(f"  {tool:<10}{what}" for tool, (_, what) in TOOLS.items()), sep="\n")
        return
    if name not in TOOLS:
        hint = did_you_mean(name, TOOLS, after=" ")
        print(f"error: no tool {name}: {hint}tools are {', '.join(TOOLS)}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    runpy.run_module(TOOLS[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
