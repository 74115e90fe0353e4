"""Folders without train and val, and labels from a CSV: what becomes train, what val, which class, what is refused."""

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.config import load_config
from dinov2.data import index as module
from dinov2.data.dataset import dataset_from_config
from dinov2.data.index import build_index
from dinov2.data.splits import Layout, assign
from dinov2.eval import common, knn
from dinov2.eval.features import labelled_dataset
from dinov2.train.__main__ import main as pretrain
from tests.dinov2.train.tiny import settings


def make_files(root: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), number % 256, np.uint8)).save(root / name)
    return root


def flat(root: Path, count: int = 20) -> Path:
    return make_files(root, [f"{number:03}.png" for number in range(count)])


def both(root: Path, layout: Layout, cache: Path):
    return [build_index(root, split, cache, layout) for split in ("train", "val")]


def test_a_flat_folder_is_all_train(tmp_path):
    root = make_files(flat(tmp_path / "set", 5), ["deep/er/x.png"])
    index = build_index(root, "train", tmp_path / "lists")
    assert index.relatives == [f"{number:03}.png" for number in range(5)] + ["deep/er/x.png"]
    assert index.classes == [] and set(index.labels) == {-1}
    with pytest.raises(ValueError, match="set has no val images: give data.val=0.1"):
        build_index(root, "val", tmp_path / "lists")


def test_folders_below_are_the_classes(tmp_path):
    root = make_files(tmp_path / "set", [f"{name}/{n}.png" for name in ("wasp", "ant") for n in range(10)])
    train, val = both(root, Layout(val=0.2), tmp_path)
    assert train.classes == val.classes == ["ant", "wasp"]
    assert Counter(val.labels.tolist()) == {0: 2, 1: 2} and Counter(train.labels.tolist()) == {0: 8, 1: 8}
    assert all(path.startswith(train.classes[label]) for path, label in zip(val.relatives, val.labels, strict=True))
    one = make_files(tmp_path / "one", ["all/1.png", "all/2.png"])
    assert build_index(one, "train", tmp_path).classes == []


@pytest.mark.parametrize("share,count", [(0.1, 2), (0.5, 10), (0.01, None), (0.99, 19)])
def test_a_share_is_drawn_once(tmp_path, share, count):
    root = flat(tmp_path / "set")
    if count is None:
        with pytest.raises(ValueError, match="data.val=0.01 of 20 images leaves a split of .*set empty"):
            build_index(root, "val", tmp_path, Layout(share))
        return
    train, val = both(root, Layout(share), tmp_path)
    assert len(val.relatives) == count and sorted(train.relatives + val.relatives) == [f"{n:03}.png" for n in range(20)]
    assert both(root, Layout(share), tmp_path)[1].relatives == val.relatives
    assert share == 0.99 or both(root, Layout(share, seed=1), tmp_path)[1].relatives != val.relatives
    make_files(root, ["new.png"])
    assert len(set(build_index(root, "val", tmp_path, Layout(share)).relatives) ^ set(val.relatives)) <= 2


def test_two_images_and_one(tmp_path):
    train, val = both(flat(tmp_path / "two", 2), Layout(0.5), tmp_path)
    assert len(train.relatives) == len(val.relatives) == 1
    with pytest.raises(ValueError, match="of 1 images leaves a split"):
        build_index(flat(tmp_path / "one", 1), "train", tmp_path, Layout(0.5))


def test_val_of_many_classes_is_drawn_in_one_pass_over_the_images(tmp_path):
    names = [f"{number % 5000:04}/{number}.png" for number in range(50_000)]
    start = time.process_time()
    splits, labels, _ = assign(tmp_path, names, Layout(val=0.1))
    assert time.process_time() - start < 2, "a pass for each class takes four times as long"
    drawn = Counter(label for label, split in zip(labels.tolist(), splits, strict=True) if split == "val")
    assert drawn == dict.fromkeys(range(5000), 1)


def test_groups_are_not_torn_apart(tmp_path):
    names = [f"p{patient}/scan_{n}.png" for patient in range(10) for n in range(1 + patient % 3)]
    root = make_files(tmp_path / "set", names)
    for group in ("folder", r"p(\d+)", "p[0-9]"):
        train, val = both(root, Layout(0.3, group), tmp_path)
        patients = [{path.split("/")[0] for path in part.relatives} for part in (train, val)]
        assert not patients[0] & patients[1] and 4 <= len(val.relatives) <= 7
        assert (train.classes == []) == (group == "folder")
    with pytest.raises(ValueError, match="data.group=x.* gives no name for 19 images, such as .*p0/scan_0.png"):
        build_index(root, "train", tmp_path, Layout(0.3, r"x\d"))
    with pytest.raises(ValueError, match=r"data.group=\( is no column of the CSV, no regular expression"):
        build_index(root, "train", tmp_path, Layout(0.3, "("))


def test_patients_as_folders_of_train_and_val(tmp_path):
    """Different folders below train and val are refused as classes; as groups they are what they should be."""
    root = make_files(tmp_path / "set", ["train/p1/a.png", "train/p2/b.png", "val/p3/c.png"])
    train, val = both(root, Layout(group="folder"), tmp_path)
    assert train.relatives == ["train/p1/a.png", "train/p2/b.png"] and val.relatives == ["val/p3/c.png"]
    assert train.classes == [] and val.labels.tolist() == [-1]
    make_files(root, ["val/p2/d.png"])
    with pytest.raises(ValueError, match="1 groups have images in train and in val, such as p2"):
        build_index(root, "train", tmp_path, Layout(group="folder"))
    with pytest.raises(ValueError, match="data.val=0.2, but .*set has a val folder"):
        build_index(root, "train", tmp_path, Layout(0.2))


def test_a_train_folder_alone_is_divided(tmp_path):
    root = make_files(tmp_path / "set", [f"train/{name}/{n}.png" for name in "ab" for n in range(10)])
    train, val = both(root, Layout(0.3), tmp_path)
    assert len(train.relatives) == 14 and val.classes == ["a", "b"] and val.relatives[0].startswith("train/a/")


def labels_of(root: Path, text: str, **layout):
    (root / "labels.csv").write_text(text)
    return both(root, Layout(labels="labels.csv", **layout), root.parent)


def test_a_csv_names_labels_and_splits(tmp_path):
    root = flat(tmp_path / "set", 6)
    train, val = labels_of(
        root, "\ufeffpath, label, split, who\n000.png, cat, train, x\n001.png,dog,val,y\n002.png,,train,x\n"
        "./003.png,cat,,x\n",
    )  # fmt: skip
    assert val.relatives == ["001.png"] and val.labels.tolist() == [1] and val.classes == ["cat", "dog"]
    assert train.relatives == ["000.png", "002.png", "003.png", "004.png", "005.png"]
    assert train.labels.tolist() == [0, -1, 0, -1, -1]
    table = "path,label,who\n" + "".join(f"00{n}.png,{'ab'[n % 2]},{n // 2}\n" for n in range(6))
    train, val = labels_of(root, table, val=0.34, group="who")
    assert len(val.relatives) == 2 and int(val.relatives[0][2]) // 2 == int(val.relatives[1][2]) // 2
    with pytest.raises(ValueError, match="gives no name for 6 images"):
        labels_of(root, table, val=0.34, group="whom")


@pytest.mark.parametrize("text,reason", [
    ("000.png,a\n", "must begin with the line path,label"),
    ("path,label\n", "must begin with the line path,label"),
    ("path,label\n000.png,a\n9.png,b\n8.png,b\n", "names 2 images that .*set lacks, such as 9.png, 8.png"),
    ("path,label\n000.png,a\n./000.png,b\n", "line 3: 000.png stands there twice"),
    ("path,label,split\n000.png,a,test\n", "line 2: split 'test' is neither train nor val"),
    ("path,label\n000.png\n", "line 2: it has not as many columns"),
    ("path,label,split,who\n000.png,a,train,x\n001.png,a,val,x\n", "no name|1 groups have images in train and in val"),
])  # fmt: skip
def test_bad_csvs_are_named(tmp_path, text, reason):
    layout = {"group": "who"} if "who" in text else {}
    with pytest.raises(ValueError, match=reason):
        labels_of(flat(tmp_path / "set", 2), text, **layout)
    with pytest.raises(ValueError, match="data.labels=none.csv cannot be read"):
        build_index(tmp_path / "set", "train", tmp_path, Layout(labels="none.csv"))
    with pytest.raises(ValueError, match="has a column split: leave one"):
        labels_of(tmp_path / "set", "path,label,split\n000.png,a,val\n", val=0.5)


def test_the_flat_list_is_cached_until_the_folder_changes(tmp_path, monkeypatch):
    root = make_files(flat(tmp_path / "set", 3), ["deep/x.png"])
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    first = build_index(root, "train")
    assert list((tmp_path / "home/.cache").rglob("*.json")) and not list(root.glob(".*"))
    calls, real = [], module.list_images
    monkeypatch.setattr(module, "list_images", lambda *given: calls.append(given) or real(*given))
    assert build_index(root, "train").relatives == first.relatives and not calls
    for name in ("new.png", "deep/y.png"):
        make_files(root, [name])
        assert name in build_index(root, "train").relatives and calls
        calls.clear()


def test_a_flat_folder_is_pretrained_and_evaluated(tmp_path):
    """The keys on the command line: a flat folder, labels of some images in a CSV, a tenth for val."""
    root = flat(tmp_path / "set", 24)
    rows = [f"{n:03}.png,{'low' if n < 12 else 'high'}\n" for n in range(24) if n % 5]
    (root / "labels.csv").write_text("path,label\n" + "".join(rows))
    more = ["data.labels=labels.csv", "data.val=0.3", f"data.index_cache={tmp_path}", "train.epochs=1", "noise=none",
            "train.eval_every=1", "eval.knn.k=[2]"]  # fmt: skip
    words = settings(root, tmp_path / "run", *more)
    pretrain(words)
    cfg = load_config(words)
    assert len(dataset_from_config(cfg, "train")) + len(dataset_from_config(cfg, "val")) == 24
    assert sum(len(labelled_dataset(cfg, split)) for split in ("train", "val")) == len(rows) == 19
    assert common.run("knn", knn.evaluate, "", lambda cfg: [cfg], [f"run={tmp_path / 'run'}"]) == 0
    with pytest.raises(ValueError, match="data.val=1.5 must lie in \\(0, 1\\)"):
        load_config([*words, "data.val=1.5"])
