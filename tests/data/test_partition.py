"""Partitions: who holds which rows."""

import pickle

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.random import SeedSequence
from pydantic import TypeAdapter, ValidationError

from fedray.data import PARTITIONS, Partition
from fedray.data.partition import Bootstrap, Dirichlet, Iid, Natural, QuantitySkew, Shards
from fedray.errors import DataError

DEALING = (
    Iid(),
    Dirichlet(0.5),
    Dirichlet(1e-8),
    QuantitySkew(0.5),
    QuantitySkew(1e-3),
    Shards(1),
    Shards(2),
    Natural(),
)


def holdings(partition: Partition) -> list[list[int]]:
    return [partition.rows(k).tolist() for k in range(partition.population)]


def balanced(classes=10, each=60) -> np.ndarray:
    return np.random.default_rng(5).permutation(np.repeat(np.arange(classes), each))


@st.composite
def deals(draw):
    """Labels, writers, some of their rows in any order, and a population for them."""
    n = draw(st.integers(12, 120))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = rng.permutation(np.arange(n) % draw(st.integers(2, 4)))
    writers = rng.permutation(np.arange(n) % draw(st.integers(6, 12))) * 37
    rows = rng.permutation(n)[: draw(st.integers(n // 2, n))]
    distinct = len(np.unique(writers[rows]))
    assume(distinct >= 4)  # natural needs a writer for each client
    return labels, writers, rows, draw(st.integers(4, max(4, min(distinct, len(rows) // 2))))


@pytest.mark.parametrize("kind", DEALING, ids=str)
@settings(deadline=None, max_examples=50)
@given(deal=deals(), seed=st.integers(0, 2**64))
def test_a_deal_is_disjoint_covering_without_empty_clients_and_reproducible(kind, deal, seed):
    labels, writers, rows, population = deal
    try:
        partition = kind.split(labels, writers, rows, population, seed)
    except DataError as error:  # few rows of few classes may not make the shards
        assert isinstance(kind, Shards) and "shards of one class" in str(error)
        return
    held = holdings(partition)
    assert sorted(row for client in held for row in client) == sorted(rows.tolist())
    assert partition.population == population == len(held)
    assert partition.sizes.dtype == np.int64 and partition.sizes.tolist() == [len(client) for client in held]
    assert partition.sizes.min() >= 1
    assert all(client == sorted(client) for client in held)
    assert partition.rows(0).dtype == np.int64
    for again in (
        kind.split(labels, writers, rows, population, SeedSequence(seed)),
        pickle.loads(pickle.dumps(partition)),
    ):
        assert holdings(again) == held


@pytest.mark.parametrize("kind", [*DEALING, Bootstrap(20)], ids=str)
def test_another_seed_gives_another_partition(kind):
    labels, rows = balanced(), np.arange(600)
    first, second = (kind.split(labels, np.arange(600) // 12, rows, 20, seed) for seed in (0, 1))
    assert holdings(first) != holdings(second)


@pytest.mark.parametrize("kind", [Iid(), Bootstrap(7)], ids=str)
def test_rows_are_the_callers_to_change_and_only_for_clients_that_exist(kind):
    partition = kind.split(balanced(), None, np.arange(600), 20, 0)
    before = partition.rows(3).tolist()
    partition.rows(3).fill(-1)
    assert partition.rows(3).tolist() == partition.rows(np.int64(3)).tolist() == before
    for client in (-1, 20):
        with pytest.raises(IndexError, match=rf"client {client}: .*0\.\.19"):
            partition.rows(client)


@pytest.mark.parametrize("kind", [Iid(), Dirichlet(5.0), Shards(1), QuantitySkew(5.0)], ids=str)
def test_rows_of_one_class_are_shuffled_before_they_are_dealt(kind):
    partition = kind.split(np.zeros(400, np.int64), None, np.arange(400), 4, 0)
    for k in range(4):  # a run of neighbours would have gaps of one only
        assert np.diff(partition.rows(k)).max() > 1


@pytest.mark.parametrize("kind", [k for k in DEALING if not isinstance(k, Natural)], ids=str)
def test_more_clients_than_examples(kind):
    with pytest.raises(DataError, match=r"population 5000, but only 1,294 training .*kind=bootstrap"):
        kind.split(np.zeros(1437, np.int64), None, np.arange(1294), 5000, 0)


@pytest.mark.parametrize("kind", [Iid(), Dirichlet(0.1), QuantitySkew(0.1), Shards(1), Natural()], ids=str)
def test_as_many_clients_as_examples_get_one_each(kind):
    partition = kind.split(balanced(5, 8), np.arange(40), np.arange(40), 40, 0)
    assert partition.sizes.tolist() == [1] * 40


# ------------------------------------------------------------------------------------------------ iid


@given(n=st.integers(1, 300), population=st.integers(1, 300))
@settings(deadline=None, max_examples=50)
def test_iid_sizes_are_equal_to_within_one(n, population):
    if population <= n:
        sizes = Iid().split(np.zeros(n, np.int64), None, np.arange(n), population, 0).sizes
        assert sizes.max() - sizes.min() <= 1


# ------------------------------------------------------------------------------------------------ dirichlet


def largest_class_share(partition: Partition, labels: np.ndarray) -> float:
    """Mean over the clients of the share of their most frequent class; 1/classes where it is even."""
    return float(
        np.mean([np.bincount(labels[partition.rows(k)]).max() / partition.sizes[k] for k in range(20)])
    )


def test_dirichlet_skew_grows_as_alpha_falls():
    labels = balanced(10, 600)
    skew = [
        largest_class_share(Dirichlet(alpha).split(labels, None, np.arange(6000), 20, 0), labels)
        for alpha in (1000.0, 5.0, 0.5, 0.05)
    ]
    assert skew == sorted(skew) and skew[0] < 0.13 and skew[-1] > 0.6


@pytest.mark.parametrize("alpha", [1e15, 1e308])
def test_a_huge_alpha_shares_every_class_out_evenly(alpha):
    labels = balanced(4, 100)
    partition = Dirichlet(alpha).split(labels, None, np.arange(400), 10, 0)
    for k in range(10):
        assert np.bincount(labels[partition.rows(k)]).tolist() == [10] * 4
    assert QuantitySkew(alpha).split(labels, None, np.arange(400), 10, 0).sizes.tolist() == [40] * 10


@pytest.mark.parametrize("kind", [Dirichlet(1e-9), QuantitySkew(1e-9)], ids=str)
def test_who_has_most_gives_single_examples_to_the_empty(kind):
    # so small an alpha gives all ten examples of the one class to one client; three then get one each
    partition = kind.split(np.zeros(10, np.int64), None, np.arange(10), 4, 0)
    assert sorted(partition.sizes.tolist()) == [1, 1, 1, 7]


def test_dirichlet_shares_each_class_by_proportions_of_its_own():
    labels = balanced(3, 500)
    partition = Dirichlet(0.5).split(labels, None, np.arange(1500), 5, 2)
    counts = np.array([np.bincount(labels[partition.rows(k)], minlength=3) for k in range(5)])
    assert counts.sum(axis=0).tolist() == [500] * 3
    assert len({tuple(column) for column in counts.T.tolist()}) == 3


# ------------------------------------------------------------------------------------------------ shards


def test_shards_by_hand():
    # 4 classes of 6 rows for 6 clients of 2 shards: 12 shards, 3 a class, 2 rows each
    labels = balanced(4, 6)
    partition = Shards(2).split(labels, None, np.arange(24), 6, 0)
    for k in range(6):
        assert sorted(np.unique(labels[partition.rows(k)], return_counts=True)[1].tolist()) == [2, 2]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    per_client=st.integers(1, 8),
    population=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_every_client_holds_exactly_its_number_of_classes(sizes, per_client, population, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    shards, most = population * per_client, sum(min(size, population) for size in sizes)
    if population > len(labels) or not len(sizes) <= shards <= most:
        with pytest.raises(DataError):
            Shards(per_client).split(labels, None, np.arange(len(labels)), population, seed)
        return
    partition = Shards(per_client).split(labels, None, np.arange(len(labels)), population, seed)
    classes = [len(np.unique(labels[partition.rows(k)])) for k in range(population)]
    assert classes == [per_client] * population
    assert int(partition.sizes.sum()) == len(labels)


def test_shards_of_mnist_like_classes_are_nearly_equal_and_pair_many_classes():
    sizes = np.array([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949])  # of MNIST
    labels = np.repeat(np.arange(10), sizes)
    partition = Shards(2).split(labels, None, np.arange(60_000), 100, 0)
    assert partition.sizes.min() > 570 and partition.sizes.max() < 630  # 600 ± 5 %
    pairs = {tuple(np.unique(labels[partition.rows(k)])) for k in range(100)}
    assert len(pairs) > 30  # of 45


def test_more_classes_a_client_than_there_are():
    with pytest.raises(
        DataError, match=r"classes_per_client=11 .*clients\.population=20 makes 220 .*10 to 200"
    ):
        Shards(11).split(balanced(), None, np.arange(600), 20, 0)


# ------------------------------------------------------------------------------------------------ quantity


def test_quantity_skew_grows_as_alpha_falls_and_leaves_labels_alone():
    labels = balanced(10, 600)
    partitions = [
        QuantitySkew(alpha).split(labels, None, np.arange(6000), 20, 0) for alpha in (500.0, 5.0, 0.3)
    ]
    spread = [float(p.sizes.std()) for p in partitions]
    assert spread == sorted(spread) and spread[0] < 30 and spread[-1] > 200
    richest = partitions[-1].rows(int(partitions[-1].sizes.argmax()))
    assert np.bincount(labels[richest]).max() / len(richest) < 0.15


# ------------------------------------------------------------------------------------------------ natural


@settings(deadline=None, max_examples=50)
@given(deal=deals(), seed=st.integers(0, 2**32))
def test_natural_keeps_writers_whole_and_deals_them_evenly(deal, seed):
    labels, writers, rows, population = deal
    partition = Natural().split(labels, writers, rows, population, seed)
    held = [set(writers[partition.rows(k)].tolist()) for k in range(population)]
    assert sum(len(ids) for ids in held) == len(np.unique(writers[rows]))  # nobody is in two places
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_natural_with_too_few_writers_or_none():
    labels, writers = balanced(), np.arange(600) // 100
    with pytest.raises(DataError, match=r"population 7, but only 6 writers"):
        Natural().split(labels, writers, np.arange(600), 7, 0)
    with pytest.raises(DataError, match="population 3, but only 2 writers"):  # those with rows to deal
        Natural().split(labels, writers, np.arange(150), 3, 0)
    with pytest.raises(DataError, match=r"does not name the writers of its examples; these can: mnist, "):
        Natural().split(labels, None, np.arange(600), 3, 0)


# ------------------------------------------------------------------------------------------------ bootstrap


def test_bootstrap_draws_for_each_client_by_itself():
    rows = np.arange(100, 400)
    partition = Bootstrap(50).split(np.zeros(500, np.int64), None, rows, 1000, 9)
    first = partition.rows(0)
    assert first.shape == (50,) and set(first.tolist()) <= set(rows.tolist()) and first.dtype == np.int64
    np.testing.assert_array_equal(partition.rows(0), first)
    assert not np.array_equal(partition.rows(1), first)
    # a client's rows do not depend on how many others there are
    np.testing.assert_array_equal(Bootstrap(50).split(rows, None, rows, 3, 9).rows(2), partition.rows(2))
    # nor do children of one seed share them
    parent = SeedSequence(9)
    a, b = (Bootstrap(50).split(rows, None, rows, 3, child).rows(2) for child in parent.spawn(2))
    assert not np.array_equal(a, b)


def test_a_million_clients_cost_nothing():
    partition = Bootstrap().split(np.zeros(10, np.int64), None, np.arange(10), 1_000_000, SeedSequence(1))
    assert partition.sizes.shape == (1_000_000,) and partition.sizes.strides == (0,)
    payload = pickle.dumps(partition)
    assert len(payload) < 2000
    again = pickle.loads(payload)
    assert again.sizes.strides == (0,) and again.sizes[999_999] == 60
    np.testing.assert_array_equal(again.rows(999_999), partition.rows(999_999))


def test_bootstrap_uses_every_row_about_equally():
    partition = Bootstrap(60).split(np.zeros(10, np.int64), None, np.arange(10), 500, 0)
    counts = sum(np.bincount(partition.rows(k), minlength=10) for k in range(500))
    assert np.all(np.abs(counts - 3000) < 6 * np.sqrt(3000 * 0.9))


# ------------------------------------------------------------------------------------------------ table


def test_the_table_makes_every_kind_with_its_defaults():
    assert list(PARTITIONS) == ["iid", "dirichlet", "shards", "quantity_skew", "natural", "bootstrap"]
    for kind in PARTITIONS.values():
        assert TypeAdapter(kind).validate_python({}) == kind()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dirichlet", {"alpha": 0.0}),
        ("dirichlet", {"alpha": float("inf")}),
        ("quantity_skew", {"alpha": -1.0}),
        ("shards", {"classes_per_client": 0}),
        ("bootstrap", {"examples": 0}),
    ],
)
def test_options_out_of_range_are_refused(kind, options):
    with pytest.raises(ValidationError):
        TypeAdapter(PARTITIONS[kind]).validate_python(options)
