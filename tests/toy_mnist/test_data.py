"""Reading MNIST: plain and gzipped files, every kind of bad input, and what happens without a network."""

import gzip
import socket
from urllib.error import URLError

import numpy as np
import pytest
import torch

from tests.toy_mnist.conftest import bars, idx_bytes, write_mnist
from toy_mnist import data
from toy_mnist.data import FILES, enlarged_digits, load_digits_or_mnist, read_idx, read_mnist


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 300, text
    return text


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", ["", "raw", "MNIST/raw"])
def test_reads_plain_and_gzipped_files_wherever_torchvision_puts_them(tmp_path, zipped, below):
    write_mnist(tmp_path / below, train=20, test=10, zipped=zipped)
    digits = read_mnist(tmp_path)
    images, labels = bars(20, 0)
    assert digits.name == "mnist"
    assert digits.train_images.dtype == torch.uint8 and np.array_equal(digits.train_images.numpy(), images)
    assert digits.train_labels.dtype == torch.int64 and np.array_equal(digits.train_labels.numpy(), labels)
    assert digits.test_images.shape == (10, 28, 28) and digits.test_labels.shape == (10,)


@pytest.mark.parametrize("cut", [0, 3, 10, 500])
def test_truncated_plain_file(mnist_folder, cut):
    path = mnist_folder / FILES[0]
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="truncated|not an idx file") as error:
        read_mnist(mnist_folder)
    assert str(path) in one_sentence(error)


def test_file_with_bytes_after_its_end(mnist_folder):
    path = mnist_folder / FILES[1]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="513 bytes follow its header where 512 were announced") as error:
        read_mnist(mnist_folder)
    one_sentence(error)


@pytest.mark.parametrize("damage", ["cut", "not gzip", "flipped"])
def test_damaged_gzip_file(tmp_path, damage):
    content = gzip.compress(idx_bytes(bars(50, 0)[0]))
    middle = len(content) // 2
    flipped = content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 40]) + content[middle + 40 :]
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes({"cut": content[:middle], "not gzip": b"<html>moved</html>", "flipped": flipped}[damage])
    with pytest.raises(ValueError, match="damaged gzip file") as error:
        read_idx(path, 3)
    assert str(path) in one_sentence(error)


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04" * 20, b"", idx_bytes(bars(5, 0)[1]), b"\0\0\x0d\x03" + idx_bytes(bars(5, 0)[0])[4:]],
    ids=["zip", "empty", "labels", "floats"],
)
def test_foreign_file(tmp_path, content):
    path = tmp_path / FILES[0]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not an idx file of 3-dimensional bytes") as error:
        read_idx(path, 3)
    one_sentence(error)


def test_header_that_announces_more_than_memory_holds(tmp_path):
    path = tmp_path / FILES[0]
    path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12 + b"abc")
    with pytest.raises(ValueError, match="3 bytes follow its header"):
        read_idx(path, 3)


def test_images_and_labels_of_different_lengths(mnist_folder):
    (mnist_folder / FILES[3]).write_bytes(idx_bytes(bars(99, 0)[1]))
    with pytest.raises(ValueError, match="100 t10k images, 99 t10k labels") as error:
        read_mnist(mnist_folder)
    one_sentence(error)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (FILES[0], np.zeros((512, 32, 32), np.uint8), "512 x 32 x 32"),
        (FILES[0], np.zeros((0, 28, 28), np.uint8), "0 x 28 x 28"),
        (FILES[1], np.full(512, 11, np.uint8), "labels go up to 11"),
    ],
)
def test_idx_files_of_another_data_set(mnist_folder, file, array, message):
    (mnist_folder / file).write_bytes(idx_bytes(array))
    with pytest.raises(ValueError, match=message) as error:
        read_mnist(mnist_folder)
    one_sentence(error)


def test_folder_without_mnist(mnist_folder, tmp_path):
    (mnist_folder / FILES[2]).unlink()
    with pytest.raises(ValueError, match=f"{FILES[2]}.* is missing") as error:
        load_digits_or_mnist(str(mnist_folder))
    one_sentence(error)
    with pytest.raises(ValueError, match="is not a folder") as error:
        load_digits_or_mnist(str(tmp_path / "nowhere"))
    one_sentence(error)


@pytest.mark.parametrize("failure", [URLError("no route"), RuntimeError("Error downloading\nall"), TimeoutError()])
def test_without_network_the_digits_stand_in_and_it_is_said(tmp_path, monkeypatch, capsys, failure):
    def fail(*args, **kwargs):
        raise failure

    monkeypatch.setattr("torchvision.datasets.MNIST", fail)
    timeout = socket.getdefaulttimeout()
    digits = load_digits_or_mnist(None, cache=tmp_path)
    warning = capsys.readouterr().err
    assert digits.name == "digits"
    assert warning.startswith("WARNING: THE FIGURES BELOW ARE NOT MNIST'S") and warning.count("\n") == 1
    assert "--data" in warning and socket.getdefaulttimeout() == timeout


def test_download_lands_in_the_cache_and_is_read(tmp_path, monkeypatch):
    def fake(root, download):
        assert download
        write_mnist(tmp_path / "MNIST" / "raw", train=30, test=10, zipped=True)

    monkeypatch.setattr("torchvision.datasets.MNIST", fake)
    assert len(load_digits_or_mnist(None, cache=tmp_path).train_images) == 30


def test_mnist_in_the_cache_needs_no_download(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist", train=30, test=10)
    monkeypatch.setattr(data, "download", lambda cache: pytest.fail("downloaded"))
    assert len(load_digits_or_mnist(None, cache=tmp_path).train_images) == 30


def test_enlarged_digits_are_a_split_of_28_pixel_images():
    digits = enlarged_digits()
    assert digits.train_images.shape[1:] == (28, 28) and digits.train_images.dtype == torch.uint8
    assert len(digits.test_images) == 360 and digits.train_images.max() == 255
    assert 55_000 < len(digits.train_images) == len(digits.train_labels) <= 60_000  # as many steps as MNIST
    unique = {image.numpy().tobytes() for image in digits.train_images[:1437]}
    assert len(unique) == 1437 and not any(image.numpy().tobytes() in unique for image in digits.test_images)
