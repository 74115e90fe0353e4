"""The denoiser on a GPU that is not there: no tensor is on the wrong device, and each wait has its place."""

import numpy as np
import pytest
import torch

from Neighbor2Neighbor import train
from Neighbor2Neighbor.denoisers import UNetDenoiser, denoise_images
from Neighbor2Neighbor.unet import UNet
from tests.fake_cuda import FakeCuda, without_backward
from utils.images import write_image

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the other tests of this folder take it"),
]
SIDE = 16


def test_a_training_step_waits_for_nothing(tmp_path):
    write_image(tmp_path / "x.png", np.zeros((SIDE, SIDE, 3), np.uint8))
    options = ["--data", str(tmp_path), "--noise", "gauss50", "--output", str(tmp_path), "--depth", "2"]
    args = train.parse_arguments([*options, "--values", "full", "--steps", "4"])
    crops = torch.randint(256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    with FakeCuda() as gpu:
        training = train.Training(args, ["x.png"], SIDE)
        with without_backward(training.network):
            training.train_step(crops.to("cuda"))
            gpu.waits.clear(), gpu.copies.clear()
            terms = training.train_step(crops.to("cuda", non_blocking=True))
    assert terms.is_cuda and gpu.waits == [] and gpu.copies == ["tests"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tile", [64, 8])
def test_denoising_waits_for_a_batch_on_its_way_there_and_back(precision, tile):
    torch.manual_seed(0)
    images = [np.random.default_rng(k).integers(0, 256, (14, 9 + k, 3), dtype=np.uint8) for k in range(3)]
    network = UNet(depth=2)
    expected = denoise_images(UNetDenoiser(network, torch.device("cpu"), precision), images, torch.device("cpu"), tile)
    with FakeCuda() as gpu:
        denoiser = UNetDenoiser(network, torch.device("cuda"), precision)
        gpu.waits.clear()
        found = denoise_images(denoiser, images, torch.device("cuda"), tile)
    assert gpu.waits == ["Neighbor2Neighbor/denoisers.py denoise_images"] * 2
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1)
