"""Stacks, and files of the fields' own formats, written by their real libraries; EXIF's orientation."""

import json
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov2.data.index import build_index
from dinov2.data.splits import Layout
from Neighbor2Neighbor import denoise
from utils import readers
from utils.images import ImageError, image_size, list_images, read_image, read_manifest, stored_values
from utils.values import Values, resolve

STACK = np.random.default_rng(0).integers(-900, 3000, (3, 10, 12)).astype(np.int16)


def write_dicom(path: Path, array: np.ndarray) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = array.shape[-2:]
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.RescaleSlope, file.RescaleIntercept = "1", "-1024"
    if array.ndim == 3:
        file.NumberOfFrames = len(array)
    file.PixelData = (array.astype(np.int32) + 1024).astype(np.uint16).tobytes()
    pydicom.dcmwrite(path, file, enforce_file_format=True)


def write_fits(path: Path, array: np.ndarray) -> None:
    fits = pytest.importorskip("astropy.io.fits")
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(array.astype(np.float32))]).writeto(path)


def write_nifti(path: Path, array: np.ndarray) -> None:
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)


def write_tiff(path: Path, array: np.ndarray) -> None:
    tifffile.imwrite(path, array, **({"imagej": True, "metadata": {"axes": "ZYX"}} if array.ndim == 3 else {}))


def write_ome(path: Path, array: np.ndarray) -> None:
    """Two channels a page: the array and its negative."""
    both = np.stack([array, -array], -3)
    tifffile.imwrite(path, both, ome=True, metadata={"axes": "ZCYX" if array.ndim == 3 else "CYX"})


def write_zarr(path: Path, array: np.ndarray) -> None:
    pytest.importorskip("zarr").save_array(path, array)


def write_ome_zarr(path: Path, array: np.ndarray) -> None:
    """Two resolutions, two channels: the array and its negative."""
    zarr = pytest.importorskip("zarr")
    both, axes = np.stack([array, -array]), "czyx" if array.ndim == 3 else "cyx"
    group = zarr.create_group(path)
    for name, part in (("0", both), ("1", both[..., ::2, ::2])):
        group.create_array(name, data=part)
    datasets = [{"path": "0"}, {"path": "1"}]
    group.attrs["ome"] = {"multiscales": [{"axes": [{"name": axis} for axis in axes], "datasets": datasets}]}


WRITERS = {
    "dcm": write_dicom, "fits": write_fits, "nii": write_nifti, "nii.gz": write_nifti, "tif": write_tiff,
    "ome.tif": write_ome, "npy": np.save, "zarr": write_zarr, "ome.zarr": write_ome_zarr,
}  # fmt: skip


@pytest.mark.parametrize("ending", WRITERS)
def test_pages_are_images_with_names_of_their_own(tmp_path, ending):
    WRITERS[ending](tmp_path / f"scan.{ending}", STACK)
    WRITERS[ending](tmp_path / f"alone.{ending}", STACK[0])
    before, _, last = f"scan.{ending}".rpartition(".") if not ending.endswith("gz") else ("scan", "", "nii.gz")
    pages = [f"{before}#{number:04}.{last}" for number in range(3)]
    assert list_images(tmp_path, "pages") == [f"alone.{ending}", *pages]
    assert list_images(tmp_path, "max") == [f"alone.{ending}", f"{before}#max.{last}"]
    assert {readers.file_of(page) for page in pages} == {f"scan.{ending}"}
    channels, values = 2 if "ome" in ending else 1, Values("range", -1000, 3000)
    for page, array in [*zip(pages, STACK, strict=True), (f"alone.{ending}", STACK[0]),
                        (f"{before}#max.{last}", STACK.max(0))]:  # fmt: skip
        stored = stored_values(tmp_path / page, channels)
        assert np.array_equal(stored[:, :, 0], array) and image_size(tmp_path / page) == (10, 12), page
        assert np.array_equal(read_image(tmp_path / page, channels, "native", values), values(stored))
    if channels == 2:
        assert np.array_equal(stored_values(tmp_path / pages[1], 2)[:, :, 1], -STACK[1])
    with pytest.raises(ImageError, match=r"#0003\..*its file has 3 pages"):
        read_image(tmp_path / f"{before}#0003.{last}", channels, "native", values)


@pytest.mark.parametrize("name", ["sub-01.v2.nii.gz", "scan 0.5mm.NII.GZ", "scan.0.5.npy"])
def test_a_file_with_dots_in_its_name_has_pages(tmp_path, name):
    writer = np.save if name.endswith("npy") else write_nifti
    writer(tmp_path / f"x.{'npy' if name.endswith('npy') else 'nii.gz'}", STACK)
    next(tmp_path.iterdir()).rename(tmp_path / name)
    pages = list_images(tmp_path, "pages")
    assert len(pages) == 3 and {readers.file_of(page) for page in pages} == {name}
    for page, array in zip(pages, STACK, strict=True):
        assert np.array_equal(stored_values(tmp_path / page, 1)[:, :, 0], array), page


TIFFS = {  # how tifffile writes: in one piece, plane by plane, as volumes
    "imagej": {"imagej": True, "metadata": {"axes": "TZCYX"}},
    "big endian": {"ome": True, "metadata": {"axes": "TZCYX"}, "byteorder": ">"},
    "compressed": {"ome": True, "metadata": {"axes": "TZCYX"}, "compression": "zlib"},
    "volumes": {"metadata": {"axes": "TCZYX"}, "volumetric": True, "tile": (16, 16, 16)},
}


@pytest.mark.parametrize("way", TIFFS)
def test_a_page_of_a_tiff_is_read_alone(tmp_path, monkeypatch, way):
    array = np.random.default_rng(0).integers(0, 60000, (2, 3, 2, 20, 24), np.uint16)  # [T, Z, C, H, W]
    stored = array.swapaxes(1, 2) if way == "volumes" else array
    tifffile.imwrite(tmp_path / "scan.tif", stored, photometric="minisblack", **TIFFS[way])
    if way != "volumes":
        monkeypatch.setattr(tifffile.TiffPageSeries, "asarray", lambda *_, **__: pytest.fail("all of the file is read"))
    pages = list_images(tmp_path, "pages")
    assert len(pages) == 6
    for page, truth in zip(pages, array.reshape(6, 2, 20, 24), strict=True):
        assert np.array_equal(stored_values(tmp_path / page, 2), np.moveaxis(truth, 0, -1))


def test_a_plane_that_a_tiff_lacks_is_named(tmp_path):
    path = tmp_path / "scan.tif"
    tifffile.imwrite(path, STACK.astype(np.uint16), ome=True, metadata={"axes": "ZYX"}, compression="zlib")
    tifffile.tiffcomment(path, tifffile.tiffcomment(path).replace('SizeZ="3"', 'SizeZ="4"').encode())
    assert stored_values(tmp_path / "scan#0002.tif", 1).shape == (10, 12, 1)
    with pytest.raises(ImageError, match=r"#0003\..*names a plane that the file does not hold"):
        stored_values(tmp_path / "scan#0003.tif", 1)


@pytest.mark.parametrize("ending", ["dcm", "fits", "nii", "tif"])
def test_a_stack_is_refused_with_the_way_out(tmp_path, ending):
    WRITERS[ending](tmp_path / f"scan.{ending}", STACK)
    assert list_images(tmp_path) == [f"scan.{ending}"]
    with pytest.raises(ImageError, match=f"scan.{ending}.*set data.stack of a run and --stack of a tool"):
        read_image(tmp_path / f"scan.{ending}", 1)


@pytest.mark.parametrize("ending", ["dcm", "fits", "nii", "nii.gz"])
def test_damaged_files_are_named(tmp_path, ending):
    path = tmp_path / f"scan.{ending}"
    WRITERS[ending](path, STACK[0])
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:200]):
        path.write_bytes(content)
        assert list_images(tmp_path, "pages") == [path.name]
        with pytest.raises(ImageError, match=f"scan.{ending}") as caught:
            read_image(path, 1)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", WRITERS)
def test_a_page_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch, ending):
    WRITERS[ending](tmp_path / f"scan.{ending}", STACK)
    (name, *_) = list_images(tmp_path, "pages")
    channels = stored_values(tmp_path / name, 1, max_pixels=120).shape[2]
    monkeypatch.setattr(readers, "_open_stack", _without_pages(readers._open_stack))
    with pytest.raises(ImageError, match=f"10 x 12 px of {channels} channels? are more than the limit of 119 px"):
        stored_values(tmp_path / name, 1, max_pixels=119)


def _without_pages(opened):
    @contextmanager
    def open_alone(path):
        with opened(path) as stack:
            yield stack._replace(page=None)

    return open_alone


@pytest.mark.parametrize("ending,library,extra", [("dcm", "pydicom", "dicom"), ("fits", "astropy", "fits"),
                                                  ("nii", "nibabel", "nifti"), ("zarr", "zarr", "zarr"),
                                                  ("nd2", "nd2", "microscopy"), ("czi", "czifile", "microscopy"),
                                                  ("lif", "readlif", "microscopy")])  # fmt: skip
def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, ending, library, extra):
    (tmp_path / f"x.{ending}").write_bytes(b"whatever")
    for name in (library, "astropy.io", "readlif.reader"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImageError, match=rf"x.{ending}.*need {library}: pip install 'noise-robust-dino\[{extra}\]'"):
        read_image(tmp_path / f"x.{ending}", 1)
    extras = (Path(__file__).parents[2] / "setup.py").read_text()
    assert f'"{library}>=' in extras.split(f'"{extra}": [')[1].split("]")[0]


@pytest.mark.parametrize("ending", ["nd2", "czi", "lif"])
def test_what_only_a_microscope_writes_is_named_where_it_is_damaged(tmp_path, ending):
    """No library writes these: what a whole file gives is not tested."""
    pytest.importorskip({"nd2": "nd2", "czi": "czifile", "lif": "readlif"}[ending])
    (tmp_path / f"x.{ending}").write_bytes(b"whatever" * 50)
    assert list_images(tmp_path, "pages") == [f"x.{ending}"]
    with pytest.raises(ImageError, match=f"x.{ending} cannot be read"):
        read_image(tmp_path / f"x.{ending}", 1)


def test_axes_may_stand_in_any_order():
    array = np.arange(2 * 3 * 4 * 5 * 2).reshape(2, 3, 4, 5, 2)
    stack = readers._stack_by_axes("TCYXZ", array.shape, lambda index: array[index])
    assert stack.count == 4 and stack.size == (4, 5, 3)
    assert np.array_equal(stack.page(3), array[1, :, :, :, 1].transpose(1, 2, 0))
    with pytest.raises(ValueError, match="have no height and width"):
        readers._stack_by_axes("TZ", (2, 3), None)


def test_a_zarr_store_is_an_image_among_class_folders(tmp_path):
    write_zarr(tmp_path / "train/cells/a.zarr", STACK[0].astype(np.uint8))
    write_zarr(tmp_path / "train/debris/b.zarr", STACK[0].astype(np.uint8))
    index = build_index(tmp_path, "train")
    assert index.relatives == ["train/cells/a.zarr", "train/debris/b.zarr"] and index.classes == ["cells", "debris"]


@pytest.mark.parametrize("how", ["codec", "objects"])
def test_a_zarr_store_that_would_unpickle_is_refused(tmp_path, how):
    pytest.importorskip("zarr")
    (tmp_path / "x.zarr").mkdir()
    header = {"zarr_format": 2, "shape": [4, 4], "chunks": [4, 4], "dtype": "|u1", "fill_value": 0, "order": "C"}
    header |= {"compressor": None, "filters": [{"id": "pickle", "protocol": 5}]}
    header |= {"dtype": "|O"} if how == "objects" else {}
    text = json.dumps(header).replace("pickle", "\\u0070ickle")  # as who hides it would write it
    (tmp_path / "x.zarr" / ".zarray").write_text(text)
    (tmp_path / "x.zarr" / "0.0").write_bytes(pickle.dumps(Opens(str(tmp_path / "opened"))))
    with pytest.raises(ImageError, match="x.zarr cannot be read"):
        read_image(tmp_path / "x.zarr", 1)
    assert not (tmp_path / "opened").exists()


class Opens:
    """A pickle of it opens a file when it is loaded."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_file_with_a_page_in_its_name_is_that_file(tmp_path):
    np.save(tmp_path / "x#0001.npy", STACK[0])
    assert np.array_equal(stored_values(tmp_path / "x#0001.npy", 1)[:, :, 0], STACK[0])
    with pytest.raises(ImageError, match="y#0001.npy"):
        read_image(tmp_path / "y#0001.npy", 1)


def test_pages_of_one_file_are_not_torn_apart(tmp_path):
    (tmp_path / "set").mkdir()
    for number in range(6):
        write_tiff(tmp_path / f"set/{number}.tif", STACK)
    (tmp_path / "set/labels.csv").write_text("path,label\n" + "".join(f"{n}.tif,{'ab'[n % 2]}\n" for n in range(6)))
    layout = Layout(0.34, labels="labels.csv", stack="pages")
    train, val = (build_index(tmp_path / "set", split, tmp_path, layout) for split in ("train", "val"))
    assert len(train.relatives) == 12 and len(val.relatives) == 6 and min(val.labels) >= 0
    assert not {readers.file_of(name) for name in train.relatives} & {readers.file_of(name) for name in val.relatives}


def test_a_denoised_copy_has_a_file_a_page(tmp_path):
    (tmp_path / "set").mkdir()
    write_dicom(tmp_path / "set/scan.dcm", STACK)
    values, sentence = resolve("auto", tmp_path / "set", list_images(tmp_path / "set", "pages"), 3)
    assert values.kind == "range" and "by 3 images" in sentence
    denoise.main(["--denoiser", "nlm", "--data", str(tmp_path / "set"), "--noise", "none", "--stack", "pages",
                  "--output", str(tmp_path / "out"), "--workers", "0"])  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npy")) == [f"scan#000{n}.npy" for n in range(3)]
    assert read_manifest(tmp_path / "out")["values"] == str(values)


# --- orientation ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured_in_every_format(tmp_path, ending, orientation):
    """An upright scene is stored turned, with the tag that turns it back."""
    corner = np.zeros((24, 16, 3), np.uint8)
    corner[:8, :8] = 255  # white at the top left, upright
    exif = Image.Exif()
    exif[274] = orientation
    inverse = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose: what stored it so
    stored = Image.fromarray(corner) if inverse is None else Image.fromarray(corner).transpose(inverse)
    stored.save(tmp_path / f"x.{ending}", exif=exif, **({"lossless": True} if ending == "webp" else {}))
    image = read_image(tmp_path / f"x.{ending}")
    assert image.shape == (24, 16, 3) and image_size(tmp_path / f"x.{ending}") == (24, 16)
    assert image[:7, :7].min() > 200 and image[9:].max() < 60 and image[:, 9:].max() < 60


def test_damaged_exif_says_nothing(tmp_path):
    Image.fromarray(np.full((6, 9, 3), 7, np.uint8)).save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(tmp_path / "x.png").shape == (6, 9, 3) and image_size(tmp_path / "x.png") == (6, 9)
