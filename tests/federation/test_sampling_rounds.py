"""Samplers in a server: what a draw is charged, what a checkpoint keeps, and what a wrong cohort is told."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedray.costs.codec import Codec
from fedray.data.partition import Drawn
from fedray.errors import MethodError
from fedray.federation.method import Method
from fedray.federation.population import LOOK_AGAIN_S, Population
from fedray.federation.sampling import (
    SAMPLERS,
    Fastest,
    Losses,
    Oort,
    OortMemory,
    PowerOfChoice,
    Sampler,
    SamplerContext,
)
from fedray.federation.server import Checkpoint, Schedule, Server
from fedray.storage import checkpoint as stored
from fedray.types import ClientRecord, Mask
from tests import small
from tests.federation.probes import SpyPool, spied, without_clocks

OWN = (Oort(exploration=0.5), PowerOfChoice(candidates=1.5), PowerOfChoice(candidates=2.0, ask=False))


def federation(sampler: Sampler, *, rounds: int = 5, cohort: int = 3, **options: Any) -> Server:
    usual: dict[str, Any] = {"clients": 12, "pool": SpyPool} | options
    return small.server(Method(lr=0.1), schedule=Schedule(rounds, cohort, sampler=sampler), **usual)


@dataclass(frozen=True, kw_only=True)
class Named(Sampler):
    """The cohorts that a test names, round by round; remembers who counted."""

    cohorts: tuple[Any, ...] = ()

    def draw(self, memory: Any, ctx: SamplerContext) -> Any:
        """Return the round's cohort."""
        return self.cohorts[(ctx.round - 1) % len(self.cohorts)]

    def learn(self, memory: Any, records: Sequence[ClientRecord], round: int) -> Any:
        """Add the ids of the round's clients."""
        return (*(memory or ()), tuple(record.client for record in records))


@pytest.mark.parametrize("sampler", [*(kind() for kind in SAMPLERS.values()), *OWN], ids=str)
def test_a_run_resumed_from_a_file_draws_the_same_cohorts(sampler: Sampler, tmp_path):
    whole = federation(sampler)
    reports = small.run(whole)
    stopped = federation(sampler)
    for _ in (stopped.setup(), stopped.step(), stopped.step()):
        stored.check(stopped.checkpoint, "fedavg")
    path = tmp_path / stored.name_of(3)
    stored.write(path, stopped.checkpoint, {})
    stopped.step()  # must not reach the file
    resumed = federation(sampler, checkpoint=stored.read(path).checkpoint)
    rest = small.run(resumed)
    assert list(map(without_clocks, rest)) == list(map(without_clocks, reports[3:]))
    assert resumed.state == whole.state
    assert repr(resumed.checkpoint.sampler) == repr(whole.checkpoint.sampler)


def test_a_checkpoint_without_a_sampler_s_memory_can_be_read(tmp_path, monkeypatch):
    server = federation(Sampler())
    server.setup()
    encode = stored._encode

    def as_before(*args: Any) -> dict[str, Any]:
        return {k: v for k, v in encode(*args).items() if k != "sampler"}

    monkeypatch.setattr(stored, "_encode", as_before)
    stored.write(tmp_path / "file", server.checkpoint, {})
    assert stored.read(tmp_path / "file").checkpoint.sampler is None


def test_a_snapshot_keeps_the_memory_of_its_round():
    server = federation(Named(cohorts=((0, 1), (2,))))
    server.setup()
    server.step()
    snapshot = server.checkpoint.snapshot()
    server.step()
    assert snapshot.sampler == ((0, 1),)
    assert server.checkpoint.sampler == ((0, 1), (2,))


def test_what_a_sampler_cannot_keep_is_refused_by_name():
    with pytest.raises(MethodError, match=r"the memory of the sampler\['file'\] is .*; kept can be"):
        stored.check(replace(federation(Sampler()).checkpoint, sampler={"file": object()}), "fedavg")


def test_loss_queries_are_metered():
    server = federation(PowerOfChoice(candidates=2.0), clients=6, rounds=1)
    (_, report) = small.run(server)
    query, training = spied(server).jobs
    assert [order.client for chunk in query[1] for order in chunk.orders] == [0, 1, 2, 3, 4, 5]
    assert sum(len(chunk.orders) for chunk in training[1]) == 3
    model, metrics = server.place.model, report.metrics
    full = 32 + 4 * model.layout.size
    assert metrics["bytes/down"] == (6 + 3) * full
    answer = Codec().size(Mask.none(model.layout), extras={"each.loss": torch.tensor(1.0)})
    assert metrics["bytes/up"] == 3 * full + 6 * answer
    sizes = server.population.partition.sizes
    forward = server.place.flops.forward(server.state.mask) * sizes.sum()
    trained = sum(record.cost.flops for record in report.clients)
    assert metrics["flops/clients"] == pytest.approx(trained + forward)
    seconds = [1 + full / 100 + 2 * forward / sizes.sum() * n / 2000 + answer / 50 for n in sizes]
    slowest = max(record.cost.seconds for record in report.clients)
    assert metrics["time/simulated_s"] == pytest.approx(slowest + max(seconds))
    assert metrics["clients/selected"] == 3


def test_candidates_are_asked_for_the_loss_of_the_current_model():
    server = federation(PowerOfChoice(candidates=2.0), clients=6, rounds=2)
    server.setup()
    for _ in range(2):
        model = server.model
        losses = {}
        for k in range(6):
            rows, train = server.population.partition.rows(k), server.place.dataset.train
            losses[k] = server.evaluate(type(train)(train.x[rows], train.y[rows])).loss
        report = server.step()
        assert spied(server).jobs[-2][0].tasks[0].params == model
        assert [r.client for r in report.clients] == sorted(sorted(losses, key=lambda k: -losses[k])[:3])


def test_a_sampler_learns_from_every_record_of_its_cohort():
    server = federation(Named(cohorts=((3, 1), (2,))), rounds=2)
    small.run(server)
    assert server.checkpoint.sampler == ((1, 3), (2,))


def test_the_server_waits_for_clients_that_a_sampler_names_itself():
    devices = [replace(small.DEVICE, name=f"d{k}", availability=a) for k, a in enumerate((1.0, 0.1, 1e-9))]
    server = federation(Named(cohorts=((0,), (0, 1, 2))), clients=3, devices=devices, rounds=2)
    (_, alone, three) = small.run(server)
    assert not any("waited" in note for note in alone.notes)
    assert [r.client for r in three.clients] == [0, 1]
    assert three.metrics["time/simulated_s"] > LOOK_AGAIN_S
    assert any("1 client(s) were asked and never came: [2]" in note for note in three.notes)


@pytest.mark.parametrize(
    ("cohort", "text"),
    [
        ((), "is empty; return one client or more"),
        ((1, 1, 2), r"holds clients \[1\] more than once"),
        ((0, 12), r"holds clients \[12\]; the registered ones are 0 … 11"),
        ((-1,), r"holds clients \[-1\]"),
        (None, "is None; return a tuple of client ids"),
        ((0.5, 1), "return a tuple of client ids"),
    ],
)
def test_a_wrong_cohort_is_refused(cohort: Any, text: str):
    server = federation(Named(cohorts=(cohort,)))
    server.setup()
    with pytest.raises(MethodError, match=r"clients\.sampler: the cohort that Named\.draw returned.*" + text):
        server.step()


def test_numpy_ids_in_any_order_are_a_cohort():
    server = federation(Named(cohorts=(tuple(np.array([5, 2])),)), rounds=1)
    assert [r.client for r in small.run(server)[1].clients] == [2, 5]


class Counting(Population):
    """A population that counts look-ups, and refuses to be walked over."""

    looked = 0

    def __getitem__(self, client: Any) -> Any:
        """Count a look-up."""
        self.looked += 1
        return super().__getitem__(client)

    def __iter__(self) -> Any:
        """Refuse."""
        raise AssertionError("walked over all clients")


@pytest.mark.parametrize("sampler", [kind() for kind in SAMPLERS.values()] + [OWN[2]], ids=str)
def test_a_round_of_a_million_registered_clients_looks_up_a_few(sampler: Sampler):
    registered = 1_000_000
    server = federation(
        sampler, cohort=5, partition=Drawn(np.arange(100), 20, registered, seed=0), architecture=small.MLP
    )
    people = Counting(server.population.partition, server.population.fleet)
    server.population = people
    server.place = replace(server.place, population=people)
    server.setup()
    for _ in range(3):
        server.step()
    assert people.looked < 500
    memory = server.checkpoint.sampler
    known = len(memory.clients) if isinstance(memory, OortMemory) else len((memory or Losses()).of)
    assert known <= 15


def test_uniform_and_no_over_selection_are_the_same_round():
    uniform, fastest = (small.run(federation(of)) for of in (Sampler(), Fastest(over_selection=0.0)))
    assert list(map(without_clocks, uniform)) == list(map(without_clocks, fastest))


def test_a_checkpoint_starts_without_a_memory():
    assert Checkpoint(federation(Sampler()).state).sampler is None
