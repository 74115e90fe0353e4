"""Instance recognition on a small folder of the official layout, made of crops of Kodak or of random scenes."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2 import load_backbone
from dinov2.eval import common, instance_recog
from tests.conftest import DATA_DIR
from tests.dinov2.eval.conftest import make_run
from utils.images import list_images, read_image, write_image
from utils.noise import NoiseSpec, keyed_noise, noise_key
from utils.results import read_results

SCENES = 6


def scenes() -> list[np.ndarray]:
    """Large pictures to take crops of: [H, W, 3] each."""
    kodak = sorted(DATA_DIR.glob("denoise_sets/**/[Kk]odak*/*.png"))[:SCENES]
    if len(kodak) == SCENES:
        return [read_image(path) for path in kodak]
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (12, 18, 3), dtype=np.uint8)) for _ in range(SCENES)]
    return [np.asarray(image.resize((768, 512), Image.Resampling.BICUBIC)) for image in coarse]


def write_landmarks(root: Path) -> Path:
    """root/small/{jpg/,gnd_small.pkl}: for five scenes each a query in a box, two easy, two hard, one junk."""
    images, queries, truth = [], [], []
    for s, scene in enumerate(scenes()):
        height, width = scene.shape[:2]
        side = min(height, width) // 2
        top, left = (height - side) // 2, (width - side) // 2
        first = len(images)
        for i, (dy, dx, shrink) in enumerate([(0, 4, 1), (6, 0, 1), (20, 30, 2), (40, 10, 2), (60, 60, 4)]):
            crop = scene[top + dy : top + dy + side, left + dx : left + dx + side][::shrink, ::shrink]
            write_image(root / "small/jpg" / f"scene_{s}_{i}.png", np.ascontiguousarray(crop))
            images.append(f"scene_{s}_{i}")
        if s < SCENES - 1:  # the last scene is a distraction alone
            framed = np.zeros((side + 80, side + 120, 3), dtype=np.uint8)
            framed[40:-40, 60:-60] = scene[top : top + side, left : left + side]
            write_image(root / "small/jpg" / f"query_{s}.png", framed)
            queries.append(f"query_{s}")
            box = [60.0, 40.0, 60.0 + side, 40.0 + side]
            truth.append({"bbx": box, "easy": [first, first + 1], "hard": [first + 2, first + 3], "junk": [first + 4]})
    truth[-1] |= {"hard": []}  # a query without a hard image is skipped at that level
    (root / "small/gnd_small.pkl").write_bytes(pickle.dumps({"imlist": images, "qimlist": queries, "gnd": truth}))
    return root


@pytest.fixture(scope="module")
def landmarks(tmp_path_factory) -> Path:
    return write_landmarks(tmp_path_factory.mktemp("datasets"))


def recognise(run, root, *settings):
    common.run(
        "instance_recog", instance_recog.evaluate, "", instance_recog.one_per_set,
        [f"run={run}", f"eval.retrieval.root={root}", "eval.retrieval.sets=[small]", *settings],
    )  # fmt: skip
    last = {}
    for row in read_results(run):
        last[row["metric"]] = row
    return last


def test_whole_command(run, landmarks):
    rows = recognise(run, landmarks, "eval.retrieval.pictures=2")
    assert set(rows) == {"map_easy", "map_medium", "map_hard"}
    chance = 100 * 2 / 30
    assert rows["map_easy"]["value"] > 5 * chance  # crops a few pixels apart, cut to the box: nearly the same picture
    assert rows["map_easy"]["value"] >= rows["map_hard"]["value"]
    row = rows["map_medium"]
    assert (row["dataset"], row["noise"], row["view"]) == ("small", "gauss50", "noisy")
    assert row["protocol"] == "queries cut to their box"
    assert set(row["details"]["mean_precision_at"]) == {"1", "5", "10"}
    assert (rows["map_easy"]["details"]["queries"], rows["map_hard"]["details"]["queries"]) == (5, 4)
    content = json.loads((run / "retrieval/small.json").read_text())
    assert [r["query"]["name"] for r in content["rankings"]] == ["query_0", "query_4"]
    for ranking in content["rankings"]:
        assert len(ranking["found"]) == 8 and {entry["kind"] for entry in ranking["found"]} <= {"easy", "hard", "wrong"}
        names = [entry["name"] for entry in ranking["found"]]
        assert f"scene_{ranking['query']['name'][-1]}_4" not in names  # junk
        for entry in [ranking["query"], *ranking["found"]]:
            assert 50 < max(read_image(run / "retrieval" / entry["picture"]).shape) <= instance_recog.THUMBNAIL


def test_whole_queries_differ_and_say_so(run, landmarks):
    boxed = recognise(run, landmarks)
    whole = recognise(run, landmarks, "eval.retrieval.crop_queries=false")
    assert whole["map_easy"]["protocol"] == "whole queries"
    assert whole["map_easy"]["value"] != boxed["map_easy"]["value"]
    scaled = recognise(run, landmarks, "eval.retrieval.scales=[1.0,0.7071]")
    assert scaled["map_easy"]["details"]["scales"] == [1.0, 0.7071]


def test_noise_is_fixed_for_each_image_and_its_seed(landmarks):
    spec = NoiseSpec.parse("gauss50")
    files = ["scene_0_0.png", "scene_1_0.png"]
    root = landmarks / "small/jpg"
    images = instance_recog.Landmarks(root, files, spec, 42, 3)
    alone = instance_recog.Landmarks(root, files[1:], spec, 42, 3)
    other = instance_recog.Landmarks(root, files, spec, 100, 3)

    def read(landmarks, i):
        return landmarks.read(i, ("noisy",))[0]

    assert np.array_equal(read(images, 1), read(alone, 0))  # whatever is in the list
    assert not np.array_equal(read(images, 1), read(other, 1))  # database and queries have seeds of their own
    clean = read_image(root / files[1])
    assert np.array_equal(read(images, 1), keyed_noise(clean, spec, 42, noise_key(files[1])))
    boxed = instance_recog.Landmarks(root, files, spec, 42, 3, boxes=[(10.2, 20.0, 30.5, 40.0), (5, 5, 5, 5)])
    assert np.array_equal(read(boxed, 0), read(images, 0)[20:40, 10:31])
    assert read(boxed, 1).shape == (1, 1, 3)  # an empty box keeps a pixel


def test_denoised_images_come_from_disk(tmp_path, digits, landmarks):
    run = make_run(tmp_path / "n2n", digits, "n2n", epochs=(1,))
    with pytest.raises(ValueError, match="noisy_jpg-gauss50-denoised"):
        recognise(run, landmarks)
    for relative in list_images(landmarks / "small/jpg"):  # a perfect denoiser
        write_image(tmp_path / "denoised" / relative, read_image(landmarks / "small/jpg" / relative))
    denoised = recognise(run, landmarks, f"eval.retrieval.denoised_root={tmp_path}/denoised")
    assert denoised["map_easy"]["view"] == "denoised"
    clean = make_run(tmp_path / "clean", digits, "clean", epochs=(1,))
    assert (
        recognise(clean, landmarks)["map_easy"]["value"] == denoised["map_easy"]["value"]
    )  # the same weights and pixels


def test_distractors_can_only_push_down(run, landmarks, tmp_path):
    without = recognise(run, landmarks)
    database = sorted((landmarks / "small/jpg").iterdir())  # among them the very images that are looked for
    for i, path in enumerate(database):
        (tmp_path / "more").mkdir(exist_ok=True)
        (tmp_path / "more" / f"{i}{path.suffix}").write_bytes(path.read_bytes())
    settings = (f"eval.retrieval.distractors={tmp_path}/more", "eval.batch_size=4")
    with_them = recognise(run, landmarks, *settings)
    assert with_them["map_medium"]["details"]["distractors"] == len(database)
    assert all(with_them[metric]["value"] <= without[metric]["value"] for metric in without)
    assert any(with_them[metric]["value"] < without[metric]["value"] for metric in without)


def test_missing_images_are_all_counted_before_anything_runs(run, landmarks, tmp_path):
    content = pickle.loads((landmarks / "small/gnd_small.pkl").read_bytes())
    content["imlist"] = [f"lost/{name}" if name.endswith("_3") else name for name in content["imlist"]]
    (tmp_path / "small").mkdir()
    (tmp_path / "small/jpg").symlink_to(landmarks / "small/jpg")
    (tmp_path / "small/gnd_small.pkl").write_bytes(pickle.dumps(content))
    cfg = common.load_settings(run, [f"eval.retrieval.root={tmp_path}", "eval.retrieval.sets=[small]"])
    with pytest.raises(ValueError, match=r"lacks 6 of the 35 images .* the first lost/scene_0_3"):
        next(instance_recog.evaluate(None, cfg, common.Job(run, "x")))  # no backbone: it is never asked
    with pytest.raises(ValueError, match="plain|folders"):
        recognise(run, tmp_path, "eval.retrieval.sets=[../small]")


def test_a_diverged_backbone_names_the_image(run, landmarks):
    cfg = common.load_settings(run, [f"eval.retrieval.root={landmarks}", "eval.retrieval.sets=[small]"])
    backbone = load_backbone(run)
    backbone.norm.bias.data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="scene_0_0.png"):
        next(instance_recog.evaluate(backbone, cfg, common.Job(run, "x")))
