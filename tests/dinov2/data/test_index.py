"""The list of images, its cache, and folders that make no data set."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinov2.data import index as module
from dinov2.data.index import build_index, check_classes
from dinov2.data.splits import Layout
from tests.conftest import ROOT
from tests.dinov2.data.trees import make_tree


def walks(monkeypatch):
    """Counts how often folders are listed."""
    calls = []
    real = module.list_images
    monkeypatch.setattr(module, "list_images", lambda *given: calls.append(given) or real(*given))
    return calls


def test_classes_are_sorted_folders(tmp_path):
    root = make_tree(tmp_path / "data", classes=("wasp", "ant", "bee"), count=2)
    (root / "train" / "bee" / "more").mkdir()
    os.rename(root / "train" / "bee" / "1.png", root / "train" / "bee" / "more" / "1.png")
    (root / "train" / "bee" / "notes.txt").write_text("not an image")
    index = build_index(root, "train")
    assert index.classes == ["ant", "bee", "wasp"]
    names = ["ant/0.png", "ant/1.png", "bee/0.png", "bee/more/1.png", "wasp/0.png", "wasp/1.png"]
    assert index.relatives == [f"train/{name}" for name in names]
    assert index.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_images_without_class_folders_have_no_labels(tmp_path):
    root = make_tree(tmp_path / "data", classes=("",), splits=("train",), count=4)
    index = build_index(root, "train")
    assert index.relatives == [f"train/{k}.png" for k in range(4)]
    assert index.classes == [] and index.labels.tolist() == [-1] * 4


@pytest.mark.parametrize("change", ["add", "remove", "rename", "class", "inner"])
def test_the_cache_is_used_until_the_tree_changes(tmp_path, monkeypatch, change):
    root = make_tree(tmp_path / "data")
    folder = root / "train" / "ant"
    (folder / "deep").mkdir()
    os.rename(folder / "2.png", folder / "deep" / "2.png")
    first = build_index(root, "train")
    calls = walks(monkeypatch)
    again = build_index(root, "train")
    assert not calls and again.relatives == first.relatives and (again.labels == first.labels).all()
    assert again.classes == first.classes
    if change == "add":
        os.link(folder / "0.png", folder / "9.png")
    elif change == "remove":
        (folder / "0.png").unlink()
    elif change == "rename":
        os.rename(folder / "0.png", folder / "8.png")
    elif change == "inner":
        os.link(folder / "0.png", folder / "deep" / "9.png")
    else:
        (root / "train" / "cow").mkdir()
        os.link(folder / "0.png", root / "train" / "cow" / "0.png")
    changed = build_index(root, "train")
    assert calls
    expected = sorted(path.relative_to(root).as_posix() for path in (root / "train").rglob("*.png"))
    assert changed.relatives == expected != first.relatives


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}', '{"version": 99, "times": {}}', "null"])
def test_a_broken_cache_is_rebuilt(tmp_path, content):
    root = make_tree(tmp_path / "data")
    first = build_index(root, "train")
    cache = root / ".index-train.json"
    assert cache.is_file()
    cache.write_text(content)
    assert build_index(root, "train").relatives == first.relatives
    assert json.loads(cache.read_text())["split"] == "train"


def test_a_read_only_data_folder_uses_the_users_cache(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "data")
    (root / ".index-train.json").mkdir()  # as good as read-only, also for the superuser
    home = tmp_path / "home"
    monkeypatch.setattr(Path, "home", lambda: home)
    first = build_index(root, "train")
    (cached,) = (home / ".cache").rglob("*.json")
    calls = walks(monkeypatch)
    assert build_index(root, "train").relatives == first.relatives and not calls
    # Another tree of the same name has its own list.
    other = make_tree(tmp_path / "elsewhere" / "data", classes=("cow", "dog"))
    (other / ".index-train.json").mkdir()
    assert build_index(other, "train").classes == ["cow", "dog"]
    # And with no place to write to at all, the index is built all the same.
    monkeypatch.setattr(Path, "home", lambda: cached)
    assert build_index(make_tree(tmp_path / "third"), "train").classes == ["ant", "bee"]


def test_pages_that_a_file_was_given_in_place_are_seen(tmp_path, monkeypatch):
    """The folder's time stays as it was."""
    stack, layout = tmp_path / "data/train/scan.npy", Layout(stack="pages")
    stack.parent.mkdir(parents=True)
    for pages in (3, 5):
        np.save(stack, np.zeros((pages, 8, 8), np.uint8))
        os.utime(stack, (pages, pages))
        names = [f"train/scan#000{page}.npy" for page in range(pages)]
        assert build_index(tmp_path / "data", "train", layout=layout).relatives == names
    calls = walks(monkeypatch)
    assert len(build_index(tmp_path / "data", "train", layout=layout).relatives) == 5 and not calls


def test_files_are_opened_once_for_their_channels(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    for channels in (2, 5):
        np.save(tmp_path / f"train/{channels}.npy", np.zeros((8, 8, channels), np.uint8))
    opened, real = [], module.of_channels
    monkeypatch.setattr(module, "of_channels", lambda *given: opened.append(given) or real(*given))
    for _ in range(2):
        assert build_index(tmp_path, "train", layout=Layout(only=5)).relatives == ["train/5.npy"]
    assert len(opened) == 1


def test_a_configured_cache_folder(tmp_path):
    root = make_tree(tmp_path / "data")
    build_index(root, "train", tmp_path / "lists")
    build_index(root, "val", tmp_path / "lists")
    assert len(list((tmp_path / "lists").iterdir())) == 2
    assert not list(root.glob(".index*"))


def test_trees_that_make_no_data_set_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*train"):
        build_index(tmp_path / "nowhere", "train")
    root = make_tree(tmp_path / "data")
    with pytest.raises(ValueError, match="'test'"):
        build_index(root, "test")
    (root / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match="train/cow holds no images"):
        build_index(root, "train")
    (root / "train" / "cow").rmdir()
    os.link(root / "train" / "ant" / "0.png", root / "train" / "stray.png")
    with pytest.raises(ValueError, match="stray.png lies beside class folders"):
        build_index(root, "train")
    (root / "train" / "stray.png").unlink()
    os.link(root / "train" / "ant" / "0.png", root / "train" / "ant" / "0.jpg")
    with pytest.raises(ValueError, match="0.jpg and train/ant/0.png"):
        build_index(root, "train")
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="train holds no images"):
        build_index(empty, "train")


def test_classes_that_differ_are_named(tmp_path):
    root = make_tree(tmp_path / "data")
    check_classes(root)
    os.rename(root / "val" / "bee", root / "val" / "cow")
    with pytest.raises(ValueError, match="only in train: bee; only in val: cow"):
        check_classes(root)


def run_tool(*arguments, cwd):
    command = [sys.executable, str(ROOT / "process_metadata.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_process_metadata(tmp_path):
    make_tree(tmp_path / "mini-imagenet")
    make_tree(tmp_path / "noisy_mini-imagenet-shot3", splits=("train",))
    (tmp_path / "mini-imagenet.tar.gz").write_bytes(b"what the images came in")
    result = run_tool(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "mini-imagenet/train: 6 images, 2 classes",
        "mini-imagenet/val: 6 images, 2 classes",
        "noisy_mini-imagenet-shot3/train: 6 images, 2 classes",
    ]
    assert (tmp_path / "mini-imagenet" / ".index-val.json").is_file()
    result = run_tool("nothing", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith("error: nothing") and "Traceback" not in result.stderr
    (tmp_path / "mini-imagenet" / "val" / "bee" / "deeper").mkdir()
    os.rename(tmp_path / "mini-imagenet" / "val" / "ant", tmp_path / "mini-imagenet" / "val" / "eel")
    result = run_tool("mini-imagenet", cwd=tmp_path)
    assert result.returncode == 2 and "only in val: eel" in result.stderr


def test_an_image_added_to_a_folder_that_was_empty_is_seen(tmp_path):
    root = make_tree(tmp_path / "data", classes=("ant",), splits=("train",), count=2)
    (root / "train/ant/more").mkdir()
    assert len(build_index(root, "train").relatives) == 2
    shutil.copy(root / "train/ant/0.png", root / "train/ant/more/2.png")
    assert build_index(root, "train").relatives[-1] == "train/ant/more/2.png"


@pytest.mark.parametrize(
    "groups",
    [
        {"ant": ["0.png", "../../../secret.png"]},
        {"ant": ["0.png"], "invented": ["0.png"]},
        {"../../other": ["0.png"]},
        {"ant": ["/etc/0.png"]},
        {"": ["ant/0.png"]},
        {"ant": [7]},
        {},
        [],
    ],
)
def test_a_cache_that_names_other_places_or_classes_is_not_used(tmp_path, groups):
    root = make_tree(tmp_path / "data", classes=("ant",), splits=("train",), count=2)
    build_index(root, "train")
    cache = root / ".index-train.json"
    cache.write_text(json.dumps(json.loads(cache.read_text()) | {"groups": groups}))
    index = build_index(root, "train")
    assert index.relatives == ["train/ant/0.png", "train/ant/1.png"] and index.classes == ["ant"]


def test_a_cache_of_another_split_or_without_end_is_not_used(tmp_path):
    root = make_tree(tmp_path / "data", classes=("ant",), count=2)
    build_index(root, "train"), build_index(root, "val")
    shutil.copy(root / ".index-val.json", root / ".index-train.json")
    assert build_index(root, "train").relatives == ["train/ant/0.png", "train/ant/1.png"]
    (root / ".index-train.json").write_text("[" * 100_000)
    assert build_index(root, "train").relatives == ["train/ant/0.png", "train/ant/1.png"]
