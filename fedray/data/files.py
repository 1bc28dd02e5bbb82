"""The files of data sets: reading them, and fetching those that are missing.

These functions return the content of the files; `datasets` checks that it is the data set. An unreadable file
raises a DataError with its path.
"""

import gzip
import hashlib
import logging
import os
import pickle
import zlib
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedray.errors import DataError

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]
Labelled = tuple[Pixels, NDArray[Any]]
"""Images uint8 (n, C, H, W), and labels of any integer type (n,)."""

# file → MD5, from https://www.cs.toronto.edu/~kriz/cifar.html as torchvision has it
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def zipped_or_not(raw: Path, stem: str) -> Path:
    """Return RAW/`stem` where it exists, else RAW/`stem`.gz, whether that exists or not."""
    return path if (path := raw / stem).exists() else raw / f"{stem}.gz"


def read_idx(path: Path, axes: int) -> Pixels:
    """Return the array of an idx file: 0, 0, 8 (uint8), number of axes, big-endian lengths, values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if data[:4] != bytes((0, 0, 8, axes)):
            raise ValueError(f"not an idx file of bytes along {axes} axes")
        start = 4 + 4 * axes
        shape = tuple(np.frombuffer(data[4:start], dtype=">u4").tolist())
        return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise unreadable(path, error) from error


def read_writers(path: Path, labels: Pixels) -> Indices | None:
    """Return the writer of each training image (int64), or None without the file.

    Its columns are index, label, hsf_series, writer_id, digit_index; they come from QMNIST (Yadav and Bottou,
    Cold case: the lost MNIST digits, NeurIPS 2019).
    """
    if not path.exists():
        return None
    try:
        table = np.loadtxt(path, dtype=np.int64, delimiter=",", skiprows=1, ndmin=2)
        index, label, writer = table[:, 0], table[:, 1], table[:, 3]
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise unreadable(path, error) from error
    if not (np.array_equal(index, np.arange(len(labels))) and np.array_equal(label, labels)):
        raise DataError(
            f"{path}: its {len(index):,} rows are not the {len(labels):,} training labels in their order; "
            f"remove the file to go without writers, or change data.root"
        )
    return writer.copy()


def read_batches(folder: Path) -> tuple[Labelled, Labelled, list[str]]:
    """Return the training and the test images of CIFAR-10, and which files are not the published ones."""
    *train, test = (_read_batch(folder / name) for name in CIFAR10_MD5)
    changed = [name for name, md5 in CIFAR10_MD5.items() if _md5(folder / name) != md5]
    x, y = (np.concatenate(column) for column in zip(*train, strict=True))
    return (x, y), test, changed


def read_cifar100(root: Path) -> tuple[Labelled, Labelled, None]:
    """Return the training and the test images of ROOT/cifar-100-python, with their fine labels."""
    folder = root / "cifar-100-python"
    if not all((folder / part).exists() for part in ("train", "test")):
        download("cifar100", "CIFAR100", folder.name, root, needed="cifar-100-python/{train,test}")
    train, test = (_read_batch(folder / part, "fine_labels") for part in ("train", "test"))
    return train, test, None


def read_tiny_imagenet(root: Path) -> tuple[Labelled, Labelled, None]:
    """Return the training and the validation images of ROOT/tiny-imagenet-200, uint8 (n, 3, 64, 64).

    The labels of its test images were never published; its validation images are the test set here. Classes
    are numbered in the order of their WordNet ids.
    """
    folder = root / "tiny-imagenet-200"
    classes = sorted(path.name for path in (folder / "train").glob("n*") if path.is_dir())
    if not classes:
        raise DataError(f"{folder}/train: has no folder of a class; data.root needs the unzipped archive")
    number = {name: code for code, name in enumerate(classes)}
    train = [
        (path, number[c]) for c in classes for path in sorted((folder / "train" / c).glob("images/*.JPEG"))
    ]
    notes = folder / "val" / "val_annotations.txt"
    try:
        rows = [line.split("\t")[:2] for line in notes.read_text().splitlines()]
        test = [(folder / "val" / "images" / name, number[wnid]) for name, wnid in rows]
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(notes, error) from error
    return _read_jpegs(train, 64), _read_jpegs(test, 64), None


def _read_jpegs(labelled: list[tuple[Path, int]], side: int) -> Labelled:
    """Return square images and their labels; grey ones get three equal channels."""
    from PIL import Image

    x = np.empty((len(labelled), 3, side, side), dtype=np.uint8)
    for i, (path, _) in enumerate(labelled):
        try:
            with Image.open(path) as image:
                x[i] = np.asarray(image.convert("RGB")).reshape(side, side, 3).transpose(2, 0, 1)
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error
    return x, np.array([label for _, label in labelled], dtype=np.int64)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


class _BatchUnpickler(pickle.Unpickler):
    """Reads arrays, lists and strings only, so that a foreign pickle cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy.core", "numpy._core"), name:
            case "numpy", "dtype":  # the published files pass 0 and 1 as flags, which numpy deprecates
                return lambda code, align, copy: np.dtype(code, align=bool(align), copy=bool(copy))
            case ("numpy", "ndarray") | ("_codecs", "encode"):
                return super().find_class(module, name)
            case "numpy._core.multiarray" | "numpy._core.numeric" as inner, "_reconstruct" | "_frombuffer":
                return super().find_class(inner, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a batch of images")


def _read_batch(path: Path, labels: str = "labels") -> Labelled:
    """Return the images and labels of one pickled batch of CIFAR."""
    try:
        batch = _BatchUnpickler(BytesIO(path.read_bytes()), encoding="latin1").load()
        return np.asarray(batch["data"]).reshape(-1, 3, 32, 32), np.asarray(batch[labels])
    except Exception as error:  # a broken pickle raises nearly anything
        raise unreadable(path, error) from error


def read_mosaics(folder: Path) -> tuple[Labelled, Labelled]:
    """Return the training and the test images of `train_NN.webp`, `test_NN.webp` and `labels.npz`."""
    try:
        with np.load(folder / "labels.npz") as labels:
            train, test = labels["train"], labels["test"]
    except Exception as error:  # a broken archive raises nearly anything
        raise unreadable(folder / "labels.npz", error) from error
    return (_read_images(folder, "train"), train), (_read_images(folder, "test"), test)


def _read_images(folder: Path, part: str) -> Pixels:
    """Return the images of `part`, uint8 (n, 3, 32, 32); a mosaic is 25 rows of 40 images."""
    from PIL import Image

    paths = sorted(folder.glob(f"{part}_*.webp"))
    x = np.empty((len(paths), 1000, 3, 32, 32), dtype=np.uint8)
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as mosaic:
                pixels = np.asarray(mosaic.convert("RGB")).reshape(25, 32, 40, 32, 3)
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error
        x[i] = pixels.transpose(0, 2, 4, 1, 3).reshape(1000, 3, 32, 32)
    return x.reshape(-1, 3, 32, 32)


def cache() -> Path:
    """Return the default folder of data sets, for reading and downloading."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedray"


def download(name: str, dataset_class: str, folder: str, root: Path, needed: str) -> None:
    """Have torchvision fetch its `dataset_class`, and move the files to ROOT/`folder`.

    Raises:
        DataError: if that fails; it lists the `needed` files.
    """
    import torchvision

    logger.info("downloading %s into %s", name, root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # runs that start together must not write one file, nor find half a file: each fetches, then renames
        with TemporaryDirectory(dir=root, prefix=".download-") as scratch:
            getattr(torchvision.datasets, dataset_class)(scratch, download=True)
            (root / folder).mkdir(parents=True, exist_ok=True)
            for file in (Path(scratch) / folder).iterdir():
                file.replace(root / folder / file.name)
    except Exception as error:  # any error of the transport
        raise DataError(
            f"{name}: not (wholly) in {root}, and it could not be downloaded ({error}); "
            f"set data.root to a folder with {needed}"
        ) from error


def unreadable(path: Path, error: Exception) -> DataError:
    """Return the error for a file of a data set."""
    return DataError(f"{path}: cannot be read ({error}); replace or remove the file, or change data.root")
