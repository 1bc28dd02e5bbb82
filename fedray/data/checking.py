"""A loaded data set is checked against its entry in the table, before anything starts.

A user's examples may have any shape and type, so that an error in them would otherwise show in a worker, far
from its cause.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fedray.data.datasets import DATASETS, Dataset, DatasetSpec, Examples
from fedray.errors import DataError

OURS = frozenset(DATASETS.values())
"""Data sets of the package, which check themselves when they are loaded."""
BLOCK = 4096
"""Examples that are normalised at a time."""


def checked(name: str, spec: DatasetSpec, dataset: object) -> Dataset:
    """Return a loaded data set if a model can be trained on it.

    Args:
        name: as in the table of data sets.
        spec: its entry there.
        dataset: result of `spec.load`.

    Raises:
        DataError: if the two differ, or if examples or labels are malformed.
    """
    if not isinstance(dataset, Dataset):
        raise DataError(f"data.name: {name}: `load` returned {type(dataset).__name__}, not a fedray.Dataset")
    if spec not in OURS and (fault := next(_faults(spec, dataset), None)):
        raise DataError(f"data.name: {name}: {fault}")
    return dataset


def _faults(spec: DatasetSpec, dataset: Dataset) -> Iterator[str]:
    for field in ("input_shape", "num_classes", "tokens"):
        loaded, declared = getattr(dataset, field), getattr(spec, field)
        if loaded != declared:
            yield f"`load` returned a Dataset with {field}={loaded}, but its DatasetSpec has {declared}"
    if not len(dataset.train):
        yield "there are no training examples"
    if dataset.writers is not None and len(dataset.writers) != len(dataset.train):
        yield f"there are {len(dataset.writers):,} writers for {len(dataset.train):,} training examples"
    for part, examples in (("train", dataset.train), ("test", dataset.test)):
        yield from (f"{part} {fault}" for fault in _labels(examples, dataset.num_classes))
        yield from (f"{part} {fault}" for fault in _examples(examples, dataset))


def _labels(examples: Examples, num_classes: int) -> Iterator[str]:
    y = examples.y
    if y.dtype != np.int64 or y.ndim != 1:
        yield f"labels are {y.dtype} of shape {y.shape}; labels are whole numbers (n,), one for each example"
    elif len(y) != len(examples.x):
        yield f"has {len(examples.x):,} examples and {len(y):,} labels"
    elif len(y) and not 0 <= y.min() <= y.max() < num_classes:
        allowed = f"num_classes={num_classes} allows 0 to {num_classes - 1}"
        yield f"labels go from {y.min()} to {y.max()}; {allowed}"


def _examples(examples: Examples, dataset: Dataset) -> Iterator[str]:
    dtype = torch.int64 if dataset.tokens else torch.float32
    for start in range(0, len(examples), BLOCK):
        rows = examples.x[start : start + BLOCK]
        try:
            x: object = dataset.normalise(rows)
        except Exception as error:
            yield f"examples cannot be normalised: {type(error).__name__}: {error}"
            return
        if not isinstance(x, Tensor):
            yield f"examples are {type(x).__name__} when they are normalised, not a tensor"
            return
        if x.dtype != dtype or x.shape != (len(rows), *dataset.input_shape):
            yield (
                f"examples are {_named(x.dtype)} {tuple(x.shape)} when they are normalised; with input_shape="
                f"{dataset.input_shape} and tokens={dataset.tokens} they must be {_named(dtype)} "
                f"{(len(rows), *dataset.input_shape)}"
            )
            return
        if dataset.tokens and not 0 <= int(x.min()) <= int(x.max()) < dataset.tokens:
            allowed = f"tokens={dataset.tokens} allows 0 to {dataset.tokens - 1}"
            yield f"tokens go from {x.min()} to {x.max()}; {allowed}"
        elif not dataset.tokens and not bool(x.isfinite().all()):
            row = start + int(x.flatten(1).isfinite().all(1).logical_not().nonzero()[0])
            yield f"example {row} has NaN or infinity when normalised; replace the value or omit the row"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
