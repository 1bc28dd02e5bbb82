"""What is sent, to whom, in which chunks, and how many bytes it takes."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedray.costs.codec import Codec
from fedray.costs.extras import extras_size
from fedray.federation.client import Client
from fedray.federation.method import Method
from fedray.federation.server import Schedule
from fedray.types import ClientInfo, ClientUpdate, Mask, Params, ServerState, Task
from tests import small
from tests.federation.probes import (
    SLOW,
    WEIGHTS,
    Moving,
    Pruned,
    Recording,
    SpyPool,
    half,
    pruned_half,
    spied,
)

# ── bytes ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_who_holds_the_mask_is_sent_values_only():
    server = small.server(Moving(), schedule=Schedule(rounds=4, cohort=2), clients=2)
    reports = small.run(server)
    held = half(server.place.model.layout).count
    with_positions, values_only = 32 + 4 * held + -(-WEIGHTS // 8), 32 + 4 * held + 8
    assert [[record.cost.bytes_down for record in report.clients] for report in reports[1:]] == [
        [with_positions] * 2,
        [values_only] * 2,
        [with_positions] * 2,
        [values_only] * 2,
    ]
    assert all(record.cost.bytes_up == values_only for report in reports[1:] for record in report.clients)
    assert server.checkpoint.holds == dict.fromkeys((0, 1), server.state.mask.digest)


def test_each_client_pays_for_the_mask_it_does_not_hold_yet():
    server = small.server(Pruned(pruned=pruned_half()), schedule=Schedule(rounds=6, cohort=2))
    held = half(server.place.model.layout).count
    met: set[int] = set()
    for report in small.run(server)[1:]:
        for record in report.clients:
            positions = 8 if record.client in met else -(-WEIGHTS // 8)
            assert record.cost.bytes_down == 32 + 4 * held + positions
        met |= {record.client for record in report.clients}
        assert set(server.checkpoint.holds) >= met
    assert 2 < len(met) < 12, "some came again"


def test_extras_are_paid_for():
    first = small.run(small.server(Recording(), schedule=Schedule(rounds=1, cohort=2)))[1]
    plain = small.run(small.server(Method(), schedule=Schedule(rounds=1, cohort=2)))[1]
    assert first.metrics["bytes/down"] - plain.metrics["bytes/down"] == 2 * extras_size({"round": 1})


@pytest.mark.parametrize("values", ["fp16", "int8"])
def test_clients_train_on_what_they_decode(values: Any):
    server = small.server(Moving(downlink_values=values), pool=SpyPool, schedule=Schedule(rounds=1, cohort=2))
    server.setup()
    before = server.state
    report = server.step()
    codec, layout = Codec(values), server.place.model.layout
    payload = codec.encode(before.params, before.mask)
    (task,) = spied(server).tasks
    assert task.params == codec.decode(payload, layout).params != before.params.masked(before.mask)
    assert {record.cost.bytes_down for record in report.clients} == {len(payload)}
    own = [
        small.client(Method(), id=r.client).sgd(task.params, task.mask).flat * r.num_examples
        for r in report.clients
    ]
    mean = sum(own, torch.zeros(WEIGHTS)) / sum(r.num_examples for r in report.clients)
    np.testing.assert_allclose(server.model.flat.numpy(), mean.numpy(), atol=1e-6)


def test_equal_tasks_are_sent_as_one():
    server = small.server(Method(), pool=SpyPool)
    small.run(server)
    assert [len(job.tasks) for job, _ in spied(server).jobs] == [1, 1, 1]


# ── each client its own ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Widths(Method):
    """Even clients hold all, odd ones only the first five rows of fc1; nobody holds its last row.

    A client does not train: it adds its id, plus one, to what it holds.
    """

    def configure(self, state: ServerState, client: ClientInfo) -> Task:
        """Cut the model to the client's width."""
        mask = Mask.full(state.mask.layout)
        mask["fc1.weight"][7:] = False
        if client.id % 2:
            mask["fc1.weight"][5:] = False
            mask["fc1.bias"][5:] = False
        return Task(state.params, mask)

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: add a number."""
        return ClientUpdate(Params(task.params.flat + client.id + 1, task.params.layout), task.mask)


@pytest.mark.parametrize("chunk", [None, 1, 2, 4])
def test_each_client_may_get_a_task_of_its_own(chunk: int | None):
    server = small.server(
        Widths(), partition=small.dealt(10, 20, 30), schedule=Schedule(rounds=1, cohort=3, chunk=chunk)
    )
    server.setup()
    before = server.state.params.clone()
    report = server.step()
    change = Params(server.state.params.flat - before.flat, before.layout)
    everybody, even = (10 * 1 + 20 * 2 + 30 * 3) / 60, (10 * 1 + 30 * 3) / 40
    for name, span in {"fc1.weight": slice(5), "fc1.bias": slice(5), "fc2.weight": slice(None)}.items():
        np.testing.assert_allclose(change[name][span].numpy(), everybody, rtol=1e-5)
    np.testing.assert_allclose(change["fc1.weight"][5:7].numpy(), even, rtol=1e-5)
    np.testing.assert_allclose(change["fc1.bias"][5:].numpy(), even, rtol=1e-5)
    assert change["fc1.weight"][7:].count_nonzero() == 0, "where nobody holds a weight it stays"
    assert [record.density for record in report.clients] == [7 / 8, 5 / 8, 7 / 8]
    assert report.clients[1].cost.bytes_down < report.clients[0].cost.bytes_down
    assert server.state.mask.is_full


# ── chunks ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("cohort", "chunk", "sizes"),
    [(5, None, [1] * 5), (16, None, [1] * 16), (40, None, [3] * 13 + [1]), (5, 2, [2, 2, 1]), (5, 9, [5])],
)
def test_a_cohort_is_cut_by_the_config_alone(cohort: int, chunk: int | None, sizes: list[int]):
    server = small.server(
        Widths(), pool=SpyPool, clients=40, schedule=Schedule(rounds=1, cohort=cohort, chunk=chunk)
    )
    reports = small.run(server)
    ((_, chunks),) = spied(server).jobs
    assert [len(one.orders) for one in chunks] == sizes
    assert [one.index for one in chunks] == list(range(len(sizes)))
    asked = [order.client for one in chunks for order in one.orders]
    assert asked == sorted(asked) == [record.client for record in reports[1].clients]
    examples = server.place.population.partition.sizes
    assert [one.num_examples for one in chunks] == [
        sum(int(examples[order.client]) for order in one.orders) for one in chunks
    ]


def test_a_device_class_may_have_workers_of_its_own():
    devices = [small.DEVICE, SLOW, replace(small.DEVICE, name="other")]
    schedule = Schedule(rounds=1, cohort=6, chunk=2, groups=("slow",))
    server = small.server(Method(), pool=SpyPool, devices=devices, schedule=schedule)
    report = small.run(server)[-1]
    ((_, chunks),) = spied(server).jobs
    assert [(one.group, [order.client for order in one.orders]) for one in chunks] == [
        (0, [0, 2]),
        (0, [3, 5]),
        (1, [1, 4]),
    ]
    assert [record.client for record in report.clients] == list(range(6)), "records are in order of id"
    plain = small.server(Method(), devices=devices, schedule=replace(schedule, groups=()))
    small.run(plain)
    np.testing.assert_allclose(server.model.flat.numpy(), plain.model.flat.numpy(), atol=1e-6)
