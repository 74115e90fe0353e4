"""Floors of a table: the results of kNN and linear probe without any training of the backbone.

    python -m dinov2.eval.floors run=runs/imagenette/gauss100/dinov2
    python -m dinov2.eval.floors run=runs/imagenette/gauss100/n2n output=runs/imagenette weights=public/vit_small.pth

Floors are an untrained backbone of the run's architecture (seeds 0 and 1), the raw pixels of the evaluation crop and,
with weights=, a public frozen backbone, evaluated on the images and by the protocols of the run. They are written to
<output>/floors/<noise>-<view>/{untrained-0,untrained-1,pixels,public} and serve all runs of that noise and view.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dinov2.checkpoint import Checkpoint
from dinov2.config import load_defaults, load_run_config, save_run_config
from dinov2.eval import common, knn, linear
from dinov2.eval.features import eval_view, labelled_dataset, why_without_labels
from dinov2.models.pretrained import read_backbone
from dinov2.models.vision_transformer import build_backbone
from utils import distributed
from utils.memory import keep_freed_memory
from utils.nested import escaped

EVALUATORS = {"knn": knn.evaluate, "linear": linear.evaluate}
FLOORS = {"untrained-0": ("untrained", 0), "untrained-1": ("untrained", 1), "pixels": ("pixels", 0)}  # method, seed
PIXEL_SIDE = 64  # larger crops are averaged to at most this side: 12,288 numbers of an RGB image
PIXEL_BYTES = 4 * 2**30  # and so that the pixels of all training images fit into this, in float32
USAGE = """
  run=DIR              a run of the noise, the view and the architecture
  output=DIR           floors/ goes here (default: beside the run, or above it if its folder has the noise's name)
  weights=FILE         a third floor, a public frozen backbone
  evaluators=NAMES     knn,linear (default) or one of them
  key=value            of eval.*, data.* or noise, as for the other evaluators
Floors that already have rows made with the same settings are skipped. Several GPUs: torchrun -m ...
"""


class Pixels(nn.Module):
    """A backbone whose CLS token is the normalised pixels; one block, no patches.

    side: pixels per side; larger images are averaged to it.
    """

    architecture, patch_size, blocks = "pixels", 1, (None,)

    def __init__(self, side: int, channels: int):
        super().__init__()
        self.side, self.embed_dim = side, channels * side**2

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if images.shape[-1] > self.side:
            images = nn.functional.adaptive_avg_pool2d(images, self.side)
        return {"x_norm_clstoken": images.flatten(1)}  # [B, C * side * side]

    def get_intermediate_layers(self, images: Tensor, n: int, return_class_token: bool) -> list[tuple[Tensor, Tensor]]:
        pixels = self(images)["x_norm_clstoken"]
        return [(pixels[:, None][:, :0], pixels)]


def pixel_side(cfg: DictConfig) -> int:
    """Pixels per side of the pixel floor: the crop, halved until it is within PIXEL_SIDE and PIXEL_BYTES."""
    side, images = cfg.eval.crop, len(labelled_dataset(cfg, "train"))
    while side > PIXEL_SIDE or 4 * images * cfg.data.in_chans * side**2 > PIXEL_BYTES and side > 1:
        side //= 2
    return side


def floor_config(cfg: DictConfig, name: str, weights: str | None) -> DictConfig:
    """A floor's config: what decides its figures from the run, all else by default.

    Runs of the same noise and view thus share their floors, whatever their method, seed and training.
    """
    method, seed = FLOORS.get(name, ("public", 0))
    view = eval_view(cfg)
    floor = OmegaConf.merge(load_defaults(), {key: cfg[key] for key in ("noise", "trial", "data", "eval")})
    floor.method, floor.seed, floor.train.precision, floor.eval.view = method, seed, cfg.train.precision, None
    floor.curriculum.denoised_dir = None
    floor.curriculum.stages = [{"view": view, "epochs": 1, "dir": name}]
    if view != "denoised":
        floor.data.denoised_root = None
    if view != "noisy" or cfg.data.storage != "disk":
        floor.data.noisy_root = None
    if method == "untrained":
        floor.model, floor.crops.global_size = cfg.model, cfg.crops.global_size
    floor.model.pretrained = weights if method == "public" else None
    return floor


def build(cfg: DictConfig) -> nn.Module:
    """The backbone of a floor's config. Raises ValueError if the weights do not fit the crop or the channels."""
    if cfg.method == "pixels":
        side = pixel_side(cfg)
        if side < cfg.eval.crop:
            distributed.print_on_main(f"pixels: the crop of {cfg.eval.crop} pixels per side is averaged to {side}")
        return Pixels(side, cfg.data.in_chans)
    if cfg.method == "untrained":
        torch.manual_seed(cfg.seed)  # as training starts
        return build_backbone(cfg, drop_path=False)
    backbone, _ = read_backbone(cfg.model.pretrained)
    file, channels, patch = cfg.model.pretrained, backbone.patch_embed.proj.weight.shape[1], backbone.patch_size
    if channels != cfg.data.in_chans:
        raise ValueError(f"{file} reads {channels} channels, the run data.in_chans={cfg.data.in_chans}: leave it out")
    if cfg.eval.crop % patch:
        near = f"evaluate runs and floors with eval.crop={max(cfg.eval.crop // patch, 1) * patch}"
        wrong = f"eval.crop={cfg.eval.crop} is no multiple of the patch size {patch} of {file}"
        raise ValueError(f"{wrong}: give weights of another patch size, or {near}")
    return backbone


def default_output(run: Path) -> Path:
    """The folder that the runs of a data set share: runs/a of runs/a/gauss255/nct and of runs/a/clean."""
    run = run.absolute()
    return run.parent.parent if run.parent.name == load_run_config(run).noise else run.parent


def run(argv: list[str]) -> int:
    """Makes the floors that are not there yet, and prints their rows."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip() + "\n" + USAGE)
        return 0 if argv else 2
    folder, own, overrides = common.parse(argv, ("output", "weights", "evaluators"))
    if any(override.startswith("seed=") for override in overrides):
        raise ValueError("seed= is no argument here: untrained backbones have the seeds 0 and 1")
    chosen = own.get("evaluators", "knn,linear").split(",")
    if not set(chosen) <= EVALUATORS.keys():
        raise ValueError(f"evaluators={own['evaluators']}: choose {' or '.join(EVALUATORS)}, or both with a comma")
    cfg = common.load_settings(folder, overrides)
    distributed.init()
    keep_freed_memory()
    if reason := why_without_labels(cfg):
        distributed.print_on_main(f"no floors: {reason}")
        return 0
    place = Path(own.get("output") or default_output(folder)) / "floors" / f"{cfg.noise}-{eval_view(cfg)}"
    names = [*FLOORS, *(["public"] if own.get("weights") else [])]
    for name in reversed(names):  # first the weights, which may be wrong
        make(place / name, floor_config(cfg, name, own.get("weights")), chosen)
    return 0


def make(folder: Path, cfg: DictConfig, evaluators: list[str]) -> None:
    """Evaluates one floor by each of `evaluators` that has no rows with these settings yet."""
    cfg.output_dir = escaped(str(folder))
    origin = Checkpoint(folder, iteration=0, epoch=0, evaluate=True)
    missing = [name for name in evaluators if not common.is_done(folder, name, origin, cfg)]
    distributed.print_on_main(f"{folder}: {', '.join(missing) if missing else 'there already, skipped'}")
    if not missing:
        return
    backbone = build(cfg).to(distributed.device()).eval()
    if distributed.is_main():
        save_run_config(cfg, folder)
    for name in missing:
        common.evaluate_backbone(folder, name, EVALUATORS[name], backbone, origin, cfg)


if __name__ == "__main__":
    common.run_program(run)
