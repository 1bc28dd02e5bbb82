"""Data sets of any shape. The package has loaders of eight; only the digits come with it.

Examples stay as they were loaded (pixels: uint8) until a client takes its rows: `Dataset.normalise`. MNIST,
Fashion-MNIST, CIFAR-10 and CIFAR-100 are read as torchvision lays them out, which downloads missing ones;
CIFAR-10 also from lossless mosaics: see `files`. FEMNIST and Shakespeare are read as LEAF writes them: see
`leaf`. Nothing downloads these two and Tiny ImageNet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedray.data.files import (
    CIFAR10_MD5,
    Indices,
    Labelled,
    cache,
    download,
    read_batches,
    read_cifar100,
    read_idx,
    read_mosaics,
    read_tiny_imagenet,
    read_writers,
    zipped_or_not,
)
from fedray.data.leaf import LETTERS, read_femnist, read_shakespeare
from fedray.errors import DataError

Content = tuple[Labelled, Labelled, Indices | None]
"""Training examples, test examples, and the writer of each training example where it is known."""

DIGITS_TRAIN = 1437
DIGITS = Path(__file__).with_name("digits.npz")
"""The images that scikit-learn has too, where loading them takes an import of seconds."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples and their labels; tensors are taken as arrays.

    Args:
        x: (n, …), one row for each example, of any float or integer type; may be read-only. Images are uint8
            (n, channels, height, width) in 0..255.
        y: int64 (n,), in 0..num_classes − 1.
    """

    x: NDArray[Any]
    y: Indices

    def __post_init__(self) -> None:
        """Turn tensors into arrays, and labels of another integer type into int64."""
        x, y = (np.asarray(values) for values in (self.x, self.y))
        object.__setattr__(self, "x", x)
        object.__setattr__(self, "y", y.astype(np.int64) if y.dtype.kind in "iu" else y)

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory.

    Args:
        name: as in DATASETS.
        train: shared out to validation, server and clients.
        test: read once, after the last round.
        num_classes: labels are 0..num_classes − 1.
        input_shape: shape of one example as a model takes it: (channels, height, width) of an image,
            (features,) of a row of a table, (length,) of tokens, (channels, length) of a signal.
        mean: for each entry of the first dimension of an example (channel, feature); for uint8 in units of
            x/255. Empty: examples are not scaled.
        std: as `mean`, > 0.
        writers: int64 (len(train),), the author of each training example; None where unknown.
        warnings: notes for the readers of a run.
        tokens: 0 for numbers; else examples are whole numbers in 0..tokens − 1, which a model embeds.
        prepare: another normalisation: rows of `Examples.x` → tensor (n, *input_shape), float32 or, for
            tokens, int64, in fresh memory. A function at the top of a module, so that workers find it.
    """

    name: str
    train: Examples
    test: Examples
    num_classes: int
    input_shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    writers: Indices | None = None
    warnings: tuple[str, ...] = ()
    tokens: int = 0
    prepare: Callable[[NDArray[Any]], Tensor] | None = None

    def normalise(self, x: NDArray[Any]) -> Tensor:
        """Return examples as a model takes them: (x − mean)/std as float32, or tokens as int64.

        Args:
            x: (n, …), rows of `Examples.x`; for uint8, x/255 is normalised.

        Returns:
            (n, *input_shape), in fresh memory.
        """
        if self.prepare is not None:
            return self.prepare(x)
        if self.tokens:
            return torch.from_numpy(x.astype(np.int64, order="C"))
        out = x.astype(np.float32, order="C")
        if self.std:
            factor, shift = _scale(self.mean, self.std, 255 if x.dtype == np.uint8 else 1, x.ndim - 2)
            out *= factor
            out -= shift
        return torch.from_numpy(out)


@lru_cache
def _scale(
    mean: tuple[float, ...], std: tuple[float, ...], unit: int, trailing: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what numbers are multiplied by, and what is then subtracted; one for each channel."""
    deviation = np.array(std, dtype=np.float64).reshape(-1, *(1,) * trailing)
    shift = np.array(mean, dtype=np.float64).reshape(deviation.shape) / deviation
    return (1 / (unit * deviation)).astype(np.float32), shift.astype(np.float32)


def _no_check(root: Path | None) -> None:
    """Accept any `data.root`."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """A data set before it is loaded: its shape, its size, and how to load it.

    Args:
        load: `load(root)` → Dataset, from the folder `root` or the default cache; downloads missing files.
            Raises DataError for files that are missing, unreadable or do not fit each other.
        input_shape: as in Dataset.
        num_classes: number of labels.
        train_examples: in the published set; None where the options of its scripts decide it.
        test_examples: as `train_examples`.
        tokens: as in Dataset.
        check: `check(root)` raises DataError at once if `root` cannot be loaded from.
        mean: of the published training set, as in Dataset.
        std: as `mean`.
        files: content of a `data.root`.
        source: citation and licence.
        has_writers: whether `Dataset.writers` can be known.
    """

    load: Callable[[Path | None], Dataset]
    input_shape: tuple[int, ...]
    num_classes: int
    train_examples: int | None
    test_examples: int | None
    tokens: int = 0
    check: Callable[[Path | None], None] = _no_check
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    files: str = "nothing"
    source: str = ""
    has_writers: bool = False


def _load_digits(root: Path | None) -> Dataset:
    """Load the digits of this package, 1,437 of them to train on; `root` is ignored."""
    with np.load(DIGITS) as file:
        images, labels = file["images"], file["labels"]  # uint8 (1797, 8, 8) in 0..16
    x = np.rint(images[:, None] * (255 / 16)).astype(np.uint8)
    # numpy froze the stream of RandomState, not that of Generator: so this split never changes
    order = np.random.RandomState(0).permutation(len(x))
    train, test = np.split(order, [DIGITS_TRAIN])
    return _dataset("digits", (x[train], labels[train]), (x[test], labels[test]), DIGITS.name)


def _load_idx(name: str, folder: str, root: Path | None) -> Dataset:
    """Load MNIST or Fashion-MNIST from the idx files, zipped or not, in ROOT/`folder`/raw."""
    root = _root(name, root)
    raw = root / folder / "raw"
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if not all(zipped_or_not(raw, stem).exists() for stem in stems):
        download(name, folder, f"{folder}/raw", root, needed=DATASETS[name].files)
    x, y, test_x, test_y = (
        read_idx(zipped_or_not(raw, stem), axes=3 if "idx3" in stem else 1) for stem in stems
    )
    writers = read_writers(root / folder / "writers_train.csv.gz", y) if DATASETS[name].has_writers else None
    return _dataset(name, (x[:, None], y), (test_x[:, None], test_y), str(raw), writers)


def _load_cifar10(root: Path | None) -> Dataset:
    """Load CIFAR-10 from ROOT/cifar-10-batches-py, or else from the mosaics in ROOT/cifar-10."""
    root = _root("cifar10", root)
    batches, mosaics = root / "cifar-10-batches-py", root / "cifar-10"
    if not all((batches / name).exists() for name in CIFAR10_MD5):
        if (mosaics / "labels.npz").exists():
            return _load_mosaics(mosaics)
        download("cifar10", "CIFAR10", batches.name, root, needed=DATASETS["cifar10"].files)
    train, test, changed = read_batches(batches)
    warning = f"cifar10: {', '.join(changed)} in {batches} are not the published files (their MD5 differs)"
    return _dataset("cifar10", train, test, str(batches), warnings=(warning,) if changed else ())


def _load_files(name: str, read: Callable[[Path], Content], root: Path | None) -> Dataset:
    """Load a data set whose files one function reads."""
    root = _root(name, root)
    train, test, writers = read(root)
    return _dataset(name, train, test, str(root), writers)


def _load_mosaics(folder: Path) -> Dataset:
    """Load CIFAR-10 from `train_NN.webp` and `test_NN.webp`, 1,000 images each, and `labels.npz`."""
    train, test = read_mosaics(folder)
    warning = f"cifar10: {folder} holds mosaics, whose content the published MD5s cannot vouch for"
    lossy = folder.parent / "cifar10_lossy_indices.json"
    if lossy.exists():
        warning += f"; {lossy} lists the images that are lossy copies"
    return _dataset("cifar10", train, test, str(folder), warnings=(warning,))


def _check(name: str, root: Path | None) -> None:
    if root is not None and not root.expanduser().is_dir():
        raise DataError(
            f"data.root: {str(root)!r} is not a folder; {name} needs one with {DATASETS[name].files}. "
            f"Change data.root, or leave it out for {cache()}"
        )


def _root(name: str, root: Path | None) -> Path:
    """Return the folder to read: `root` where given, else the default cache."""
    _check(name, root)
    return cache() if root is None else root.expanduser()


def _dataset(
    name: str,
    train: Labelled,
    test: Labelled,
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
    if None not in published and found != published:
        warnings += (
            f"{name}: {where} has {found[0]:,} train and {found[1]:,} test examples, "
            f"the published set {published[0]:,} and {published[1]:,}",
        )
    parts = [Examples(np.ascontiguousarray(x), y.astype(np.int64)) for x, y in (train, test)]
    shape, mean, std, tokens = spec.input_shape, spec.mean, spec.std, spec.tokens
    return Dataset(
        name, parts[0], parts[1], spec.num_classes, shape, mean, std, writers, warnings, tokens=tokens
    )


def _idx_files(folder: str) -> str:
    return f"{folder}/raw/{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte[.gz]"


DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(
        load=_load_digits,
        input_shape=(1, 8, 8),
        num_classes=10,
        train_examples=DIGITS_TRAIN,
        test_examples=360,
        mean=(0.3054,),
        std=(0.3757,),
        files="nothing: it comes with fedray",
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
    "cifar100": DatasetSpec(
        load=partial(_load_files, "cifar100", read_cifar100),
        check=partial(_check, "cifar100"),
        input_shape=(3, 32, 32),
        num_classes=100,
        train_examples=50_000,
        test_examples=10_000,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        files="cifar-100-python/{train,test}",
        source="Krizhevsky, Learning multiple layers of features from tiny images, 2009 (no licence stated)",
    ),
    "femnist": DatasetSpec(
        load=partial(_load_files, "femnist", read_femnist),
        check=partial(_check, "femnist"),
        input_shape=(1, 28, 28),
        num_classes=62,
        train_examples=None,
        test_examples=None,
        mean=(0.1307,),
        std=(0.3081,),
        files="femnist/{train,test}/*.json, as LEAF's preprocess.sh (-s niid -t sample) writes them",
        source="Caldas et al., LEAF, arXiv:1812.01097, 2018; Cohen et al., EMNIST, 2017 (for research)",
        has_writers=True,
    ),
    "tiny_imagenet": DatasetSpec(
        load=partial(_load_files, "tiny_imagenet", read_tiny_imagenet),
        check=partial(_check, "tiny_imagenet"),
        input_shape=(3, 64, 64),
        num_classes=200,
        train_examples=100_000,
        test_examples=10_000,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        files="tiny-imagenet-200/{train/*/images,val}, the unzipped archive",
        source="Le and Yang, Tiny ImageNet visual recognition challenge, 2015 (for research)",
    ),
    "shakespeare": DatasetSpec(
        load=partial(_load_files, "shakespeare", read_shakespeare),
        check=partial(_check, "shakespeare"),
        input_shape=(80,),
        num_classes=len(LETTERS),
        train_examples=None,
        test_examples=None,
        tokens=len(LETTERS),
        files="shakespeare/{train,test}/*.json, as LEAF's preprocess.sh writes them",
        source="Caldas et al., LEAF, arXiv:1812.01097, 2018; the plays are free",
        has_writers=True,
    ),
}
