"""The map of features: the projection against a direct decomposition, and the three files that belong together."""

import json

import numpy as np
import pytest

from utils import feature_map
from utils.images import read_image


def clusters(images=60, width=16):
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 3
    return (4 * rng.standard_normal((3, width))[labels] + rng.standard_normal((images, width))).astype(
        np.float32
    ), labels


def test_principal_components_equal_a_direct_decomposition():
    values, labels = clusters()
    places, explained = feature_map.project(values, "pca")
    rows = values / np.linalg.norm(values, axis=1, keepdims=True)
    variances, axes = np.linalg.eigh(np.cov(rows.T))
    for i in range(2):
        expected = (rows - rows.mean(axis=0)) @ axes[:, -1 - i]
        assert np.allclose(np.abs(places[:, i]), np.abs(expected), atol=1e-5)
        assert explained[i] == pytest.approx(variances[-1 - i] / variances.sum(), rel=1e-4)
    centres = np.stack([places[labels == label].mean(axis=0) for label in range(3)])
    spread = np.mean([places[labels == label].std(axis=0).max() for label in range(3)])
    assert np.linalg.norm(centres[0] - centres[1]) > 3 * spread  # clusters stay apart


def test_scale_does_not_count_and_signs_are_fixed():
    values, _ = clusters()
    places, _ = feature_map.project(values, "pca")
    scaled, _ = feature_map.project(values * np.linspace(1, 9, len(values))[:, None], "pca")
    assert np.allclose(places, scaled, atol=1e-5)


def test_files_belong_together(tmp_path):
    values, labels = clusters(images=7)
    tiles = [feature_map.thumbnail(np.full((20 + i, 40, 1), 30 * i, np.uint8)) for i in range(7)]
    names = [f"{i}.png" for i in range(7)]
    given = [None if i == 0 else f"class {label}" for i, label in enumerate(labels)]
    explained = feature_map.write_map(tmp_path / "new" / "map.png", names, values, tiles, given, "pca")
    content = json.loads((tmp_path / "new" / "map.json").read_text())
    assert content["method"] == "pca" and content["explained"] == explained and 0 < explained[1] < explained[0] < 1
    assert [point[2:] for point in content["points"]] == [list(pair) for pair in zip(names, given, strict=True)]
    assert all(isinstance(number, float) for point in content["points"] for number in point[:2])
    sprite = read_image(tmp_path / "new" / content["thumbnails"])
    tile, columns = content["tile"], content["columns"]
    for i in range(7):
        row, column = divmod(i, columns)
        assert (sprite[row * tile : (row + 1) * tile, column * tile : (column + 1) * tile] == 30 * i).all()
    picture = read_image(tmp_path / "new" / "map.png")
    assert picture.shape[:2] == feature_map.SIZE[::-1] and len(np.unique(picture.reshape(-1, 3), axis=0)) > 5


def test_float_and_many_channels_have_thumbnails():
    assert feature_map.thumbnail(np.random.default_rng(0).random((9, 7, 5), np.float32)).shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("rows", "method", "message"), [(2, "pca", "a map of 2 images"), (5, "tsne", "choose pca or umap")]
)
def test_what_is_refused(rows, method, message):
    with pytest.raises(ValueError, match=message):
        feature_map.project(np.ones((rows, 4), np.float32), method)


def test_umap_or_the_way_to_it():
    values, _ = clusters()
    try:
        import umap  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"pip install 'noise-robust-dino\[umap\]'"):
            feature_map.project(values, "umap")
        return
    places, explained = feature_map.project(values, "umap")
    assert places.shape == (60, 2) and explained == [] and np.isfinite(places).all()
