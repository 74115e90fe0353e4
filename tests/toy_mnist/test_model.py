"""Losses against recorded numbers; the encoder's shape, initial weights and files."""

import pytest
import torch

from tests.conftest import golden
from toy_mnist.model import Encoder, covariance_penalty, invariance_loss, load_encoder, seeded


def test_losses_agree_with_the_recorded_ones():
    recorded = golden("toy_losses.npz")
    z1, z2 = torch.from_numpy(recorded["z1"]), torch.from_numpy(recorded["z2"])
    torch.testing.assert_close(invariance_loss(z1, z2).item(), float(recorded["invariance"]), rtol=1e-5, atol=0)
    both = covariance_penalty(torch.cat([z1, z2])).item()
    torch.testing.assert_close(both, float(recorded["covariance"]), rtol=1e-5, atol=0)


def test_covariance_penalty_vanishes_for_white_features():
    z = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))[0]
    z = z - z.mean(0)
    white = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / 64)).T
    assert covariance_penalty(white + 3).item() < 1e-8  # the mean doesn't count
    assert covariance_penalty(torch.ones(64, 8)).item() == pytest.approx(8)  # collapse costs the whole identity


def test_encoder_has_the_released_names_and_no_biases():
    shapes = {name: tuple(p.shape) for name, p in Encoder().named_parameters()}
    assert shapes == {"net.0.weight": (128, 784), "net.2.weight": (32, 128)}
    encoder = Encoder()
    images = torch.rand(2, 28, 28)
    expected = (images.flatten(1) @ encoder.net[0].weight.T).clamp(min=0) @ encoder.net[2].weight.T
    torch.testing.assert_close(encoder(images), expected)


def test_seeded_weights_leave_the_global_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = seeded(Encoder, 1), seeded(Encoder, 1), seeded(Encoder, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.net[0].weight, again.net[0].weight)
    assert not torch.equal(first.net[0].weight, other.net[0].weight)


def test_loads_a_plain_state_dict_and_refuses_other_files(tmp_path):
    encoder = Encoder()
    torch.save(encoder.state_dict(), tmp_path / "plain.pth")
    torch.save({"encoder": encoder.state_dict(), "optimizer": {}}, tmp_path / "checkpoint.pth")
    for name in ("plain.pth", "checkpoint.pth"):
        assert torch.equal(load_encoder(tmp_path / name).net[2].weight, encoder.net[2].weight)
    torch.save({"net.0.weight": torch.zeros(3, 784)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("other.pth", "list.pth", "text.pth", "empty.pth"):
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint of the toy's"):
            load_encoder(tmp_path / name)
    with pytest.raises(OSError):
        load_encoder(tmp_path / "missing.pth")
