"""Loss and gradients of the objectives that compare two crops; as one of several ranks: torchrun -m … OUTPUT."""

import sys

import torch
from omegaconf import DictConfig

from dinov2.config import load_config
from dinov2.objectives import OBJECTIVES, CropBatch
from dinov2.train.placement import shard
from tests.dinov2.train.tiny import SETTINGS
from utils import cli, distributed

TWO_CROPS = ("simclr", "mocov3", "simsiam")
NAMES = (*TWO_CROPS, "simdinov2")  # whose loss looks at other images of the batch
SMALL = ["projector.hidden=16", "projector.dim=8", "projector.predictor=8", "model.drop_path=0.0", "data.root=x"]
SMALL += ["model.layerscale=1.0"]
IMAGES = 6


def config_of(name: str, *more: str) -> DictConfig:
    settings = [setting for setting in SETTINGS if not setting.startswith("crops.local_number")]
    own = ["dino.prototypes=0", "ibot.mask_probability=0.0"] if name == "simdinov2" else []
    return load_config([*settings, *SMALL, f"objective={name}", *own, "output_dir=x", *more])


def batch_of(rank: int = 0, ranks: int = 1) -> CropBatch:
    """This rank's part of a batch of IMAGES images."""
    crops = torch.randn(2, IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    own = crops.unflatten(1, (ranks, -1))[:, rank].flatten(0, 1)
    return CropBatch(own, own[:0], torch.zeros(len(own), 16, dtype=torch.bool))


def spread(network: torch.nn.Module) -> None:
    """Larger weights: fresh ones give all images nearly one CLS token, whose rounding batch normalisation magnifies."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2, generator=generator)


def gradients(name: str) -> dict[str, torch.Tensor]:
    """The loss over all ranks, and of each trained parameter the whole gradient."""
    torch.manual_seed(0)
    model = OBJECTIVES[name](config_of(name)).train()
    for network in model.trained():
        spread(network)
    if distributed.world_size() > 1:
        for network in model.networks():
            shard(network, distributed.device())
    loss, _ = model(batch_of(distributed.rank(), distributed.world_size()), 0.05)
    loss.backward()
    found = {"loss": distributed.all_reduce_mean(loss.detach())}
    for key, parameter in model.student.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            found[key] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def main(output: str) -> None:
    distributed.init()
    found = {name: gradients(name) for name in NAMES}
    if distributed.is_main():
        torch.save(found, output)
    distributed.close()


if __name__ == "__main__":
    cli.run(lambda: main(*sys.argv[1:]))
