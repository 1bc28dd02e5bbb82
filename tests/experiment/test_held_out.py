"""Clients are tested on examples of theirs that nobody trains on."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.data.partition import PARTITIONS, Dealt, Drawn, Partition, shares
from fedray.errors import ConfigError, DataError
from fedray.experiment.run import Federation, resume, run
from fedray.federation.worker import Worker
from tests.experiment import tiny


def test_shares_are_rounded_at_least_one_and_never_all():
    sizes = np.array([1, 2, 3, 4, 10, 14])
    np.testing.assert_array_equal(shares(sizes, 0.25), [0, 1, 1, 1, 2, 4])
    np.testing.assert_array_equal(shares(sizes, 0.99), [0, 1, 2, 3, 9, 13])
    np.testing.assert_array_equal(shares(sizes, 1e-9), [0, 1, 1, 1, 1, 1])


@given(
    kind=st.sampled_from(["iid", "dirichlet", "shards", "quantity_skew", "bootstrap"]),
    population=st.integers(5, 30),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_no_row_is_trained_on_and_tested_on(kind, population, fraction, seed):
    labels, rows = np.arange(200) % 5, np.arange(10, 200)
    whole = PARTITIONS[kind]().split(labels, None, rows, population, seed)
    trained, tested = whole.set_aside(fraction, seed)
    ids = range(population)
    on = [set(trained.rows(client).tolist()) for client in ids]
    held = [set(tested.rows(client).tolist()) if tested.sizes[client] else set() for client in ids]
    assert not set().union(*on) & set().union(*held)
    np.testing.assert_array_equal(trained.sizes + tested.sizes, whole.sizes)
    np.testing.assert_array_equal(tested.sizes, shares(np.asarray(whole.sizes), fraction))
    assert [len(trained.rows(client)) for client in ids] == list(trained.sizes)
    if kind != "bootstrap":
        assert all(on[k] | held[k] == set(whole.rows(k).tolist()) for k in ids)
    again = whole.set_aside(fraction, seed)[1]
    assert all(np.array_equal(again.rows(k), tested.rows(k)) for k in ids if tested.sizes[k])


class Own(Partition):
    """A user's partition, with the rows of each client in a list."""

    def __init__(self, *rows):
        self.population, self._rows = len(rows), [np.array(own) for own in rows]
        self.sizes = np.array([len(own) for own in rows])

    def rows(self, client):
        return self._rows[client].copy()


def test_a_partition_from_outside_is_split_if_its_clients_share_nothing():
    trained, tested = Own([4, 5, 6, 7], [0, 1]).set_aside(0.5, 0)
    assert list(trained.sizes) == [2, 1] and list(tested.sizes) == [2, 1]
    for shared in (Own([1, 2], [2, 3]), Dealt(np.array([1, 1]), np.array([0, 0]), 1)):
        with pytest.raises(DataError, match=r"^data\.client_test_fraction=0\.5: clients .* share examples"):
            shared.set_aside(0.5, 0)


def test_a_run_measures_on_held_out_examples_and_trains_on_none(tmp_path, monkeypatch):
    config = tiny.config({"data.client_test_fraction": 0.25})
    federation = Federation.of(config)
    seen: set[int] = set()
    client = Worker.client

    def watched(worker, info, rows, *rest):
        seen.update(rows.tolist())
        assert len(rows) == info.num_examples
        return client(worker, info, rows, *rest)

    monkeypatch.setattr(Worker, "client", watched)
    done = run(config, out=tmp_path / "run")
    tested = federation.tested
    held = {row for k in range(tested.population) for row in tested.rows(k)}
    assert seen and not seen & held
    table = pd.read_parquet(done.path / "client_accuracy.parquet")
    assert table["num_examples"].tolist() == [len(tested.rows(k)) for k in table["client"]]
    assert done.result["client_accuracy"] == "held-out examples"
    assert done.result["clients/without_test"] == 0
    assert done.result["clients/accuracy_mean"] == pytest.approx(table["accuracy"].mean())
    # the model's right answers on just these rows
    x, y = (values[tested.rows(0)] for values in (federation.dataset.train.x, federation.dataset.train.y))
    import fedray

    right = fedray.load_model(done.path)(federation.dataset.normalise(x)).argmax(1).numpy() == y
    assert table["accuracy"][0] == pytest.approx(right.mean())
    assert resume(done.path).result == done.result


def test_without_it_the_bits_and_the_digest_are_those_of_before():
    plain = tiny.config()
    assert plain.override({"data.client_test_fraction": 0.0}).digest == plain.digest
    assert plain.override({"data.client_test_fraction": 0.1}).digest != plain.digest
    federation = Federation.of(plain)
    assert federation.tested is federation.deal.partition


def test_clients_with_one_example_are_left_out_and_counted(tmp_path):
    few = {"data.partition.kind": "quantity_skew", "data.partition.alpha": 0.2, "clients.population": 100}
    config = tiny.config({**few, "data.client_test_fraction": 0.1})
    sizes = np.asarray(Federation.of(config.override({"data.client_test_fraction": 0.0})).tested.sizes)
    alone = int((sizes == 1).sum())
    assert alone > 0
    done = run(config, out=tmp_path / "run")
    assert done.result["clients/without_test"] == alone
    assert len(pd.read_parquet(done.path / "client_accuracy.parquet")) == 100 - alone


def test_what_cannot_be_held_out_is_refused(in_tmp):
    one = {"data.partition": {"kind": "bootstrap", "examples": 1}, "data.client_test_fraction": 0.5}
    with pytest.raises(DataError, match=r"^data\.client_test_fraction=0\.5: no client has two examples"):
        run(tiny.config(one))
    for share in (1, -0.1, "much"):
        with pytest.raises(ConfigError, match=r"^data\.client_test_fraction \(config\): got "):
            tiny.config({"data.client_test_fraction": share})
    assert not list(in_tmp.iterdir())


def test_drawn_rows_come_from_two_pools():
    trained, tested = Drawn(np.arange(10), 5, 1000, 3).set_aside(0.4, 1)
    assert (trained.sizes[0], tested.sizes[0]) == (3, 2)
    pools = [{row for k in range(1000) for row in part.rows(k)} for part in (trained, tested)]
    assert [len(pool) for pool in pools] == [6, 4] and not pools[0] & pools[1]
