"""Partitions of the training examples among clients: one frozen dataclass per kind.

iid, dirichlet, shards, quantity_skew and natural deal the rows out: every row goes to one client, and every
client gets at least one row. bootstrap lets each client draw its own rows, for more clients than examples.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Protocol

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray
from pydantic import Field

from fedray.data.datasets import DATASETS
from fedray.errors import DataError
from fedray.types import PositiveFloat, PositiveInt

Indices = NDArray[np.int64]
Seed = int | SeedSequence

DEALS = 10
"""Number of random deals that may leave a client empty; the last one is repaired."""


class Partition(ABC):
    """The rows of `Dataset.train` that each client holds.

    Attributes:
        population: number of clients; their ids are 0..population − 1.
        sizes: int64 (population,), examples of each client, ≥ 1.
    """

    population: int
    sizes: Indices

    @abstractmethod
    def rows(self, client: int) -> Indices:
        """Return the rows (int64, ascending, fresh memory) of `client`, at a cost of O(its size).

        Raises:
            IndexError: if there is no such client.
        """

    def set_aside(self, fraction: float, seed: Seed) -> tuple["Partition", "Partition"]:
        """Split the rows of each client into those that it trains on and those that it is tested on.

        No client trains on a row that this or another client is tested on.

        Args:
            fraction: of a client's rows to test on, in (0, 1): rounded, at least one, never all. A client
                with a single row trains on it.
            seed: of this split alone.

        Returns:
            Two partitions of the same clients; in the second, clients may have no rows.

        Raises:
            DataError: if clients share rows.
        """
        rows = [self.rows(client) for client in range(self.population)]
        owner = np.repeat(np.arange(self.population), [len(own) for own in rows])
        return Dealt(np.concatenate(rows), owner, self.population).set_aside(fraction, seed)

    def _known(self, client: int) -> int:
        if not 0 <= client < self.population:
            raise IndexError(f"client {client}: the clients of this partition are 0..{self.population - 1}")
        return int(client)


class Dealt(Partition):
    """Disjoint rows, client after client in one array.

    Args:
        rows: int64 (n,), the rows to deal out.
        owner: int64 (n,), the client of each row.
        population: number of clients.
    """

    def __init__(self, rows: Indices, owner: Indices, population: int) -> None:
        self.population = population
        self.sizes = np.bincount(owner, minlength=population)
        self._indices = rows[np.lexsort((rows, owner))]
        self._offsets = np.concatenate(([0], np.cumsum(self.sizes)))

    def rows(self, client: int) -> Indices:
        """Return the rows dealt to `client`."""
        start = self._known(client)
        return self._indices[self._offsets[start] : self._offsets[start + 1]].copy()

    def set_aside(self, fraction: float, seed: Seed) -> tuple["Dealt", "Dealt"]:
        """Draw the rows to test on from each client's rows."""
        if len(np.unique(self._indices)) < len(self._indices):
            raise DataError(
                f"data.client_test_fraction={fraction:g}: clients of this partition share examples, so that "
                "one would train on what another is tested on; set it to 0, or change data.partition"
            )
        tested = shares(self.sizes, fraction)
        owner = np.repeat(np.arange(self.population), self.sizes)
        order = np.lexsort((default_rng(seed).random(len(owner)), owner))
        is_tested = np.empty(len(owner), dtype=bool)
        is_tested[order] = np.arange(len(owner)) - self._offsets[owner] < tested[owner]
        trained, held = (
            Dealt(self._indices[which], owner[which], self.population) for which in (~is_tested, is_tested)
        )
        return trained, held


class Drawn(Partition):
    """Rows that each client draws from all, with replacement, when asked; nothing is stored per client.

    Args:
        rows: rows to draw from.
        examples: number of rows that each client draws.
        population: number of clients.
        seed: client k draws with the generator of `seed` and k.
    """

    def __init__(self, rows: Indices, examples: int, population: int, seed: Seed) -> None:
        self.population = population
        self.sizes = np.broadcast_to(np.int64(examples), (population,))
        self._rows, self._examples = rows, examples
        self._seed = seed if isinstance(seed, SeedSequence) else SeedSequence(seed)

    def rows(self, client: int) -> Indices:
        """Return the rows that `client` draws, the same ones each time; some may come twice."""
        key = (*self._seed.spawn_key, self._known(client))
        rng = default_rng(SeedSequence(self._seed.entropy, spawn_key=key))
        return np.sort(self._rows[rng.integers(len(self._rows), size=self._examples)])

    def set_aside(self, fraction: float, seed: Seed) -> tuple["Drawn", "Drawn"]:
        """Split the rows to draw from: what clients train on comes from one part, the rest from the other."""
        rows = default_rng(seed).permutation(self._rows)
        of_all, of_each = (int(shares(np.array([n]), fraction)[0]) for n in (len(rows), self._examples))
        trained = Drawn(np.sort(rows[of_all:]), self._examples - of_each, self.population, self._seed)
        return trained, Drawn(np.sort(rows[:of_all]), of_each if of_all else 0, self.population, seed)

    def __reduce__(self) -> tuple[type["Drawn"], tuple[Indices, int, int, SeedSequence]]:
        """Pickle the four arguments: `sizes` would be written out in full."""
        return type(self), (self._rows, self._examples, self.population, self._seed)


def shares(sizes: Indices, fraction: float) -> Indices:
    """Return a fraction of each size, rounded: at least one, and less than all, so that 1 has none."""
    tested: Indices = np.minimum(np.maximum(np.rint(fraction * sizes).astype(np.int64), 1), sizes - 1)
    return tested


class PartitionKind(Protocol):
    """The interface of every entry of PARTITIONS."""

    def split(
        self, labels: Indices, writers: Indices | None, rows: Indices, population: int, seed: Seed
    ) -> Partition:
        """Give `rows` to `population` clients; the same arguments give the same partition.

        Args:
            labels: (n,), of all training examples.
            writers: (n,), of all training examples, or None.
            rows: rows to give out; distinct indices into `labels`.
            population: number of clients, ≥ 1.
            seed: of this partition alone.

        Raises:
            DataError: if the rows cannot be given out in this way.
        """


@dataclass(frozen=True)
class Iid:
    """Rows at random, sizes equal to within one."""

    def split(
        self, labels: Indices, writers: Indices | None, rows: Indices, population: int, seed: Seed
    ) -> Partition:
        """Deal shuffled rows round and round."""
        _enough(rows, population)
        return Dealt(rows, default_rng(seed).permutation(len(rows)) % population, population)


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: each class is shared out by proportions ~ Dirichlet(alpha) over the clients.

    Yurochkin et al., Bayesian nonparametric federated learning, ICML 2019; without the cap on sizes that some
    codes add. A deal that leaves a client empty is drawn again, up to DEALS deals in all; the last one is
    repaired: each empty client gets one random example of the client that then has most.

    Args:
        alpha: concentration; 0.1 leaves few classes per client, 100 is nearly iid.
    """

    alpha: PositiveFloat = 0.5

    def split(
        self, labels: Indices, writers: Indices | None, rows: Indices, population: int, seed: Seed
    ) -> Partition:
        """Deal each class by separate proportions."""
        _enough(rows, population)
        rng, of_rows = default_rng(seed), labels[rows]
        classes = [np.flatnonzero(of_rows == label) for label in np.unique(of_rows)]

        def deal() -> Indices:
            owner = np.empty(len(rows), dtype=np.int64)
            for members in classes:
                owner[rng.permutation(members)] = _owners(len(members), population, self.alpha, rng)
            return owner

        return Dealt(rows, _nobody_empty(deal, population, rng), population)


@dataclass(frozen=True)
class Shards:
    """Label skew: each client holds one shard of each of `classes_per_client` classes, no more and no fewer.

    After McMahan et al., Communication-efficient learning of deep networks from decentralized data, AISTATS
    2017. They cut the rows, sorted by label, into equal shards, some of which then hold two labels, and may
    deal a client two shards of one label. Here a shard has one label, the shards of a client have different
    ones, and shards are as equal as that allows.

    Args:
        classes_per_client: at most the number of classes.
    """

    classes_per_client: PositiveInt = 2

    def split(
        self, labels: Indices, writers: Indices | None, rows: Indices, population: int, seed: Seed
    ) -> Partition:
        """Cut each class into shards and deal these."""
        _enough(rows, population)
        rng, of_rows = default_rng(seed), labels[rows]
        _, class_of, class_sizes = np.unique(of_rows, return_inverse=True, return_counts=True)
        counts = self._shards_per_class(class_sizes, population)
        holders: list[list[int]] = [[] for _ in counts]
        unassigned = counts.copy()
        for client in range(population):
            # the classes with most unassigned shards, ties at random: no class ends with more than clients
            chosen = np.lexsort((rng.random(len(unassigned)), -unassigned))[: self.classes_per_client]
            unassigned[chosen] -= 1
            for c in chosen:
                holders[c].append(client)
        owner = np.empty(len(rows), dtype=np.int64)
        for c, size in enumerate(class_sizes):
            shard = np.arange(size) * counts[c] // size
            owner[rng.permutation(np.flatnonzero(class_of == c))] = np.array(holders[c])[shard]
        return Dealt(rows, owner, population)

    def _shards_per_class(self, class_sizes: Indices, population: int) -> Indices:
        """Return the number of shards of each class: 1 or more, at most one for each client and row."""
        total, most = population * self.classes_per_client, np.minimum(class_sizes, population)
        if not len(class_sizes) <= total <= most.sum():
            raise DataError(
                f"data.partition.classes_per_client={self.classes_per_client} for "
                f"clients.population={population} makes {total:,} shards of one class each; the "
                f"{class_sizes.sum():,} training examples of {len(class_sizes)} classes allow "
                f"{len(class_sizes)} to {most.sum():,}. Change either"
            )
        counts = np.ones_like(class_sizes)
        for _ in range(total - len(counts)):
            counts[np.argmax(np.where(counts < most, class_sizes / counts, 0))] += 1
        return counts


@dataclass(frozen=True)
class QuantitySkew:
    """Labels at random, sizes in proportions ~ Dirichlet(alpha) over the clients.

    Li et al., Federated learning on non-IID data silos, ICDE 2022. Empty clients are treated as in Dirichlet.

    Args:
        alpha: concentration; 0.5 leaves some clients with a few examples, 100 is nearly equal.
    """

    alpha: PositiveFloat = 0.5

    def split(
        self, labels: Indices, writers: Indices | None, rows: Indices, population: int, seed: Seed
    ) -> Partition:
        """Deal shuffled rows by one vector of proportions."""
        _enough(rows, population)
        rng = default_rng(seed)

        def deal() -> Indices:
            return rng.permutation(_owners(len(rows), population, self.alpha, rng))

        return Dealt(rows, _nobody_empty(deal, population, rng), population)


@dataclass(frozen=True)
class Natural:
    """Whole writers: a client holds all rows of its writers, whose numbers are equal to within one."""

    def split(
        self, labels: Indices, writers: Indices | None, rows: Indices, population: int, seed: Seed
    ) -> Partition:
        """Deal shuffled writers round and round."""
        if writers is None:
            known = ", ".join(name for name, spec in DATASETS.items() if spec.has_writers)
            raise DataError(
                "data.partition.kind=natural: this data set does not name the writers of its examples; these "
                f"can: {known} (with its file of writers in data.root). "
                "Change data.name, data.root or the kind"
            )
        _enough(rows, population)
        ids, writer_of = np.unique(writers[rows], return_inverse=True)
        if population > len(ids):
            raise DataError(
                f"population {population}, but only {len(ids):,} writers have training examples; "
                f"lower clients.population, or change data.partition.kind"
            )
        client_of = default_rng(seed).permutation(len(ids)) % population
        return Dealt(rows, client_of[writer_of], population)


@dataclass(frozen=True)
class Bootstrap:
    """Each client draws its rows from all, with replacement: clients overlap, and there may be any number.

    Args:
        examples: number of each client's examples; at most 10 million, since they must fit in memory.
    """

    examples: Annotated[PositiveInt, Field(le=10_000_000)] = 60

    def split(
        self, labels: Indices, writers: Indices | None, rows: Indices, population: int, seed: Seed
    ) -> Partition:
        """Draw nothing yet: `Drawn.rows` does."""
        return Drawn(rows, self.examples, population, seed)


def _enough(rows: Indices, population: int) -> None:
    if population > len(rows):
        raise DataError(
            f"population {population}, but only {len(rows):,} training examples are left for the clients; "
            f"lower clients.population, or use data.partition.kind=bootstrap"
        )


def _owners(count: int, population: int, alpha: float, rng: Generator) -> Indices:
    """Return the client (ascending) of each of `count` examples, in proportions ~ Dirichlet(alpha)."""
    # beyond 1e9 the shares are equal to the last example, and the sum behind them could overflow
    ends = np.cumsum(rng.dirichlet(np.full(population, min(alpha, 1e9))))
    owners = np.searchsorted(ends, (np.arange(count) + 0.5) / count)
    return np.minimum(owners, population - 1)  # the last end may round to less than 1


def _nobody_empty(deal: Callable[[], Indices], population: int, rng: Generator) -> Indices:
    """Return a deal in which every client owns something: redrawn, and finally repaired (see Dirichlet)."""
    for _ in range(DEALS):
        owner = deal()
        sizes = np.bincount(owner, minlength=population)
        if sizes.min() > 0:
            return owner
    for client in np.flatnonzero(sizes == 0):
        richest = sizes.argmax()
        owner[rng.choice(np.flatnonzero(owner == richest))] = client
        sizes[richest] -= 1
        sizes[client] += 1
    return owner


PARTITIONS: dict[str, type[PartitionKind]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "shards": Shards,
    "quantity_skew": QuantitySkew,
    "natural": Natural,
    "bootstrap": Bootstrap,
}
