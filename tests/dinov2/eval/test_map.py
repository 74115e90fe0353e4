"""The evaluator of the map: files in the run's folder, with labels and without."""

import json

from dinov2.eval import common
from dinov2.eval import map as map_evaluator
from tests.dinov2.eval.conftest import make_run
from tests.dinov2.eval.test_label_free import flat
from utils.images import read_image
from utils.results import read_results


def draw(run, *settings):
    return common.run("map", map_evaluator.evaluate, "", lambda cfg: [cfg], [f"run={run}", *settings])


def test_map_of_validation_images(run):
    assert draw(run, "eval.map.images=20") == 0
    content = json.loads((run / "map.json").read_text())
    assert len(content["points"]) == 20
    assert {point[3] for point in content["points"]} == {f"digit_{digit}" for digit in range(4)}
    assert all(point[2].startswith("val/") for point in content["points"])
    assert read_image(run / content["thumbnails"]).shape[1] == content["columns"] * content["tile"]
    (row,) = read_results(run)
    assert row["metric"] == "map_explained" and row["value"] == 100 * sum(content["explained"])


def test_map_of_a_flat_folder(tmp_path):
    run = make_run(tmp_path / "run", flat(tmp_path / "photos"), "noise=none", epochs=(1,))
    draw(run)
    content = json.loads((run / "map.json").read_text())
    assert len(content["points"]) == 24 and {point[3] for point in content["points"]} == {None}
