"""The scripts of Neighbor2Neighbor/: denoisers and denoised copies, as the published README makes them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from dinov2.run.options import Parser, number, split_words
from dinov2.run.pipeline import Step
from utils.noise import ALL_NOISES


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of both scripts; rest: what stands behind --, for the tool."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(add_help=False, allow_abbrev=False)
    for name in ("data", "models"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--gpus", type=number, default=1)
    parser.add_argument("--dry-run", dest="dry", action="store_true")
    options, words = split_words(argv[:cut], parser)
    return argparse.Namespace(noises=words or ALL_NOISES, rest=argv[cut + 1 :], **vars(parser.parse_args(options)))


def linear_probe_n2n(o: argparse.Namespace, caller: str, root: str) -> Iterator[Step]:
    """Noisy copies are read where they are there, else the clean images, with the same noise added while loading."""
    name, models = os.path.basename(o.data.rstrip("/")) or "mini-imagenet", _models_folder(o, caller, root)
    places = [os.path.dirname(os.path.join(caller, o.data.rstrip("/")))]
    if "/" not in o.data:  # the published steps move the noisy copies into the script's folder and back
        places = [caller, os.path.dirname(caller), root, f"{root}/Neighbor2Neighbor"]
    for noise in o.noises:
        added = "none"
        tree = _find_folder(f"noisy_{name}-{noise}", places)
        output = f"{tree}-denoised"
        if not tree:
            added, tree = noise, _find_folder(name, places)
            output = f"{os.path.dirname(tree)}/noisy_{name}-{noise}-denoised"
        if not tree:
            found = f"neither {name} nor noisy_{name}-{noise} is here or in the folder above"
            raise ValueError(f"{found}; name the images by --data DIR")
        read, folder = ["--data", tree, "--noise", added], f"{models}/{noise}/denoiser"
        train = ["--config", "Neighbor2Neighbor/published.yaml", *read, "--output", folder, *o.rest]
        yield _make_step(o, "Neighbor2Neighbor.train", *train)
        yield _make_step(o, "Neighbor2Neighbor.denoise", "--model", f"{folder}/unet.pth", *read, "--output", output)


def instance_recog_n2n(o: argparse.Namespace, caller: str, root: str) -> Iterator[Step]:
    data, models = os.path.join(caller, o.data.rstrip("/") or "."), _models_folder(o, caller, root)
    data = f"{data}/datasets" if os.path.isdir(f"{data}/datasets") else data
    folders = [os.path.abspath(f"{data}/{name}/jpg") for name in ("roxford5k", "rparis6k")]
    if missing := next((folder for folder in folders if not os.path.isdir(folder)), None):
        raise ValueError(f"{missing} is missing; name the folder of both sets by --data DIR")
    for noise in o.noises:
        for folder in folders:
            words = ["--model", f"{models}/{noise}/denoiser/unet.pth", "--data", folder, "--noise", noise]
            yield _make_step(o, "Neighbor2Neighbor.denoise", *words, *o.rest)


def _models_folder(o: argparse.Namespace, caller: str, root: str) -> str:
    return os.path.join(caller, o.models.rstrip("/")) if o.models else f"{root}/runs/imagenet100"


def _find_folder(name: str, places: list[str]) -> str:
    """The folder of this name below one of the places, or nothing."""
    return next((os.path.abspath(f"{place}/{name}") for place in places if os.path.isdir(f"{place}/{name}")), "")


def _make_step(o: argparse.Namespace, module: str, *words: str) -> Step:
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(o.gpus)]
    return Step([*(several if o.gpus > 1 else []), "-m", module, *words])
