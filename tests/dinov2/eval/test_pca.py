"""Principal components of patch tokens: one basis for all views, and the files that the report reads."""

import numpy as np
import torch

from dinov2.eval import common, pca
from tests.dinov2.eval.conftest import make_run
from utils.images import read_image
from utils.results import read_results


def draw(run, *settings):
    return common.run("pca", pca.evaluate, "", lambda cfg: [cfg], [f"run={run}", *settings])


def test_components_equal_a_direct_decomposition_and_share_their_basis():
    tokens = torch.randn(2, 4, 5, 16, generator=torch.Generator().manual_seed(0))
    tokens[1] = tokens[0]  # equal views: equal colours
    colours = pca.components(tokens)
    assert colours.shape == (2, 4, 5, 3) and colours.dtype == np.uint8
    assert np.array_equal(colours[0], colours[1])
    rows = tokens[0].flatten(0, 1).double().numpy()
    rows = rows - rows.mean(axis=0)
    _, vectors = np.linalg.eigh(rows.T @ rows)
    for i in range(3):
        projected = rows @ vectors[:, -1 - i]
        assert abs(np.corrcoef(projected, colours[0].reshape(-1, 3)[:, i])[0, 1]) > 0.98  # but for clipped ends
    assert np.array_equal(pca.components(tokens), colours)  # signs do not flip from call to call


def test_files_and_row(run):
    draw(run, "eval.pca.images=3")
    with np.load(run / "pca.npz", allow_pickle=False) as content:
        assert content["views"].tolist() == ["clean", "noisy"]
        assert [name.split("/")[1] for name in content["names"]] == ["digit_0", "digit_1", "digit_3"]
        assert content["images"].shape == (3, 2, 32, 32, 3) and content["components"].shape == (3, 2, 4, 4, 3)
        assert not np.array_equal(content["images"][:, 0], content["images"][:, 1])
    assert read_image(run / "pca.png").shape == (96, 4 * 32, 3)
    (row,) = read_results(run)
    assert row["metric"] == "patch_similarity_noisy" and 0 < row["value"] < 1


def test_images_noisy_by_nature_have_one_view(tmp_path, digits):
    run = make_run(tmp_path / "run", digits, "noise=none", epochs=(1,))
    draw(run, "eval.pca.images=50")
    with np.load(run / "pca.npz", allow_pickle=False) as content:
        assert content["views"].tolist() == ["noisy"] and len(content["names"]) == 32
    assert read_results(run) == []
