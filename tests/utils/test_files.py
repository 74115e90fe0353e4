"""atomic_path: a file or a folder takes its place whole, or leaves what was there."""

import pytest

from utils.files import atomic_path


def test_a_file_and_a_folder_take_their_place_whole(tmp_path):
    (tmp_path / "file").write_text("old")
    for name in ("file", "folder"):
        with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / name) as temporary:
            if name == "folder":
                (temporary / "a/b").mkdir(parents=True)
            else:
                temporary.write_text("half")
            raise KeyboardInterrupt
        assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"
    with atomic_path(tmp_path / "file") as temporary:
        temporary.write_text("new")
    with atomic_path(tmp_path / "folder") as temporary:
        (temporary / "a").mkdir(parents=True)
    assert (tmp_path / "file").read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file", "folder"]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())
