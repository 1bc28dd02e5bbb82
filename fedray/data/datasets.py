"""Data sets: digits, MNIST, Fashion-MNIST and CIFAR-10, as uint8 arrays.

Files are read as torchvision lays them out, zipped or not; CIFAR-10 also from lossless mosaics. torchvision
downloads what is missing. Pixels stay uint8 until a client takes its rows: `Dataset.normalise`.
"""

import gzip
import hashlib
import logging
import os
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedray.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Examples:
    """Images and their labels.

    Args:
        x: uint8 (n, C, H, W), C-contiguous, in 0..255; may be read-only.
        y: int64 (n,), in 0..num_classes − 1.
    """

    x: Pixels
    y: Indices

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Args:
        name: as in DATASETS.
        train: what validation, server and clients share.
        test: read once, after the last round.
        num_classes: labels are 0..num_classes − 1.
        input_shape: (C, H, W) of one image.
        mean: per channel, in units of x/255.
        std: per channel, in units of x/255, > 0.
        writers: int64 (len(train),), who wrote each training image; None where that is not known.
        warnings: what a reader of the run should know about these files.
    """

    name: str
    train: Examples
    test: Examples
    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    writers: Indices | None = None
    warnings: tuple[str, ...] = ()

    def normalise(self, x: Pixels) -> Tensor:
        """Return (x/255 − mean)/std of `x` uint8 (n, C, H, W) as float32, in fresh memory."""
        std = np.array(self.std, dtype=np.float64)[:, None, None]
        shift = np.array(self.mean, dtype=np.float64)[:, None, None] / std
        out = x.astype(np.float32, order="C")
        out *= (1 / (255 * std)).astype(np.float32)
        out -= shift.astype(np.float32)
        return torch.from_numpy(out)


@dataclass(frozen=True)
class DatasetSpec:
    """What is known of a data set before it is loaded.

    Args:
        load: `load(root)` → Dataset, from the folder `root` or the default cache; downloads what is missing.
            Raises DataError for files that are missing, unreadable or do not fit each other.
        check: `check(root)` raises DataError at once if `root` is given and is no folder.
        input_shape: (C, H, W) of one image.
        num_classes: number of labels.
        train_examples: in the published set.
        test_examples: in the published set.
        mean: of the published training set per channel, in units of x/255.
        std: as `mean`.
        files: what a `data.root` has to hold.
        source: citation and licence.
        has_writers: whether `Dataset.writers` can be known.
    """

    load: Callable[[Path | None], Dataset]
    check: Callable[[Path | None], None]
    input_shape: tuple[int, int, int]
    num_classes: int
    train_examples: int
    test_examples: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    files: str
    source: str
    has_writers: bool = False


def _load_digits(root: Path | None) -> Dataset:
    """Load the digits that come with scikit-learn, 1,437 of them to train on; `root` is ignored."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # float64 (1797, 64) in 0..16
    x = np.rint(images * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    # the stream of RandomState is frozen by numpy, that of a Generator is not: this split stays what it is
    order = np.random.RandomState(0).permutation(len(x))
    train, test = np.split(order, [DATASETS["digits"].train_examples])
    return _dataset("digits", (x[train], labels[train]), (x[test], labels[test]), "load_digits")


def _load_idx(name: str, folder: str, root: Path | None) -> Dataset:
    """Load MNIST or Fashion-MNIST from the idx files, zipped or not, in ROOT/`folder`/raw."""
    root = _root(name, root)
    raw = root / folder / "raw"
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if not all(_zipped_or_not(raw, stem).exists() for stem in stems):
        _download(name, folder, f"{folder}/raw", root)
    x, y, test_x, test_y = (
        _read_idx(_zipped_or_not(raw, stem), axes=3 if "idx3" in stem else 1) for stem in stems
    )
    writers = _read_writers(root / folder / "writers_train.csv.gz", y) if DATASETS[name].has_writers else None
    return _dataset(name, (x[:, None], y), (test_x[:, None], test_y), str(raw), writers)


def _zipped_or_not(raw: Path, stem: str) -> Path:
    return path if (path := raw / stem).exists() else raw / f"{stem}.gz"


def _read_idx(path: Path, axes: int) -> Pixels:
    """Return the array of an idx file: 0, 0, 8 (uint8), number of axes, big-endian lengths, values."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if data[:4] != bytes((0, 0, 8, axes)):
            raise ValueError(f"not an idx file of bytes along {axes} axes")
        start = 4 + 4 * axes
        shape = tuple(np.frombuffer(data[4:start], dtype=">u4").tolist())
        return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _unreadable(path, error) from error


def _read_writers(path: Path, labels: Pixels) -> Indices | None:
    """Return who wrote each training image (int64), or None without the file.

    Its columns are index, label, hsf_series, writer_id, digit_index; they come from QMNIST (Yadav and Bottou,
    Cold case: the lost MNIST digits, NeurIPS 2019).
    """
    if not path.exists():
        return None
    try:
        table = np.loadtxt(path, dtype=np.int64, delimiter=",", skiprows=1, ndmin=2)
        index, label, writer = table[:, 0], table[:, 1], table[:, 3]
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise _unreadable(path, error) from error
    if not (np.array_equal(index, np.arange(len(labels))) and np.array_equal(label, labels)):
        raise DataError(
            f"{path}: its {len(index):,} rows are not the {len(labels):,} training labels in their order; "
            f"remove the file to go without writers, or change data.root"
        )
    return writer.copy()


# file → MD5, from https://www.cs.toronto.edu/~kriz/cifar.html as torchvision has it
CIFAR10_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def _load_cifar10(root: Path | None) -> Dataset:
    """Load CIFAR-10 from ROOT/cifar-10-batches-py, or else from the mosaics in ROOT/cifar-10."""
    root = _root("cifar10", root)
    batches, mosaics = root / "cifar-10-batches-py", root / "cifar-10"
    if not all((batches / name).exists() for name in CIFAR10_MD5):
        if (mosaics / "labels.npz").exists():
            return _load_mosaics(mosaics)
        _download("cifar10", "CIFAR10", batches.name, root)
    *train, test = (_read_batch(batches / name) for name in CIFAR10_MD5)
    changed = [name for name, md5 in CIFAR10_MD5.items() if _md5(batches / name) != md5]
    warning = f"cifar10: {', '.join(changed)} in {batches} are not the published files (their MD5 differs)"
    x, y = (np.concatenate(column) for column in zip(*train, strict=True))
    return _dataset("cifar10", (x, y), test, str(batches), warnings=(warning,) if changed else ())


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


class _BatchUnpickler(pickle.Unpickler):
    """Reads arrays, lists and strings only: a pickle from anywhere must not run code."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("numpy.core", "numpy._core"), name:
            case "numpy", "dtype":  # the published files pass 0 and 1 as flags, which numpy deprecates
                return lambda code, align, copy: np.dtype(code, align=bool(align), copy=bool(copy))
            case ("numpy", "ndarray") | ("_codecs", "encode"):
                return super().find_class(module, name)
            case "numpy._core.multiarray" | "numpy._core.numeric" as inner, "_reconstruct" | "_frombuffer":
                return super().find_class(inner, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a batch of images")


def _read_batch(path: Path) -> tuple[Pixels, NDArray[Any]]:
    """Return images uint8 (n, 3, 32, 32) and labels (n,) of one pickled batch."""
    try:
        batch = _BatchUnpickler(BytesIO(path.read_bytes()), encoding="latin1").load()
        return np.asarray(batch["data"]).reshape(-1, 3, 32, 32), np.asarray(batch["labels"])
    except Exception as error:  # a broken pickle raises nearly anything
        raise _unreadable(path, error) from error


def _load_mosaics(folder: Path) -> Dataset:
    """Load CIFAR-10 from `train_NN.webp` and `test_NN.webp`, 1,000 images each, and `labels.npz`."""
    try:
        with np.load(folder / "labels.npz") as labels:
            train_labels, test_labels = labels["train"], labels["test"]
    except Exception as error:  # a broken archive raises nearly anything
        raise _unreadable(folder / "labels.npz", error) from error
    warning = f"cifar10: {folder} holds mosaics, whose content the published MD5s cannot vouch for"
    lossy = folder.parent / "cifar10_lossy_indices.json"
    if lossy.exists():
        warning += f"; {lossy} lists the images that are lossy copies"
    train, test = _read_mosaics(folder, "train"), _read_mosaics(folder, "test")
    return _dataset("cifar10", (train, train_labels), (test, test_labels), str(folder), warnings=(warning,))


def _read_mosaics(folder: Path, part: str) -> Pixels:
    """Return the images of `part`, uint8 (n, 3, 32, 32); a mosaic is 25 rows of 40 images."""
    from PIL import Image

    paths = sorted(folder.glob(f"{part}_*.webp"))
    x = np.empty((len(paths), 1000, 3, 32, 32), dtype=np.uint8)
    for i, path in enumerate(paths):
        try:
            with Image.open(path) as mosaic:
                pixels = np.asarray(mosaic.convert("RGB")).reshape(25, 32, 40, 32, 3)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        x[i] = pixels.transpose(0, 2, 4, 1, 3).reshape(1000, 3, 32, 32)
    return x.reshape(-1, 3, 32, 32)


def _check(name: str, root: Path | None) -> None:
    if root is not None and not root.expanduser().is_dir():
        raise DataError(
            f"data.root: {str(root)!r} is not a folder; {name} needs one with {DATASETS[name].files}. "
            f"Change data.root, or leave it out to download into {_cache()}"
        )


def _root(name: str, root: Path | None) -> Path:
    """Return the folder to read: `root` where given, else the default cache."""
    _check(name, root)
    return _cache() if root is None else root.expanduser()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedray"


def _download(name: str, dataset_class: str, folder: str, root: Path) -> None:
    """Have torchvision fetch its `dataset_class`, and move the files to ROOT/`folder`."""
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
    except Exception as error:  # whatever the transport raises
        raise DataError(
            f"{name}: not (wholly) in {root}, and it could not be downloaded ({error}); "
            f"set data.root to a folder with {DATASETS[name].files}"
        ) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read ({error}); replace or remove the file, or change data.root")


def _dataset(
    name: str,
    train: tuple[Pixels, NDArray[Any]],
    test: tuple[Pixels, NDArray[Any]],
    where: str,
    writers: Indices | None = None,
    warnings: tuple[str, ...] = (),
) -> Dataset:
    """Check that images and labels fit each other and the specification, and put them together."""
    spec = DATASETS[name]
    for part, (x, y) in (("train", train), ("test", test)):
        if x.dtype != np.uint8 or x.shape[1:] != spec.input_shape or y.shape != x.shape[:1] or not len(y):
            raise DataError(
                f"{where}: {part} images {x.shape} of {x.dtype} with labels {y.shape} are not {name}: "
                f"n > 0 images {spec.input_shape} of uint8 with n labels. Replace them, or change data.root"
            )
        if y.min() < 0 or y.max() >= spec.num_classes:
            raise DataError(
                f"{where}: {part} labels go from {y.min()} to {y.max()}, those of {name} from 0 to "
                f"{spec.num_classes - 1}; change data.root"
            )
    found, published = (len(train[1]), len(test[1])), (spec.train_examples, spec.test_examples)
    if found != published:
        warnings += (
            f"{name}: {where} has {found[0]:,} train and {found[1]:,} test examples, "
            f"the published set {published[0]:,} and {published[1]:,}",
        )
    parts = [Examples(np.ascontiguousarray(x), y.astype(np.int64)) for x, y in (train, test)]
    shape, mean, std = spec.input_shape, spec.mean, spec.std
    return Dataset(name, parts[0], parts[1], spec.num_classes, shape, mean, std, writers, warnings)


@dataclass(frozen=True, eq=False)
class Splits:
    """Rows of `Dataset.train` (int64, ascending): disjoint, and together all of them.

    Args:
        train: what the clients share.
        validation: what `val/…` is measured on.
        server: the server's own data.
    """

    train: Indices
    validation: Indices
    server: Indices


def split(
    dataset: Dataset, validation_fraction: float, server_fraction: float, rng: np.random.Generator
) -> Splits:
    """Set validation and server data aside, stratified by class; `dataset.test` is not looked at.

    The totals are the fractions of `dataset.train`, rounded (at least 1 where a fraction is > 0). Each class
    gives its share rounded down; what is then missing comes from the classes with the largest remainders.

    Args:
        dataset: whose training rows are split.
        validation_fraction: of the training rows, in [0, 1).
        server_fraction: of the training rows, in [0, 1).
        rng: where the rows of a class are drawn from.

    Raises:
        ConfigError: if a fraction is negative or the two leave nothing to train on.
    """
    y = dataset.train.y
    wanted = [max(round(f * len(y)), int(f > 0)) for f in (validation_fraction, server_fraction)]
    if min(validation_fraction, server_fraction) < 0 or sum(wanted) >= len(y):
        raise ConfigError(
            f"data.validation_fraction={validation_fraction} and data.server_fraction={server_fraction} "
            f"leave no client any of the {len(y):,} training examples; both must be ≥ 0, their sum below 1"
        )
    _, class_of, class_sizes = np.unique(y, return_inverse=True, return_counts=True)
    of_validation = _shares(class_sizes, wanted[0], class_sizes)
    of_server = _shares(class_sizes, wanted[1], class_sizes - of_validation)

    shuffled = rng.permutation(len(y))
    by_class = shuffled[np.argsort(class_of[shuffled], kind="stable")]  # rows of class 0, of class 1, …
    class_starts = np.cumsum(class_sizes) - class_sizes
    place = np.arange(len(y)) - np.repeat(class_starts, class_sizes)  # 0, 1, … within each class
    validation_end = np.repeat(of_validation, class_sizes)
    server_end = np.repeat(of_validation + of_server, class_sizes)
    part = np.where(place < validation_end, 1, np.where(place < server_end, 2, 0))
    return Splits(*(np.sort(by_class[part == i]) for i in range(3)))


def _shares(sizes: Indices, total: int, room: Indices) -> Indices:
    """Apportion `total` ≤ room.sum() in proportion to `sizes` by largest remainder, within `room`."""
    quota = sizes * (total / sizes.sum())
    counts: Indices = np.minimum(np.floor(quota).astype(np.int64), room)
    while (missing := total - int(counts.sum())) > 0:
        open_classes = np.flatnonzero(counts < room)
        neediest = np.argsort(-(quota - counts)[open_classes], kind="stable")
        counts[open_classes[neediest[:missing]]] += 1
    return counts


def _idx_files(folder: str) -> str:
    return f"{folder}/raw/{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte[.gz]"


DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(
        load=_load_digits,
        check=lambda root: None,
        input_shape=(1, 8, 8),
        num_classes=10,
        train_examples=1437,
        test_examples=360,
        mean=(0.3054,),
        std=(0.3757,),
        files="nothing: it comes with scikit-learn",
        source="Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (CC BY 4.0)",
    ),
    "mnist": DatasetSpec(
        load=partial(_load_idx, "mnist", "MNIST"),
        check=partial(_check, "mnist"),
        input_shape=(1, 28, 28),
        num_classes=10,
        train_examples=60_000,
        test_examples=10_000,
        mean=(0.1307,),
        std=(0.3081,),
        files=f"{_idx_files('MNIST')} (and MNIST/writers_train.csv.gz for a partition by writer)",
        source="LeCun, Cortes and Burges, The MNIST database of handwritten digits, 1998 (for research)",
        has_writers=True,
    ),
    "fashion_mnist": DatasetSpec(
        load=partial(_load_idx, "fashion_mnist", "FashionMNIST"),
        check=partial(_check, "fashion_mnist"),
        input_shape=(1, 28, 28),
        num_classes=10,
        train_examples=60_000,
        test_examples=10_000,
        mean=(0.2860,),
        std=(0.3530,),
        files=_idx_files("FashionMNIST"),
        source="Xiao, Rasul and Vollgraf, Fashion-MNIST, arXiv:1708.07747, 2017 (MIT)",
    ),
    "cifar10": DatasetSpec(
        load=_load_cifar10,
        check=partial(_check, "cifar10"),
        input_shape=(3, 32, 32),
        num_classes=10,
        train_examples=50_000,
        test_examples=10_000,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        files="cifar-10-batches-py/{data_batch_1..5,test_batch}, or mosaics in cifar-10/",
        source="Krizhevsky, Learning multiple layers of features from tiny images, 2009 (no licence stated)",
    ),
}
