"""One of several ranks that run the recorded steps on their part of the batch: torchrun -m … NAME OUTPUT."""

import sys

import torch

from dinov2.train.placement import shard
from tests.dinov2.train.steps import final_parameters, run_steps, steps_config, steps_model
from utils import cli, distributed


def main(name: str, output: str) -> None:
    distributed.init()
    cfg = steps_config(name, dino={"koleo_weight": 0.0})
    model = steps_model(name, cfg)
    for network in model.networks():
        shard(network, distributed.device())
    history, centers = run_steps(name, model, cfg, part=distributed.rank(), parts=distributed.world_size())
    means = []
    for terms in history:
        stacked = distributed.all_reduce_mean(torch.tensor(list(terms.values())))
        means.append(dict(zip(terms, stacked.tolist(), strict=True)))
    state = {key: value.clone() for key, value in final_parameters(model).items()}
    if distributed.is_main():
        torch.save({"history": means, "centers": centers, "state": state}, output)
    distributed.close()


if __name__ == "__main__":
    cli.run(lambda: main(*sys.argv[1:]))
