"""Training examples set aside for validation and for the server, stratified by class."""

from dataclasses import dataclass

import numpy as np

from fedray.data.datasets import Dataset
from fedray.data.files import Indices
from fedray.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Splits:
    """Rows of `Dataset.train` (int64, ascending): disjoint, and together all of them.

    Args:
        train: rows of the clients.
        validation: rows that `val/…` is measured on.
        server: rows of the server.
    """

    train: Indices
    validation: Indices
    server: Indices


def set_aside(fraction: float, examples: int) -> int:
    """Return the number of examples in a fraction of them, rounded; at least 1 for a fraction above 0."""
    return max(round(fraction * examples), int(fraction > 0))


def split(
    dataset: Dataset, validation_fraction: float, server_fraction: float, rng: np.random.Generator
) -> Splits:
    """Set validation and server data aside, stratified by class; `dataset.test` is not read.

    The totals are the fractions of `dataset.train`, rounded (at least 1 where a fraction is > 0). Each class
    gives its share rounded down; the rest comes from the classes with the largest remainders.

    Args:
        dataset: whose training rows are split.
        validation_fraction: of the training rows, in [0, 1).
        server_fraction: of the training rows, in [0, 1).
        rng: draws the rows of a class.

    Raises:
        ConfigError: if a fraction is negative or the two leave nothing to train on.
    """
    y = dataset.train.y
    totals = [set_aside(fraction, len(y)) for fraction in (validation_fraction, server_fraction)]
    if min(validation_fraction, server_fraction) < 0 or sum(totals) >= len(y):
        raise ConfigError(
            f"data.validation_fraction={validation_fraction} and data.server_fraction={server_fraction} "
            f"leave no client any of the {len(y):,} training examples; both must be ≥ 0, their sum below 1"
        )
    _, class_of, class_sizes = np.unique(y, return_inverse=True, return_counts=True)
    of_validation = _shares(class_sizes, totals[0], class_sizes)
    of_server = _shares(class_sizes, totals[1], class_sizes - of_validation)

    shuffled = rng.permutation(len(y))
    by_class = shuffled[np.argsort(class_of[shuffled], kind="stable")]  # rows of class 0, of class 1, …
    class_starts = np.cumsum(class_sizes) - class_sizes
    rank = np.arange(len(y)) - np.repeat(class_starts, class_sizes)  # 0, 1, … within each class
    validation_end = np.repeat(of_validation, class_sizes)
    server_end = np.repeat(of_validation + of_server, class_sizes)
    part = np.where(rank < validation_end, 1, np.where(rank < server_end, 2, 0))
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
