"""The linear probe on a real run's folder: protocols, resume, and its row."""

import pytest
import torch

from dinov2 import load_backbone
from dinov2.eval import common, linear
from dinov2.eval.features import block_tokens, extract, labelled_dataset
from utils import distributed
from utils.results import read_results


def probe(run, *settings):
    """Evaluates the last checkpoint; returns (value, details)."""
    cfg = common.load_settings(run, list(settings))
    checkpoint = common.choose_checkpoints(run, "last")[0]
    backbone = load_backbone(checkpoint.path)
    ((_, value, details),) = linear.evaluate(backbone, cfg, common.Job(run, checkpoint.path.name))
    return value, details


def test_row_names_the_best_of_all_classifiers(run):
    assert common.run("linear", linear.evaluate, "", lambda cfg: [cfg], [f"run={run}"]) == 0
    (row,) = read_results(run)
    figures = row["details"]["classifiers"]
    assert len(figures) == 13 * 2 * 2  # learning rates x depths x with and without the mean patch token
    assert row["value"] == pytest.approx(max(figures.values()), abs=1e-3)
    assert figures[row["details"]["classifier"]] == max(figures.values())
    assert (row["metric"], row["protocol"], row["view"], row["noise"]) == ("linear_top1", "exact", "noisy", "gauss50")
    assert row["details"]["top5"] == 100.0  # of four classes the first five hold the right one
    assert row["details"]["images"] == 32
    assert not list(run.glob(".eval-*"))  # the state for resuming is gone


def test_features_are_those_of_the_public_model(run):
    cfg = common.load_settings(run, [])
    backbone = load_backbone(run)
    images = torch.randn(3, 3, 32, 32)
    tokens = block_tokens(backbone, images)
    (_, before_last), (patches, last) = backbone.get_intermediate_layers(images, n=2, return_class_token=True)
    torch.testing.assert_close(tokens, torch.cat([before_last, last, patches.mean(dim=1)], dim=1))
    val = extract(backbone, cfg, "val", block_tokens)
    assert val.values.shape == (32, 3 * 192) and val.classes == [f"digit_{i}" for i in range(4)]
    assert val.labels.tolist() == labelled_dataset(cfg, "val").labels.tolist()


def test_ranks_that_do_not_divide_the_batch_are_told_the_key_of_evaluations(run, tmp_path, monkeypatch):
    cfg = common.load_settings(run, [])
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(linear, "cache_crops", lambda *_: (torch.zeros(1, 60, 2), torch.zeros(60)))
    for source in (linear.exact_source(None, cfg, 0, 1), linear.cached_source(None, cfg, 0, tmp_path / "x")):
        with pytest.raises(ValueError, match="eval.batch_size=32 is not a multiple of the 3 ranks"):
            next(source)


def test_only_the_cached_crops_are_in_bf16(run, monkeypatch):
    """On a CPU. Validation features are the same under both protocols: rounded ones move images over the boundaries."""
    seen, original = [], linear.block_tokens

    def noted(backbone, images):
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(backbone, images)

    monkeypatch.setattr(linear, "block_tokens", noted)
    for protocol, training in (("exact", [False] * 20), ("cached", [True] * 4)):  # two crops in two batches
        seen.clear()
        probe(run, f"eval.linear.protocol={protocol}", "eval.linear.cached_fraction=0.2")
        assert seen == [False, *training]


@pytest.mark.parametrize("protocol", ["exact", "cached"])
def test_killed_probe_goes_on_where_it_was(run, monkeypatch, protocol):
    settings = (f"eval.linear.protocol={protocol}", "eval.linear.cached_fraction=0.2")
    whole = probe(run, *settings)
    monkeypatch.setattr(linear, "SAVE_SECONDS", 0)
    step, done = linear.Probes.step, []

    def interrupted(self, features, labels, share):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(share)
        step(self, features, labels, share)

    monkeypatch.setattr(linear.Probes, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe(run, *settings)
    resumed = []
    monkeypatch.setattr(
        linear.Probes, "step", lambda self, f, y, share: (resumed.append(share), step(self, f, y, share))
    )
    assert probe(run, *settings) == whole
    assert resumed == [i / 20 for i in range(7, 20)]


def test_cache_in_a_file_equals_cache_in_memory(run):
    settings = ("eval.linear.protocol=cached", "eval.linear.cached_fraction=0.2")
    assert probe(run, *settings, "eval.linear.cache_gib=0") == probe(run, *settings)
    assert not list(run.glob("**/*.f16"))


def test_cached_crops_are_different_ones_of_the_same_images(run, tmp_path):
    cfg = common.load_settings(run, ["eval.linear.cached_fraction=0.3"])
    backbone = load_backbone(run)
    values, labels = linear.cache_crops(backbone, cfg, tmp_path / "cache")
    assert values.shape == (3, 60, 3 * 192) and values.dtype == torch.float16
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])
    again, _ = linear.cache_crops(backbone, cfg, tmp_path / "cache")
    assert torch.equal(values, again)


def source_of(run, monkeypatch, values, start=0):
    """cached_source over given features of float16 [V, N, F]; an image's label is its number."""
    monkeypatch.setattr(linear, "cache_crops", lambda *_: (values, torch.arange(values.shape[1])))
    return linear.cached_source(None, common.load_settings(run, []), start, None)


def test_each_pass_takes_the_next_crop(run, monkeypatch):
    image, crop = torch.arange(60.0).expand(3, 60), torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, 60)
    values = torch.stack([image, crop], dim=2).half()  # of an image's crops the second feature alone differs
    # Iteration 2 of batch 32 holds the images 64 to 95 of the stream: the last ones of pass 1 (from 60 on), in crop 1.
    features, labels = next(source_of(run, monkeypatch, values, start=2))
    assert len(labels.unique()) == 32 and torch.equal(features[:, 0], labels.float())
    deviations = features[:, 1] - values[1, labels, 1]
    torch.testing.assert_close(deviations.unique(), torch.tensor([-1, 0, 1]) / 2**0.5)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_cached_crops_scatter_as_fresh_ones(run, monkeypatch, count):
    images = 2000
    centres = torch.randn(images, 1, generator=torch.Generator().manual_seed(0)) * 10
    crops = (centres + 2 * torch.randn(count, images, 4, generator=torch.Generator().manual_seed(1))).half()
    source = source_of(run, monkeypatch, crops)
    seen = [next(source) for _ in range(images * count // 32)]  # as many passes as crops
    deviations = torch.cat([features - crops[:, labels].float().mean(dim=0) for features, labels in seen])
    assert deviations.mean().abs() < 0.05
    # As fresh crops; the kept ones alone deviate by 2 sqrt((V - 1) / V) from their mean.
    assert deviations.std() == pytest.approx(2, rel=0.03)


def test_ranks_share_out_the_cached_batch(run, monkeypatch):
    values = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(0)).half()
    whole, _ = next(source_of(run, monkeypatch, values, start=1))
    monkeypatch.setattr(linear.distributed, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(linear.distributed, "rank", lambda rank=rank: rank)
        parts.append(next(source_of(run, monkeypatch, values, start=1))[0])
    assert torch.equal(torch.cat(parts), whole)


def test_a_single_crop_stays_as_it_is(run, monkeypatch):
    values = torch.randn(1, 60, 4, generator=torch.Generator().manual_seed(0)).half()
    features, labels = next(source_of(run, monkeypatch, values))
    assert torch.equal(features, values[0, labels].float())


def test_crops_are_a_fraction_of_the_exact_passes(run):
    cfg = common.load_settings(run, [])  # 2 x 10 iterations of 32 images: 10.7 passes over 60
    assert linear.count_crops(cfg, 60) == 1
    assert linear.count_crops(cfg, 20) == 3
    assert linear.count_crops(cfg, 10**6) == 1
    assert linear.count_crops(common.load_settings(run, ["eval.linear.cached_fraction=1"]), 60) == 11


def test_learning_rates_scale_with_the_batch(run):
    _, details = probe(run, "eval.batch_size=64", "eval.linear.learning_rates=[0.1]", "eval.linear.epoch_length=1")
    assert set(details["classifiers"]) == {
        f"classifier_{n}_blocks_avgpool_{average}_lr_0.025" for n in (1, 2) for average in (False, True)
    }


@pytest.mark.parametrize("setting", ["protocol=quick", "cached_fraction=0", "cached_fraction=2"])
def test_unknown_protocol_and_fraction(run, setting):
    with pytest.raises(ValueError, match=rf"eval\.linear\.{setting}"):
        probe(run, "eval.linear.protocol=cached", f"eval.linear.{setting}")


def test_resident_images_give_the_same_figures(run):
    assert probe(run, "data.resident=true") == probe(run)
