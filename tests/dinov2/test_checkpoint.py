"""Checkpoints: what is damaged is named and not used; what was written without checksums still is."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from dinov2 import checkpoint


def state(value: float) -> dict:
    return {"model": {"a": torch.full((300, 40), value), "b": torch.full((3,), value, dtype=torch.bfloat16)}}


def write(run: Path, *iterations: int) -> Path:
    for i in iterations:
        checkpoint.save(run, state(i), i, i // 2, {"backbone.x": torch.full((50, 20), float(i))}, 2, identity="abc")
    return run


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("runs") / "run", 2, 4)


@pytest.fixture
def run(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "run")


def flip(path: Path, rng: random.Random) -> None:
    """One bit of a file, anywhere in it."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_a_checkpoint_says_who_wrote_it_and_is_read_back(run):
    last = checkpoint.latest(run)
    assert (last.iteration, last.epoch, last.evaluate, last.identity) == (4, 2, True, "abc")
    assert set(last.hashes) == {path.name for path in last.path.iterdir()} - {checkpoint.MARK}
    read = checkpoint.load(last, state(0))
    assert all(torch.equal(read["model"][name], value) for name, value in state(4)["model"].items())


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", checkpoint.TEACHER, checkpoint.MARK])
def test_a_flipped_bit_is_noticed_named_and_passed_over(run, capsys, name):
    """Twenty bits in each kind of file, one at a time."""
    rng, folder = random.Random(0), run / "checkpoints" / "iter_0000000004"
    whole = (folder / name).read_bytes()
    for _ in range(20):
        checkpoint._warn.cache_clear()
        flip(folder / name, rng)
        assert checkpoint.latest(run).iteration == 2
        assert str(folder / name) in capsys.readouterr().err
        if name != checkpoint.MARK:
            with pytest.raises(ValueError, match=rf"{name} is damaged"):
                checkpoint.load(checkpoint.list_checkpoints(run)[-1], state(0))
        if name == checkpoint.TEACHER:
            with pytest.raises(ValueError, match=rf"{name} is damaged.*; remove .*iter_0000000004 and train on"):
                checkpoint.load_tensors(folder / name)
        (folder / name).write_bytes(whole)
    assert checkpoint.latest(run).iteration == 4


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"3", b"\xff\xfe{}", b"{}", b'{"iteration": 4}', b"[" * 100_000, b'{"files": [1]}', b"{'a"],
    ids=range(10),
)
def test_a_mark_that_is_none(run, capsys, content):
    mark = run / "checkpoints" / "iter_0000000004" / checkpoint.MARK
    mark.write_bytes(content)
    checkpoint._warn.cache_clear()
    assert checkpoint.latest(run).iteration == 2
    assert f"{mark} is damaged" in capsys.readouterr().err


def test_a_mark_of_another_folder(run, capsys):
    last = run / "checkpoints" / "iter_0000000004"
    last.rename(last.with_name("iter_0000000009"))
    assert checkpoint.latest(run).iteration == 2
    assert "COMPLETE is of iteration 4; this checkpoint is not used" in capsys.readouterr().err


def test_one_written_without_checksums_is_read_and_that_is_said_once(run, capsys):
    last = run / "checkpoints" / "iter_0000000004"
    mark = json.loads((last / checkpoint.MARK).read_text())
    old = {name: mark[name] for name in ("iteration", "epoch", "evaluate", "files")}
    (last / checkpoint.MARK).write_text(json.dumps(old))
    for _ in range(2):
        found = checkpoint.latest(run)
        checkpoint.load(found, state(0))
    assert (found.iteration, found.identity) == (4, "")
    assert capsys.readouterr().err.count("iter_0000000004 was written without checksums") == 1
    description = last / ".metadata"
    description.write_bytes(description.read_bytes()[:-20] + b"." * 20)
    assert checkpoint.latest(run).iteration == 2
    assert ".metadata" in capsys.readouterr().err


def test_nothing_but_tensors_is_written(run, tmp_path):
    from dinov2.dcp_reader import read_description

    items = read_description(checkpoint.latest(run).path).state_dict_metadata
    assert items and all(hasattr(item, "size") for item in items.values())


def test_the_newest_stays_though_none_is_to_be_kept(tmp_path):
    """It may be the position that a SIGTERM has saved."""
    tensors, there = {"x": torch.zeros(1)}, []
    for iteration, teacher in ((1, None), (2, None), (3, tensors)):
        checkpoint.save(tmp_path, tensors, iteration, 0, teacher, keep_last=0)
        there.append([c.iteration for c in checkpoint.list_checkpoints(tmp_path)])
    assert there == [[1], [2], [3]]


def test_leftovers_are_swept(run):
    for name in (".iter_0000000006.tmp", ".iter_0000000001.removed"):
        (run / "checkpoints" / name / "x").mkdir(parents=True)
    checkpoint.sweep(run)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"iter_0000000002", "iter_0000000004"}
