"""Torch files: damage anywhere in the tensors is noticed, and nothing but tensors is read."""

import random
import zipfile

import pytest
import torch

from utils.tensor_files import load_tensors


def test_a_flipped_bit_is_noticed_or_without_consequence(tmp_path):
    """Bytes between the archive's parts (padding, times) have no checksum: there the tensors must come out the same."""
    content = {"a": torch.arange(2000.0), "step": 3}
    path, rng = tmp_path / "file.pth", random.Random(0)
    torch.save(content, path)
    whole, noticed = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            read = load_tensors(path)
        except ValueError as error:
            assert "file.pth can't be read as a torch file" in str(error) or "holds more than weights" in str(error)
            noticed += 1
        else:
            assert torch.equal(read["a"], content["a"]) and read["step"] == 3
    assert noticed > 170


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_cut_files(tmp_path, share):
    torch.save({"a": torch.zeros(2000)}, tmp_path / "file.pth")
    whole = (tmp_path / "file.pth").read_bytes()
    (tmp_path / "file.pth").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"file\.pth can't be read as a torch file"):
        load_tensors(tmp_path / "file.pth")


def test_files_of_the_form_before_1_6(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    assert torch.equal(load_tensors(tmp_path / "old.pth")["a"], torch.ones(3))
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_tensors(tmp_path / "none.pth")
