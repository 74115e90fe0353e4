"""U-Net, sub-sampling, loss and metrics against the numbers recorded from the published code."""

import numpy as np
import pytest
import torch

from Neighbor2Neighbor.metrics import psnr, ssim
from Neighbor2Neighbor.subsample import PAIRS, draw_pairs, neighbor_loss, subsample
from Neighbor2Neighbor.unet import UNet, load_unet
from tests.conftest import fill_parameters, golden
from utils.precision import autocast


@pytest.fixture(scope="module")
def recorded() -> dict:
    return golden("neighbor2neighbor.npz")


@pytest.fixture(scope="module")
def noisy(recorded) -> torch.Tensor:
    seed, shape = int(recorded["input_seed"]), tuple(recorded["input_shape"])
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape).astype(np.float32))


def test_unet_matches_the_published_names_and_outputs(recorded, noisy):
    network = fill_parameters(UNet())
    assert [name for name, _ in network.named_parameters()] == list(recorded["param_names"])
    assert sum(parameter.numel() for parameter in network.parameters()) == int(recorded["n_params"])
    with torch.no_grad():
        output = network(noisy).numpy()
    assert np.abs(output[0, :, :16, :16] - recorded["output_first"]).max() < 1e-5
    assert np.abs(output.mean((2, 3)) - recorded["output_mean"]).max() < 1e-5
    assert np.abs(output.std((2, 3)) - recorded["output_std"]).max() < 1e-5


def test_sub_images_match(recorded, noisy):
    first, second = subsample(noisy, torch.from_numpy(recorded["pair_index"]))
    height, width = recorded["sub1_first"].shape[-2:]
    assert np.array_equal(first[..., :height, :width].numpy(), recorded["sub1_first"])
    assert np.array_equal(second[..., :height, :width].numpy(), recorded["sub2_first"])
    assert np.abs(first.numpy().mean((2, 3)) - recorded["sub1_mean"]).max() < 1e-5
    assert np.abs(second.numpy().mean((2, 3)) - recorded["sub2_mean"]).max() < 1e-5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_loss_and_gradient_match(recorded, noisy, memory_format):
    network = fill_parameters(UNet()).to(memory_format=memory_format)
    weight = float(recorded["Lambda"])
    pairs = torch.from_numpy(recorded["pair_index"])
    reconstruction, regulariser = neighbor_loss(network, noisy.contiguous(memory_format=memory_format), pairs)
    assert abs(reconstruction.item() - recorded["loss_rec"]) < 1e-5
    assert abs(weight * regulariser.item() - recorded["loss_reg"]) < 1e-5
    (reconstruction + weight * regulariser).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in network.parameters()]).norm()
    assert abs(norm.item() - recorded["grad_norm"]) < 1e-5 * recorded["grad_norm"]


def test_bf16_gradients_are_those_of_float32(recorded, noisy):
    """Both passes run under autocast; the one without gradients must not take those of the other away."""
    network = fill_parameters(UNet())
    pairs = torch.from_numpy(recorded["pair_index"])
    gradients = []
    for precision in ("fp32", "bf16"):

        def predict(batch, precision=precision):
            with autocast(torch.device("cpu"), precision):
                return network(batch)

        network.zero_grad()
        sum(neighbor_loss(predict, noisy, pairs)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in network.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[0].norm()


def test_pairs_are_side_by_side_and_all_occur():
    """An image whose pixels say where they lie: both sub-images take neighbours of the same cell, channels alike."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(12.0), indexing="ij")
    image = torch.stack([rows, columns]).expand(3, 2, 16, 12)
    pairs = draw_pairs(image, torch.Generator().manual_seed(0))
    assert pairs.shape == (3, 8, 6) and set(pairs.flatten().tolist()) == set(range(8))
    first, second = subsample(image, pairs)
    assert torch.equal((first - second).abs().sum(1), torch.ones(3, 8, 6))
    assert torch.equal(first // 2, second // 2)
    for index, pair in enumerate(PAIRS):
        chosen = pairs == index
        place = (first % 2)[:, 0] * 2 + (first % 2)[:, 1]
        assert (place[chosen] == pair[0]).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 6])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_depths_and_channels(tmp_path, depth, channels):
    network = UNet(channels, features=8, depth=depth)
    side = 2**depth
    image = torch.rand(2, channels, side, 2 * side)
    output = network(image)
    assert output.shape == image.shape
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with pytest.raises(ValueError, match=f"depth {depth}.*multiples of {side} px"):
        network(torch.rand(1, channels, side, side + 1))
    torch.save(network.state_dict(), tmp_path / "unet.pth")
    loaded = load_unet(tmp_path / "unet.pth")
    assert (loaded.depth, loaded.channels, loaded.features) == (depth, channels, 8) and not loaded.training
    assert torch.equal(loaded(image), network(image))


def test_published_files_load_and_others_are_refused(tmp_path, recorded, noisy):
    network = fill_parameters(UNet())
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, tmp_path / "parallel.pth")
    with torch.no_grad():
        output = load_unet(tmp_path / "parallel.pth")(noisy)[0, :, :16, :16].numpy()
    assert np.abs(output - recorded["output_first"]).max() < 1e-5
    state = network.state_dict()
    torch.save({name: value for name, value in state.items() if name != "nin_c.bias"}, tmp_path / "short.pth")
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "long.pth")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    torch.save(network, tmp_path / "pickle.pth")  # a whole object, which could run code when loaded
    (tmp_path / "text.pth").write_text("hello")
    reasons = {"short": "nin_c.bias", "long": "extra", "other": "no weights", "pickle": "holds more than weights"}
    reasons |= {"text": "can't be read as a torch file", "nowhere": "missing"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=rf"{name}\.pth.*{reason}"):
            load_unet(tmp_path / f"{name}.pth")


def test_metrics_match():
    recorded = golden("psnr_ssim.npz")
    assert abs(psnr(recorded["a"], recorded["b"]) - recorded["psnr"]) < 1e-5
    assert abs(ssim(recorded["a"], recorded["b"]) - recorded["ssim"]) < 1e-9
    grey = recorded["a"][:, :, 0]
    assert psnr(grey, grey) == float("inf") and abs(ssim(grey, grey) - 1) < 1e-12
