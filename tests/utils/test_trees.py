"""Trees in work: claimed, taken up again, finished, and what is refused."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from utils import images
from utils.images import write_image
from utils.noise import NoiseSpec
from utils.trees import BACKLOG, TreeWriter, check_apart
from utils.workers import InProcess

COLOUR = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
FIELDS = {"noise": "gauss50", "noise_seed": 0}
NAMES = ["a/x.jpg", "a/y.jpg"]


def writer(root: Path, names=NAMES, **fields) -> TreeWriter:
    for name in names:
        path = root.parent / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return TreeWriter(root.parent / "source", root, names, FIELDS | fields, "png")


def test_a_tree_is_claimed_finished_and_reopened(tmp_path, capsys):
    root = tmp_path / "tree"
    first = writer(root)
    assert not root.exists() and first.missing == set(NAMES)
    assert first.begin() and images.read_manifest(root) is None
    first.write(InProcess(), "a/x.jpg", COLOUR)
    first.wait()
    (root / "a/.y.png.tmp-12").write_bytes(b"left by a killed run")
    assert first.finish() == 1 and images.read_manifest(root) is None
    with pytest.raises(ValueError, match="source lacks.*a/x.png"):
        writer(root, ["a/y.jpg"])
    second = writer(root)
    assert second.missing == {"a/y.jpg"} and second.begin()
    second.write(InProcess(), "a/y.jpg", COLOUR)
    second.wait()
    assert second.finish() == 0 and images.read_manifest(root) == FIELDS | second.files | {"count": 2}
    assert sorted(path.name for path in root.rglob("*")) == ["a", "manifest.json", "x.png", "y.png"]
    assert not writer(root).begin() and "finished already: 2 images" in capsys.readouterr().out
    with pytest.raises(ValueError, match="noise_seed 0, not 1"):
        writer(root, noise_seed=1)
    with pytest.raises(ValueError, match=r"values 'full', not 'range=\[0,9\]'"):
        writer(root, values="range=[0,9]")
    more = writer(root, [*NAMES, "b.jpg"])
    assert images.read_manifest(root)["count"] == 2 and more.begin()
    assert images.read_manifest(root) is None and images.read_manifest(root, images.BEGUN) == FIELDS
    assert more.finish() == 1


@pytest.mark.parametrize(("changed", "renewed"), [(900, True), (1100, False)])
def test_the_mark_of_a_finished_tree_says_when_its_source_was_looked_at(tmp_path, changed, renewed):
    """A training refuses a tree that is older than its source's folders: other files there must be no dead end."""
    first = writer(tmp_path / "tree")
    first.begin()
    for name in NAMES:
        first.write(InProcess(), name, COLOUR)
    first.wait()
    assert first.finish() == 0
    mark = tmp_path / "tree/manifest.json"
    os.utime(mark, (1000, 1000))
    for name, time in zip(NAMES, (900, changed), strict=True):
        os.utime(tmp_path / "source" / name, (time, time))
    assert not TreeWriter(tmp_path / "source", tmp_path / "tree", NAMES, FIELDS, "png").begin()
    assert (mark.stat().st_mtime > 1000) == renewed


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_kill_between_two_marks_loses_no_tree(tmp_path, monkeypatch):
    """Whatever begin() and finish() had done before the kill, the next run takes the tree up."""
    root = tmp_path / "tree"
    done = writer(root)
    done.begin()
    for name in NAMES:
        done.write(InProcess(), name, COLOUR)
    for step in (done.finish, writer(root, [*NAMES, "b.jpg"]).begin):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", interrupted)
            with pytest.raises(KeyboardInterrupt):
                step()
        assert writer(root).missing == set()
    assert writer(root).finish() == 0


def test_a_tree_that_was_killed_while_it_was_marked_is_finished_by_the_next_run(tmp_path):
    tree = writer(tmp_path / "tree", ["x.jpg"])
    tree.begin()
    tree.write(InProcess(), "x.jpg", COLOUR)
    begun = (tmp_path / "tree" / images.BEGUN).read_text()
    assert tree.finish() == 0
    (tmp_path / "tree" / images.BEGUN).write_text(begun)  # its removal is the last step
    with pytest.raises(ValueError, match="is not finished; run the command that writes it once more"):
        images.describe_source(tmp_path / "tree", NoiseSpec.parse("none"), 0)
    again = writer(tmp_path / "tree", ["x.jpg"])
    with again.at_work() as begun:
        assert begun and again.finish() == 0
    assert images.describe_source(tmp_path / "tree", NoiseSpec.parse("none"), 0)["noise"] == "gauss50"
    with writer(tmp_path / "tree", ["x.jpg"]).at_work() as begun:
        assert not begun


def test_what_a_worker_raises_is_raised_and_little_waits(tmp_path, monkeypatch):
    tree = writer(tmp_path / "tree", [f"{k}.jpg" for k in range(2 * BACKLOG)])
    tree.begin()
    monkeypatch.setattr(images, "write_image", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        for name in tree.relatives:
            tree.write(InProcess(), name, COLOUR)
    assert len(tree._writing) == BACKLOG
    with pytest.raises(OSError, match="full"):
        tree.wait()


def test_foreign_folders_and_broken_manifests_are_refused(tmp_path):
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos/x.png", COLOUR)
    with pytest.raises(ValueError, match="photos exists and was not made by this tool"):
        writer(tmp_path / "photos")
    (tmp_path / "tree").mkdir()
    for content in ("{", "[]", "\xff"):
        (tmp_path / "tree/manifest.json").write_bytes(content.encode("latin1"))
        with pytest.raises(ValueError, match="is no manifest"):
            writer(tmp_path / "tree")


def test_trees_inside_each_other_are_refused(tmp_path):
    check_apart(tmp_path / "a", tmp_path / "ab")
    for source, target in (("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "b/../a")):
        with pytest.raises(ValueError, match="separate"):
            check_apart(tmp_path / source, tmp_path / target)


def test_a_tree_of_scaled_values_is_none_of_values_as_they_are(tmp_path):
    """A manifest names no values where they are "full"."""
    writer(tmp_path / "tree", values="range=[0,9]").begin()
    with pytest.raises(ValueError, match=r"was made with values 'range=\[0,9\]', not 'full'; remove it"):
        writer(tmp_path / "tree")
