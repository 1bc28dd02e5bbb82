"""Numbers that would spoil a mean, a sum or a task: left out with the client's name, or refused."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedray.costs.extras import decode_extras, encode_extras
from fedray.errors import ClientError, MethodError
from fedray.federation.aggregate import Fold, Partial, merge_all
from fedray.federation.client import Client
from fedray.federation.method import Method
from fedray.federation.server import Schedule
from fedray.federation.worker import Rules
from fedray.types import ClientInfo, ClientUpdate, Extra, Mask, Params, RoundReport, ServerState, Task
from tests import small
from tests.federation.probes import SpyPool

LARGEST = float(np.finfo(np.float32).max)
COHORT = 6
ONE_IN_THREE = Rules(max_failed=1 / 3)


@dataclass(frozen=True, kw_only=True)
class Spoiling(Method):
    """FedAvg in which client 2 changes its update before it sends it."""

    change: Callable[[ClientUpdate], ClientUpdate]
    how: Fold = field(default_factory=Fold)

    @property
    def fold(self) -> Fold:
        return self.how

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        metrics = {"steps": float(client.id)}
        update = replace(super().client_update(task, client), sums={"ones": torch.ones(2)}, metrics=metrics)
        return self.change(update) if client.id == 2 else update


def play(
    change: Callable[[ClientUpdate], ClientUpdate], *, rules: Rules = ONE_IN_THREE, **options: Any
) -> tuple[RoundReport, Params]:
    """Return the report of a round of all six clients, and the model."""
    method = Spoiling(change=change, **options)
    server = small.server(method, schedule=Schedule(rounds=1, cohort=COHORT), rules=rules)
    return small.run(server)[-1], server.model


def with_weight(value: float) -> Callable[[ClientUpdate], ClientUpdate]:
    def change(update: ClientUpdate) -> ClientUpdate:
        flat = update.params.flat.clone()
        flat[7] = value
        return replace(update, params=Params(flat, update.params.layout))

    return change


def left_out(report: RoundReport) -> list[int]:
    return [record.client for record in report.clients if record.fate == "non-finite"]


# ── updates ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [3.3e38, -3.3e38, 3e37, math.inf, math.nan])
@pytest.mark.parametrize("how", [Fold(), Fold(weight="uniform"), Fold(by="everyone"), Fold(by="nonzero")])
def test_an_update_that_could_make_the_mean_infinite_is_left_out_and_named(value: float, how: Fold) -> None:
    if how.weight == "uniform" and abs(value) < 1e38:
        return  # six of them have a mean
    report, model = play(with_weight(value), how=how)
    assert left_out(report) == [2]
    assert report.notes == (
        "1 update(s) left out as non-finite: clients [2] (NaN, infinite, or too large to be averaged)",
    )
    assert model.is_finite()
    assert model.flat.abs().max() < 10


def test_one_of_1e36_among_clients_with_a_thousand_examples() -> None:
    data, partition = small.dataset(3200), small.dealt(1000, 1000, 1000)
    method = Spoiling(change=with_weight(1e36), local_epochs=1, batch_size=100)
    of: dict[str, Any] = {"schedule": Schedule(1, 3), "data": data, "rules": ONE_IN_THREE}
    server = small.server(method, partition=partition, **of)
    assert left_out(small.run(server)[-1]) == [2]
    assert server.model.flat.abs().max() < 10


@pytest.mark.parametrize("value", [1e20, 1e30])
def test_what_is_large_but_has_a_mean_counts_without_a_bound(value: float) -> None:
    report, model = play(with_weight(value), rules=Rules(max_change=None))
    assert left_out(report) == []
    assert model.is_finite()
    assert model.flat.abs().max() > value / 100
    report, model = play(with_weight(value))
    assert [(r.client, r.fate) for r in report.clients if r.fate != "folded"] == [(2, "too-large")]
    assert model.flat.abs().max() < 10


def test_at_the_bound_the_mean_of_all_is_finite() -> None:
    sizes = np.array([1000, 999, 3, 60])
    layout = small.workplace(Method()).model.layout
    for fold in (Fold(), Fold(weight="uniform")):
        worst = Params(torch.full((layout.size,), fold.bounds(sizes).weight), layout)
        full = Mask.full(layout)
        partials = {}
        for client, size in enumerate(sizes.tolist()):
            partials[0, client] = Partial(layout, fold, {full.digest: full})
            partials[0, client].add(client, size, ClientUpdate(worst, full))
        mean = merge_all(partials, len(sizes)).mean()
        assert mean.is_finite()
        torch.testing.assert_close(mean.flat, worst.flat)


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([LARGEST / 2, 0.0]),
        torch.tensor([0, 2**62]),
        torch.tensor([-(2**63), 0]),
        torch.tensor([math.nan, 0.0]),
        torch.tensor(-math.inf),
    ],
)
def test_a_sum_that_could_overflow_is_left_out_and_named(value: Tensor) -> None:
    report, _ = play(lambda update: replace(update, sums={"seen": value}))
    assert left_out(report) == [2]


def test_examples_of_nobody_weigh_nothing() -> None:
    layout, rest = (spec := small.workplace(Method()).model).layout, spec.init(1)
    partial = Partial(layout, Fold(), {Mask.full(layout).digest: Mask.full(layout)})
    partial.add(0, 0, ClientUpdate(spec.init(0), Mask.full(layout)))
    assert partial.mean(rest) == rest


# ── metrics ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, torch.tensor(math.nan), 1e308, -1e308, 10**400], ids=str
)
def test_a_metric_that_is_not_finite_is_left_out_of_its_mean_and_named(value: float) -> None:
    report, _ = play(lambda update: replace(update, metrics={"steps": value}))
    others = [record for record in report.clients if record.client != 2]
    assert left_out(report) == []
    assert report.metrics["train/steps"] == pytest.approx(
        sum(r.client * r.num_examples for r in others) / sum(r.num_examples for r in others)
    )
    assert report.notes == (
        "train/steps is the mean without 1 client(s) that sent NaN, infinity or beyond 1e280: clients [2]",
    )


def test_a_metric_that_nobody_could_measure_is_not_reported() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unmeasured(Method):
        def client_update(self, task: Task, client: Client) -> ClientUpdate:
            return replace(super().client_update(task, client), metrics={"gain": math.nan})

    server = small.server(Unmeasured(), schedule=Schedule(rounds=1, cohort=COHORT, chunk=2))
    report = small.run(server)[-1]
    assert "train/gain" not in report.metrics
    assert report.notes[0].endswith(
        "without 6 client(s) that sent NaN, infinity or beyond 1e280: clients [0, 1, 2, 3, 4, 5]"
    )


# ── sums that do not fit each other ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (torch.ones(1), r"floats of shape \(1,\)"),
        (torch.ones(()), r"floats of shape \(\)"),
        (torch.ones(2, 1), r"floats of shape \(2, 1\)"),
        (torch.ones(1, 2), r"floats of shape \(1, 2\)"),
        (torch.ones(2, dtype=torch.int64), r"integers of shape \(2,\)"),
        (torch.ones(2, dtype=torch.bool), r"integers of shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 6])
def test_sums_of_unlike_form_are_refused_with_both_clients(value: Tensor, form: str, chunk: int) -> None:
    method = Spoiling(change=lambda update: replace(update, sums={"ones": value}))
    server = small.server(method, schedule=Schedule(rounds=1, cohort=COHORT, chunk=chunk))
    sent = rf"client [013] sent floats of shape \(2,\), client 2 {form}"
    other = rf"client 2 sent {form}, client [013] floats of shape \(2,\)"
    with pytest.raises(MethodError, match=rf"^the sum 'ones' does not fit: ({sent}|{other})\. "):
        small.run(server)


@pytest.mark.parametrize(
    "dtypes", [(torch.uint8, torch.bool), (torch.int32, torch.int64), (torch.half, None)]
)
def test_sums_of_one_kind_may_differ_in_width(dtypes: tuple[torch.dtype, torch.dtype | None]) -> None:
    one, other = (torch.ones(2, dtype=dtype or torch.float32) for dtype in dtypes)
    layout = small.workplace(Method()).model.layout
    silent = Params(torch.zeros(layout.size), layout), Mask.none(layout)
    partial = Partial(layout, Fold(), {})
    for client, value in enumerate((one, other)):
        partial.add(client, 5, ClientUpdate(*silent, sums={"a": value}))
    assert partial.sums["a"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sums": {"n": 3}}, r"'sums.n' is int, not a tensor"),
        ({"each": {"n": 0.5}}, r"'each.n' is float, not a tensor"),
        ({"metrics": {"n": "high"}}, r"'metrics.n' is str, not a number"),
        ({"metrics": {"n": torch.ones(2)}}, r"'metrics.n' is Tensor, not a number"),
        (
            {"sums": {"n": torch.ones(2, dtype=torch.complex64)}},
            r"extra 'sums.n' is a tensor of torch.complex64",
        ),
    ],
)
def test_what_cannot_be_added_up_is_refused_with_client_and_round(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ClientError, match=rf"(?s)client 2.*round 1.*{message}"):
        play(lambda update: replace(update, **change))


# ── extras ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Telling(Method):
    """FedAvg that gives each client one of some extras, and asks it what it got."""

    extras: tuple[Extra, ...]

    def configure(self, state: ServerState, client: ClientInfo) -> Task:
        return Task(state.params, state.mask, extras={"x": self.extras[client.id % len(self.extras)]})

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        expected = self.extras[client.id % len(self.extras)]
        assert repr(task.extras["x"]) == repr(expected)
        return super().client_update(task, client)


@pytest.mark.parametrize(
    "extras", [(True, 1, 1.0), (False, 0, 0.0, -0.0), (math.nan, math.inf), ("1", 1), (2**53, 2.0**53)]
)
def test_extras_that_are_equal_but_not_the_same_are_different_tasks(extras: tuple[Extra, ...]) -> None:
    server = small.server(Telling(extras=extras), schedule=Schedule(1, COHORT), pool=SpyPool)
    small.run(server)
    assert isinstance(server.pool, SpyPool)
    sent = [repr(task.extras["x"]) for task in server.pool.jobs[0][0].tasks]
    assert sorted(sent) == sorted(map(repr, extras))


@pytest.mark.parametrize("value", [True, 1, 1.0, -0.0, math.nan, math.inf, "1", 2**64, 2.0**53])
def test_an_extra_arrives_as_what_was_sent(value: Extra) -> None:
    (found,) = decode_extras(encode_extras({"x": value})).values()
    assert (type(found), repr(found)) == (type(value), repr(value))


def test_one_nan_is_one_task() -> None:
    server = small.server(Telling(extras=(math.nan,)), schedule=Schedule(1, COHORT), pool=SpyPool)
    small.run(server)
    assert isinstance(server.pool, SpyPool)
    assert len(server.pool.jobs[0][0].tasks) == 1
