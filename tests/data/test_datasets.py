"""Data sets: reading files, naming their faults, normalising, setting rows aside."""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fedray.data import DATASETS, Dataset, Examples, split
from fedray.data.files import CIFAR10_MD5
from fedray.errors import ConfigError, DataError

IDX = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


@pytest.fixture
def data() -> Path:
    """The folder of real data sets; read only."""
    folder = os.environ.get("FEDRAY_DATA")
    if folder is None:
        pytest.skip("FEDRAY_DATA is not set")
    return Path(folder)


@pytest.fixture
def downloads(monkeypatch) -> list[tuple[str, str]]:
    """Replace torchvision by classes that write one file and then fail; returns the calls."""
    calls = []

    def fail(dataset_class):
        def construct(root, download):
            calls.append((dataset_class, str(root)))
            (Path(root) / "half").write_bytes(b"half a file")
            raise RuntimeError("Error downloading: no route to host")

        return construct

    classes = {name: fail(name) for name in ("MNIST", "FashionMNIST", "CIFAR10")}
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=SimpleNamespace(**classes)))
    return calls


def idx(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim))
        + np.array(array.shape, ">u4").tobytes()
        + array.astype(np.uint8).tobytes()
    )


def small_arrays(train=12, test=5) -> dict[str, np.ndarray]:
    """Arrays by file name, with different values: image i is filled with i, its label is i mod 10."""
    arrays = {}
    for part, n in (("train", train), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = np.broadcast_to(np.arange(n)[:, None, None], (n, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(n) % 10
    return arrays


def write_idx(
    root: Path, folder: str = "MNIST", zipped: bool = True, arrays: dict[str, np.ndarray] | None = None
) -> Path:
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for name, array in (arrays or small_arrays()).items():
        if zipped:
            (raw / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (raw / name).write_bytes(idx(array))
    return raw


def write_writers(root: Path, labels: list[int], writers: list[int]) -> Path:
    path = root / "MNIST" / "writers_train.csv.gz"
    lines = [f"{i},{label},4,{w},0" for i, (label, w) in enumerate(zip(labels, writers, strict=True))]
    text = "\n".join(["index,label,hsf_series,writer_id,digit_index", *lines])
    path.write_bytes(gzip.compress(text.encode()))
    return path


def batch_pixels(n: int = 2) -> np.ndarray:
    return (np.arange(n * 3072) % 251).astype(np.uint8).reshape(n, 3072)


def write_batches(root: Path, n=2) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for k, name in enumerate(CIFAR10_MD5):
        batch = {"batch_label": name, "labels": [k] * n, "data": batch_pixels(n), "filenames": ["x.png"] * n}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def mosaic(tiles: np.ndarray) -> bytes:
    """Lay 1,000 images (1000, 3, 32, 32) out, 40 to a row, one by one."""
    canvas = np.zeros((800, 1280, 3), np.uint8)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, 40)
        canvas[32 * row : 32 * row + 32, 32 * column : 32 * column + 32] = tile.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ digits


def test_digits_come_with_the_package_and_split_the_same_way_each_time():
    first, second = DATASETS["digits"].load(None), DATASETS["digits"].load(Path("/no/such/folder"))
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.train.x.shape == (1437, 1, 8, 8) and first.train.x.dtype == np.uint8
    assert first.train.y.dtype == np.int64 and first.writers is None and first.warnings == ()
    np.testing.assert_array_equal(first.train.x, second.train.x)
    # the split is frozen: its first rows by number
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rows = [1081, 1707, 927]
    np.testing.assert_array_equal(first.train.x[:3].reshape(3, 64), np.floor(images[rows] * 255 / 16 + 0.5))
    assert first.train.y[:3].tolist() == labels[rows].tolist() == [2, 8, 2]
    assert first.train.x.max() == 255
    order = np.random.RandomState(0).permutation(1797)
    both = np.concatenate((first.train.x, first.test.x)).reshape(-1, 64)
    np.testing.assert_array_equal(both, np.floor(images[order] * 255 / 16 + 0.5))
    assert (np.bincount(first.train.y) + np.bincount(first.test.y)).tolist() == np.bincount(labels).tolist()
    DATASETS["digits"].check(Path("/no/such/folder"))  # ignored, so not an error


def test_the_mean_and_std_of_the_specification_are_those_of_the_training_images():
    dataset = DATASETS["digits"].load(None)
    scaled = dataset.train.x / 255
    assert dataset.mean == pytest.approx([scaled.mean()], abs=5e-5)
    assert dataset.std == pytest.approx([scaled.std()], abs=5e-5)


# ------------------------------------------------------------------------------------------------ real files


@pytest.mark.parametrize("name", sorted(IDX))
def test_real_idx_files_are_read_from_a_read_only_folder(name, data, downloads):
    spec = DATASETS[name]
    dataset = spec.load(data)
    assert downloads == [] and dataset.warnings == ()
    assert (len(dataset.train), len(dataset.test)) == (spec.train_examples, spec.test_examples)
    assert dataset.train.x.shape[1:] == spec.input_shape and dataset.train.x.flags.c_contiguous
    assert np.bincount(dataset.test.y, minlength=10).min() > 800
    scaled = dataset.train.x / np.float32(255)
    assert spec.mean == pytest.approx([scaled.mean(dtype=np.float64)], abs=5e-5)
    assert spec.std == pytest.approx([scaled.std(dtype=np.float64)], abs=5e-5)
    if name == "mnist":
        assert dataset.train.y[:5].tolist() == [5, 0, 4, 1, 9]
        assert dataset.writers is not None and dataset.writers[:3].tolist() == [2154, 0, 2232]
        assert len(np.unique(dataset.writers)) == 539
    else:
        assert np.bincount(dataset.train.y).tolist() == [6000] * 10 and dataset.writers is None


def test_real_mosaics_hold_the_images_that_unpack_makes(data, tmp_path, downloads):
    folder = tmp_path / "cifar-10"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}_00.webp").symlink_to(data / "cifar-10" / f"{part}_00.webp")
    with np.load(data / "cifar-10" / "labels.npz") as labels:
        np.savez(folder / "labels.npz", train=labels["train"][:1000], test=labels["test"][:1000])
    dataset = DATASETS["cifar10"].load(tmp_path)
    assert downloads == [] and dataset.train.x.shape == (1000, 3, 32, 32)
    assert dataset.train.y[:5].tolist() == [6, 9, 9, 4, 1]  # frog, truck, truck, deer, automobile
    assert dataset.train.x[0, :, 0, 0].tolist() == [59, 62, 63]  # the frog's first pixel, as published
    with Image.open(data / "cifar-10" / "test_00.webp") as canvas:
        tile = np.asarray(canvas.convert("RGB"))[64:96, 96:128]
    np.testing.assert_array_equal(dataset.test.x[83], tile.transpose(2, 0, 1))  # row 2, column 3


@pytest.mark.slow
def test_all_of_cifar10(data):
    dataset = DATASETS["cifar10"].load(data)
    assert np.bincount(dataset.train.y).tolist() == [5000] * 10
    assert np.bincount(dataset.test.y).tolist() == [1000] * 10
    for c in range(3):
        assert dataset.train.x[:, c].mean(dtype=np.float64) / 255 == pytest.approx(dataset.mean[c], abs=1e-4)
        assert dataset.train.x[:, c].std(dtype=np.float64) / 255 == pytest.approx(dataset.std[c], abs=1e-4)
    (warning,) = dataset.warnings
    assert "mosaics" in warning and "cifar10_lossy_indices.json" in warning


# ------------------------------------------------------------------------------------------------ idx


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", sorted(IDX))
def test_idx_files_zipped_or_not(name, zipped, tmp_path, downloads):
    write_idx(tmp_path, IDX[name], zipped)
    dataset = DATASETS[name].load(tmp_path)
    assert downloads == [] and dataset.writers is None
    assert dataset.train.x.shape == (12, 1, 28, 28) and dataset.test.x.shape == (5, 1, 28, 28)
    assert dataset.train.x[:, 0, 27, 27].tolist() == list(range(12))
    assert dataset.train.y.tolist() == [*range(10), 0, 1] and dataset.test.y.tolist() == [0, 1, 2, 3, 4]
    (warning,) = dataset.warnings
    assert "12 train and 5 test" in warning and "60,000 and 10,000" in warning


def test_an_unzipped_file_is_preferred_and_files_may_be_mixed(tmp_path):
    raw = write_idx(tmp_path)
    (raw / "train-labels-idx1-ubyte").write_bytes(idx(np.full(12, 7)))
    assert DATASETS["mnist"].load(tmp_path).train.y.tolist() == [7] * 12


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: good[:-9],  # cut off within the gzip trailer
        lambda good: good[: len(good) // 2],
        lambda good: b"",
        lambda good: b"<html>not found</html>",
        lambda good: gzip.compress(gzip.decompress(good)[:-1]),  # a sound gzip of a file cut off
        lambda good: gzip.compress(gzip.decompress(good) + b"\0"),
        lambda good: gzip.compress(b"\0\0\x0d\x03" + gzip.decompress(good)[4:]),  # float32
        lambda good: gzip.compress(idx(np.arange(12))),  # labels in the place of images
        lambda good: good[:30] + bytes(byte ^ 255 for byte in good[30:60]) + good[60:],
    ],
)
def test_a_broken_file_is_named(spoil, tmp_path, downloads):
    path = write_idx(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read .*data\.root"):
        DATASETS["mnist"].load(tmp_path)
    assert downloads == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train-labels-idx1-ubyte": np.arange(9)}, r"labels \(9,\)"),
        ({"t10k-labels-idx1-ubyte": np.array([0, 1, 2, 3, 10])}, "test labels go from 0 to 10"),
        ({"t10k-images-idx3-ubyte": np.zeros((5, 32, 32))}, r"\(5, 1, 32, 32\)"),
        (
            {"t10k-images-idx3-ubyte": np.zeros((0, 28, 28)), "t10k-labels-idx1-ubyte": np.zeros(0)},
            "test images",
        ),
    ],
)
def test_files_that_do_not_fit_each_other(changes, message, tmp_path):
    raw = write_idx(tmp_path, arrays=small_arrays() | changes)
    with pytest.raises(DataError, match=message) as caught:
        DATASETS["mnist"].load(tmp_path)
    assert str(raw) in str(caught.value)


# ------------------------------------------------------------------------------------------------ writers


def test_writers_are_read_beside_mnist(tmp_path):
    write_idx(tmp_path)
    write_writers(tmp_path, [*range(10), 0, 1], [3] * 7 + [2100] * 5)
    writers = DATASETS["mnist"].load(tmp_path).writers
    assert writers is not None and writers.dtype == np.int64 and writers.tolist() == [3] * 7 + [2100] * 5


@pytest.mark.parametrize("labels", [[*range(10), 0, 2], [*range(10), 0], [*range(10), 0, 1, 2]])
def test_writers_of_other_labels_are_refused(labels, tmp_path):
    write_idx(tmp_path)
    write_writers(tmp_path, labels, [0] * len(labels))
    with pytest.raises(DataError, match=r"writers_train\.csv\.gz: .* not the 12 training labels"):
        DATASETS["mnist"].load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"index,label\n0,5\n"), gzip.compress(b"a\nb,c,d,e")],
    ids=["no gzip", "two columns", "too many columns"],
)
def test_broken_writers_are_named(content, tmp_path):
    write_idx(tmp_path)
    write_writers(tmp_path, [], []).write_bytes(content)
    with pytest.raises(DataError, match=r"writers_train\.csv\.gz: cannot be read"):
        DATASETS["mnist"].load(tmp_path)


# ------------------------------------------------------------------------------------------------ CIFAR-10


def test_batches_other_than_the_published_are_used_with_a_warning(tmp_path, downloads):
    write_batches(tmp_path)
    dataset = DATASETS["cifar10"].load(tmp_path)
    assert downloads == [] and dataset.train.y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert dataset.test.y.tolist() == [5, 5]
    np.testing.assert_array_equal(dataset.test.x, batch_pixels().reshape(2, 3, 32, 32))
    changed, count = dataset.warnings
    assert "data_batch_1, data_batch_2" in changed and "not the published files" in changed
    assert "10 train and 2 test" in count


def test_batches_with_the_published_checksums_need_no_warning(tmp_path, monkeypatch):
    folder = write_batches(tmp_path)
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in CIFAR10_MD5}
    monkeypatch.setattr("fedray.data.files.CIFAR10_MD5", sums)
    (count,) = DATASETS["cifar10"].load(tmp_path).warnings
    assert "10 train" in count


def test_the_flags_of_the_published_pickles_are_understood(tmp_path):
    folder = write_batches(tmp_path)
    for path in folder.iterdir():
        new = path.read_bytes()
        # Python 2 wrote dtype('u1', 0, 1) and numpy.core; numpy now deprecates both
        old = new.replace(b"\x89\x88\x87", b"K\x00K\x01\x87").replace(b"numpy._core.", b"numpy.core.")
        assert old.count(b"K\x00K\x01\x87") == 1 and b"numpy.core.multiarray" in old
        path.write_bytes(old)
    np.testing.assert_array_equal(
        DATASETS["cifar10"].load(tmp_path).train.x[:2].reshape(2, -1), batch_pixels()
    )


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps({"data": batch_pixels()}, protocol=2),
        pickle.dumps({"data": np.zeros((2, 100), np.uint8), "labels": [0, 0]}, protocol=2),
        pickle.dumps({"data": Malicious(), "labels": [0, 0]}, protocol=2),
    ],
    ids=["empty", "text", "no labels", "wrong length", "malicious"],
)
def test_a_broken_batch_is_named_and_never_run(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (write_batches(tmp_path) / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match="data_batch_3: cannot be read"):
        DATASETS["cifar10"].load(tmp_path)
    assert not (tmp_path / "evil").exists()


def write_mosaics(root: Path) -> np.ndarray:
    """Write one mosaic of train and of test images: image i is of one colour, (i mod 256, i // 4, part)."""
    folder = root / "cifar-10"
    folder.mkdir()
    tiles = np.zeros((2, 1000, 3, 32, 32), np.uint8)
    tiles[:, :, 0] = (np.arange(1000) % 256)[:, None, None]
    tiles[:, :, 1] = (np.arange(1000) // 4)[:, None, None]
    tiles[1, :, 2] = 1
    for name, part in zip(("train_00", "test_00"), tiles, strict=True):
        (folder / f"{name}.webp").write_bytes(mosaic(part))
    labels = (np.arange(1000) % 10).astype(np.uint8)
    np.savez(folder / "labels.npz", train=labels, test=labels)
    return tiles


def test_mosaics_are_read_in_order_with_a_warning(tmp_path, downloads):
    tiles = write_mosaics(tmp_path)
    dataset = DATASETS["cifar10"].load(tmp_path)
    assert downloads == []
    np.testing.assert_array_equal(dataset.train.x, tiles[0])
    np.testing.assert_array_equal(dataset.test.x, tiles[1])
    assert dataset.train.x.flags.c_contiguous and dataset.train.y.dtype == np.int64
    assert "MD5" in dataset.warnings[0] and "lossy" not in dataset.warnings[0]


def test_whole_batches_come_before_mosaics_and_mosaics_before_a_part_of_the_batches(tmp_path, downloads):
    write_mosaics(tmp_path)
    folder = write_batches(tmp_path)
    assert len(DATASETS["cifar10"].load(tmp_path).train) == 10
    (folder / "test_batch").unlink()
    assert len(DATASETS["cifar10"].load(tmp_path).train) == 1000
    assert downloads == []


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train_00.webp", b"RIFF", r"train_00\.webp: cannot be read"),
        ("labels.npz", b"PK", r"labels\.npz: cannot be read"),
        ("test_00.webp", None, r"test images \(0, 3, 32, 32\)"),
    ],
)
def test_broken_mosaics_are_named(file, content, message, tmp_path):
    write_mosaics(tmp_path)
    path = tmp_path / "cifar-10" / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        DATASETS["cifar10"].load(tmp_path)


def test_a_mosaic_of_another_size_is_named(tmp_path):
    write_mosaics(tmp_path)
    Image.new("RGB", (64, 32)).save(tmp_path / "cifar-10" / "train_00.webp", lossless=True)
    with pytest.raises(DataError, match=r"train_00\.webp: cannot be read"):
        DATASETS["cifar10"].load(tmp_path)


# ------------------------------------------------------------------------------------------------ absent


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_a_root_that_is_no_folder_is_refused_at_once(name, tmp_path, downloads):
    (tmp_path / "file").touch()
    spec = DATASETS[name]
    for root in (tmp_path / "absent", tmp_path / "file"):
        for call in (spec.check, spec.load):
            with pytest.raises(
                DataError, match=r"data\.root: '.*(absent|file)' is not a folder; .*ubyte|data_batch"
            ):
                call(root)
    spec.check(tmp_path)
    spec.check(None)
    assert downloads == []


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_a_failing_download_says_how_to_go_on_and_leaves_nothing_behind(name, tmp_path, downloads):
    with pytest.raises(DataError, match=r"could not be downloaded \(.*no route to host\); set data\.root"):
        DATASETS[name].load(tmp_path)
    assert len(downloads) == 1 and list(tmp_path.iterdir()) == []


def test_a_missing_file_in_a_folder_that_exists_is_an_error_without_network(tmp_path, downloads):
    (write_idx(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"mnist: not \(wholly\) in .*could not be downloaded"):
        DATASETS["mnist"].load(tmp_path)


@pytest.mark.parametrize("xdg", [True, False])
def test_without_a_root_the_cache_is_used_and_filled_once(xdg, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if xdg else "")
    calls = []

    def download(root, download):
        calls.append(root)
        write_idx(Path(root), zipped=False)

    fake = SimpleNamespace(datasets=SimpleNamespace(MNIST=download))
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    for _ in range(2):
        assert len(DATASETS["mnist"].load(None).train) == 12
    cache = tmp_path / ("xdg" if xdg else ".cache") / "fedray"
    assert len(calls) == 1 and [path.name for path in cache.iterdir()] == ["MNIST"]


@pytest.mark.slow
def test_torchvision_unpacks_where_we_look(data, tmp_path, monkeypatch):
    import torchvision.datasets as official

    assert dict(official.CIFAR10.train_list + official.CIFAR10.test_list) == CIFAR10_MD5

    def copy(url, root, filename, md5):
        assert official.utils.check_integrity(data / "MNIST" / "raw" / filename, md5)
        shutil.copy(data / "MNIST" / "raw" / filename, Path(root) / filename)

    monkeypatch.setattr(official.utils, "download_url", copy)
    dataset = DATASETS["mnist"].load(tmp_path)
    assert (len(dataset.train), len(dataset.test), dataset.warnings) == (60_000, 10_000, ())
    assert (tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte").exists()


# ------------------------------------------------------------------------------------------------ normalise


def toy(labels, channels=1) -> Dataset:
    """A data set whose training labels are `labels`."""
    labels = np.asarray(labels, dtype=np.int64)
    x = np.random.default_rng(0).integers(0, 256, (len(labels), channels, 4, 5), dtype=np.uint8)
    train = Examples(x, labels)
    means, stds = tuple(0.1 + 0.2 * c for c in range(channels)), tuple(0.5 / (c + 1) for c in range(channels))
    return Dataset("toy", train, train, 10, (channels, 4, 5), means, stds)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_by_channel(channels):
    dataset = toy(np.zeros(9), channels)
    out = dataset.normalise(dataset.train.x)
    mean, std = (np.array(v)[:, None, None] for v in (dataset.mean, dataset.std))
    np.testing.assert_allclose(out.numpy(), (dataset.train.x / 255 - mean) / std, rtol=0, atol=1e-6)
    assert out.dtype == torch.float32 and out.is_contiguous() and out.shape == dataset.train.x.shape


def test_normalise_by_hand():
    dataset = replace(toy([0]), mean=(0.2,), std=(0.5,))
    x = np.array([0, 51, 255], np.uint8).reshape(3, 1, 1, 1)
    assert dataset.normalise(x).ravel().tolist() == pytest.approx([-0.4, 0.0, 1.6], abs=1e-6)


def test_normalise_of_read_only_rows_gives_memory_of_its_own():
    dataset = toy(np.zeros(6))
    x = dataset.train.x.copy()
    x.flags.writeable = False
    for rows in (x, x[::2], x[1:1]):
        before = rows.copy()
        dataset.normalise(rows).fill_(7)
        np.testing.assert_array_equal(rows, before)
    np.testing.assert_array_equal(dataset.normalise(x)[::2], dataset.normalise(x[::2]))


# ------------------------------------------------------------------------------------------------ split


def test_split_by_hand():
    # classes of 5, 3, 2; validation round(2.0) = 2: quotas 1.0 0.6 0.4 → 1 1 0
    # server round(3.0) = 3: quotas 1.5 0.9 0.6 → 1 0 0 and one each for the remainders 0.9 and 0.6 → 1 1 1
    y = np.array([0, 1, 0, 2, 0, 1, 0, 2, 1, 0])
    splits = split(toy(y), 0.2, 0.3, np.random.default_rng(3))
    counts = [
        np.bincount(y[rows], minlength=3).tolist()
        for rows in (splits.validation, splits.server, splits.train)
    ]
    assert counts == [[1, 1, 0], [1, 1, 1], [3, 1, 1]]


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 9), min_size=2, max_size=80),
    validation=st.floats(0, 0.6),
    server=st.floats(0, 0.6),
    seed=st.integers(0, 2**32),
)
def test_splits_are_disjoint_covering_stratified_and_reproducible(labels, validation, server, seed):
    dataset, n = toy(labels), len(labels)
    totals = [max(round(f * n), int(f > 0)) for f in (validation, server)]
    if sum(totals) >= n:
        with pytest.raises(ConfigError, match=r"data\.validation_fraction=.* data\.server_fraction="):
            split(dataset, validation, server, np.random.default_rng(seed))
        return
    first, second = (split(dataset, validation, server, np.random.default_rng(seed)) for _ in range(2))
    assert [len(first.validation), len(first.server)] == totals
    together = np.concatenate([first.train, first.validation, first.server])
    np.testing.assert_array_equal(np.sort(together), np.arange(n))
    for name in ("train", "validation", "server"):
        rows = getattr(first, name)
        assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
        np.testing.assert_array_equal(rows, getattr(second, name))
    # no class is further than one example from its exact share
    quota = np.bincount(labels, minlength=10) * totals[0] / n
    given_rows = np.bincount(np.asarray(labels)[first.validation], minlength=10)
    assert (np.abs(given_rows - quota) < 1 + 1e-9).all()


def test_splits_of_other_seeds_differ_and_empty_fractions_give_empty_arrays():
    dataset = toy(np.arange(200) % 10)
    a, b = (split(dataset, 0.1, 0.1, np.random.default_rng(seed)) for seed in (0, 1))
    assert not np.array_equal(a.validation, b.validation) and not np.array_equal(a.server, b.server)
    none = split(dataset, 0, 0, np.random.default_rng(0))
    assert none.validation.shape == none.server.shape == (0,) and none.validation.dtype == np.int64
    np.testing.assert_array_equal(none.train, np.arange(200))


def test_a_class_of_one_example_is_given_once():
    # classes of 1, 1, 4; both fractions ask 2 of 6: the single examples cannot serve twice
    y = np.array([0, 1, 2, 2, 2, 2])
    for seed in range(20):
        splits = split(toy(y), 0.34, 0.34, np.random.default_rng(seed))
        assert len(splits.train) == len(splits.validation) == len(splits.server) == 2


def test_fractions_that_make_no_sense():
    for validation, server in ((-0.1, 0.2), (0.2, -0.1), (0.5, 0.5), (1.0, 0.0)):
        with pytest.raises(ConfigError, match="their sum below 1"):
            split(toy(np.arange(50) % 5), validation, server, np.random.default_rng(0))


def test_every_specification_is_filled_in():
    published = ["digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "femnist", "tiny_imagenet"]
    assert list(DATASETS) == [*published, "shakespeare"]
    for spec in DATASETS.values():
        scaled = 0 if spec.tokens else spec.input_shape[0]
        assert len(spec.mean) == len(spec.std) == scaled and spec.source and spec.files
