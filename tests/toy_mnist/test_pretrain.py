"""Views, one step against its formula, resuming, and the probe on encoders whose features are known."""

import pytest
import torch
from torch import nn

from tests.toy_mnist.conftest import bars
from toy_mnist.augment import augment, sample_augmentation
from toy_mnist.data import Digits
from toy_mnist.linear_probe import probe
from toy_mnist.model import Encoder, covariance_penalty, invariance_loss, load_encoder, seeded
from toy_mnist.pretrain import pretrain, stream_seed, train_epoch, two_crops
from utils.noise import NoiseSpec, perturb

CLEAN, NOISY = NoiseSpec.parse("none"), NoiseSpec.parse("gauss102")
IMAGES = torch.from_numpy(bars(300, 0)[0])


def test_views_are_noisy_before_they_are_augmented_and_each_has_its_own_noise():
    generator = torch.Generator().manual_seed(0)
    crops = two_crops(IMAGES[:4], NOISY, generator)
    generator.manual_seed(0)
    noisy = perturb((IMAGES[:4] / 255.0).repeat(2, 1, 1), NOISY, generator)
    torch.testing.assert_close(crops, augment(noisy, sample_augmentation(8, 28, generator)))
    noise = noisy - (IMAGES[:4] / 255.0).repeat(2, 1, 1)
    assert not torch.allclose(noise[:4], noise[4:], atol=0.1)  # drawn anew per crop
    flat = perturb(torch.full((1000, 784), 0.5), NOISY, generator)
    assert abs(flat.std() - 0.3255) < 1e-3  # N(0.5, 0.4) clipped to [0, 1]


def test_clean_views_of_an_image_differ_by_augmentation_alone():
    crops = two_crops(IMAGES[:2], CLEAN, torch.Generator().manual_seed(1))
    assert crops.shape == (4, 28, 28) and not torch.equal(crops[0], crops[2])
    assert crops.min() >= 0 and crops.max() <= 1


def test_an_epoch_is_adam_on_invariance_plus_half_the_covariance_over_all_images():
    encoder, copy = seeded(Encoder, 3), seeded(Encoder, 3)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-4, fused=True)
    losses = train_epoch(encoder, optimizer, IMAGES, NOISY, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    reference = torch.optim.Adam(copy.parameters(), lr=1e-4)
    seen, invariances = [], []
    order = torch.randperm(300, generator=generator)
    for index in (order[:256], order[256:]):  # the last batch is smaller, not dropped
        z1, z2 = copy(two_crops(IMAGES[index], NOISY, generator)).split(len(index))
        invariances.append(invariance_loss(z1, z2))
        reference.zero_grad()
        (invariances[-1] + 0.5 * covariance_penalty(torch.cat([z1, z2]))).backward()
        reference.step()
        seen += index.tolist()
    assert sorted(seen) == list(range(300))
    torch.testing.assert_close(encoder.net[0].weight, copy.net[0].weight, atol=1e-7, rtol=1e-5)
    assert losses["invariance"] == pytest.approx(sum(v.item() for v in invariances) / 2, rel=1e-5)


def test_interrupted_run_ends_in_the_same_weights(tmp_path, monkeypatch):
    whole = pretrain(IMAGES, NOISY, 7, 0, tmp_path / "a", "noisy")
    epochs = iter(range(6))

    def stop_at_seventh(*args):
        if next(epochs, None) is None:
            raise KeyboardInterrupt
        return train_epoch(*args)

    monkeypatch.setattr("toy_mnist.pretrain.train_epoch", stop_at_seventh)
    with pytest.raises(KeyboardInterrupt):
        pretrain(IMAGES, NOISY, 7, 0, tmp_path / "b", "noisy")
    assert [p.name for p in (tmp_path / "b").glob("*.pth")] == ["noisy_5.pth"]
    monkeypatch.undo()
    resumed = pretrain(IMAGES, NOISY, 7, 0, tmp_path / "b", "noisy")
    assert torch.equal(load_encoder(whole).net[0].weight, load_encoder(resumed).net[0].weight)
    before = resumed.stat().st_mtime_ns
    assert pretrain(IMAGES, NOISY, 7, 0, tmp_path / "b", "noisy").stat().st_mtime_ns == before  # finished: untouched


def test_damaged_checkpoint_is_named(tmp_path):
    path = pretrain(IMAGES, NOISY, 1, 0, tmp_path, "noisy")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="noisy_1.pth is not a checkpoint"):
        pretrain(IMAGES, NOISY, 2, 0, tmp_path, "noisy")


def test_second_stage_starts_from_the_first_ones_encoder_with_a_fresh_optimizer(tmp_path):
    first = pretrain(IMAGES, CLEAN, 1, 0, tmp_path, "clean")
    second = pretrain(IMAGES, NOISY, 1, 0, tmp_path, "noisy_from1", first)
    encoder = load_encoder(first)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(stream_seed(0, "noisy_from1", 1))
    train_epoch(encoder, optimizer, IMAGES, NOISY, generator)
    assert torch.equal(load_encoder(second).net[0].weight, encoder.net[0].weight)


def test_training_lowers_the_loss():
    encoder = seeded(Encoder, 0)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    history = [train_epoch(encoder, optimizer, IMAGES, CLEAN, generator) for _ in range(30)]
    total = [h["invariance"] + 0.5 * h["covariance"] for h in history]
    assert total[-1] < 0.98 * total[0] and history[-1]["covariance"] < 0.98 * history[0]["covariance"]


class BarRows(nn.Module):
    """Features that tell a bar's row: the mean of each row, scaled, in the first 28 of 32 dimensions."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(images.mean(2) * self.scale, (0, 4))


def test_probe_tells_good_features_from_none_and_leaves_the_encoders_alone():
    (train, labels), (test, test_labels) = bars(5120, 0), bars(500, 1)
    tensors = [torch.from_numpy(a) for a in (train, labels, test, test_labels)]
    digits = Digits("bars", tensors[0], tensors[1].long(), tensors[2], tensors[3].long())
    good, none = BarRows(30.0), BarRows(0.0)
    accuracies = probe([good, none], digits, NOISY, seed=0, epochs=40)
    assert accuracies[0] > 80 and accuracies[1] == pytest.approx(10)
    assert good.scale.item() == 30.0 and good.scale.grad is None
    # A figure doesn't depend on what is probed beside it, and does on the seed.
    beside = probe([none, good], digits, NOISY, seed=0, epochs=2)
    assert probe([good], digits, NOISY, seed=0, epochs=2) == beside[1:]
    assert probe([good], digits, NOISY, seed=1, epochs=2) != beside[1:]
