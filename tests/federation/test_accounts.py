"""What a round is said to have cost: work of clients and server, questions beside it, and the clock."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedray.costs.clock import seconds
from fedray.costs.devices import YARDSTICKS
from fedray.costs.extras import extras_size
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext
from fedray.federation.sampling import Fastest
from fedray.federation.server import Schedule
from fedray.federation.worker import Rules
from fedray.types import METRICS, ClientUpdate, RoundReport, ServerState, Task
from tests import small
from tests.federation.probes import (
    DENSE,
    SLOW,
    WEIGHTS,
    Hooked,
    HookedWithData,
    half,
    score,
    train_at_server,
)

# ── the report ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_reported_metrics_are_those_of_the_list():
    first, *others = small.run(small.server(Method()))
    reported = {name for name in others[-1].metrics if not name.startswith("total/")}
    assert reported == set(METRICS) - {"test/accuracy", "test/loss"}
    assert set(first.metrics) == set(others[-1].metrics) - {"train/loss", "density/client_mean"}


def test_totals_are_the_sums_over_the_rounds():
    server = small.server(HookedWithData(at_setup=train_at_server), server_rows=12, rules=Rules(dropout=0.3))
    reports = small.run(server)
    names = {name.removeprefix("total/") for name in reports[0].metrics if name.startswith("total/")}
    assert names == {
        name for name in METRICS if name.split("/")[0] in ("bytes", "flops", "time", "energy")
    } | {
        "clients/dropped",
        "clients/failed",
    }
    for name in names:
        sums = np.cumsum([report.metrics[name] for report in reports])
        assert [report.metrics[f"total/{name}"] for report in reports] == pytest.approx(sums.tolist())
    assert reports[-1].metrics["total/clients/dropped"] > 0


POWERED = replace(
    small.DEVICE,
    step_s=0.5,
    round_s=2.0,
    compute_w=10.0,
    idle_w=1.0,
    down_j_per_byte=0.01,
    up_j_per_byte=0.02,
)


@pytest.mark.parametrize("stack", [1, 3])
def test_steps_take_time_and_a_round_takes_energy(stack: int):
    """Clients of 20, 21 and 45 examples with batches of 20 make 1, 2 and 3 steps an epoch, also together."""
    method = Method(batch_size=20, local_epochs=2)
    deal = small.dealt(20, 21, 45)
    server = small.server(
        method, partition=deal, devices=(POWERED,), schedule=Schedule(rounds=1, cohort=3), stack=stack
    )
    report = small.run(server)[-1]
    assert [record.cost.steps for record in report.clients] == [2, 4, 6]
    for record in report.clients:
        cost = record.cost
        computing = 2 + 0.5 * cost.steps + cost.executed_flops / 1000
        link = 1 + cost.bytes_down / 100 + cost.bytes_up / 50
        assert cost.seconds == pytest.approx(link + computing)
        bytes_j = 0.01 * cost.bytes_down + 0.02 * cost.bytes_up
        assert cost.energy_j == pytest.approx(10 * computing + link + bytes_j)
    energy = sum(record.cost.energy_j for record in report.clients)
    assert report.metrics["energy/clients_j"] == pytest.approx(energy)
    assert report.metrics["total/energy/clients_j"] == pytest.approx(energy)
    assert report.metrics["energy/server_j"] == 0
    assert report.metrics["time/simulated_s"] == max(record.cost.seconds for record in report.clients)


def test_the_server_takes_energy_and_no_overhead_of_an_exchange():
    server = small.server(HookedWithData(batch_size=5, at_setup=train_at_server), server_rows=12)
    server.side = replace(server.side, profile=POWERED)
    report = server.setup()
    seconds = 2 * (3 * DENSE * 12 / 1000 + 3 * 0.5)  # two passes in batches of 5, 5 and 2
    assert report.metrics["time/server_s"] == pytest.approx(seconds)
    assert report.metrics["energy/server_j"] == pytest.approx(10 * seconds)
    assert report.metrics["energy/clients_j"] == 0


def test_devices_without_power_are_named_in_round_0():
    first, *others = small.run(small.server(Method()))
    (note,) = [note for note in first.notes if "power" in note]
    assert note.startswith("no power is known of device; its joules count as 0")
    assert not any("power" in note for report in others for note in report.notes)
    assert not any("power" in note for note in small.server(Method(), devices=(POWERED,)).setup().notes)


def test_totals_of_a_metric_that_is_younger_than_the_run_are_unknown():
    server = small.server(Method())
    server.setup()
    del server.checkpoint.totals["energy/clients_j"]  # as in a checkpoint of an earlier version
    metrics = server.step().metrics
    assert metrics["total/energy/clients_j"] != metrics["total/energy/clients_j"]  # NaN
    assert metrics["energy/clients_j"] == 0 < metrics["total/bytes/up"]


def test_the_same_work_is_timed_on_two_fleets(monkeypatch: pytest.MonkeyPatch):
    """Whatever devices a run has; questions beside the training count, waits and deadlines do not."""

    def ask(state: ServerState, ctx: ServerContext) -> None:
        ctx.ask(score, {k: Task(state.params, state.mask) for k in (1, 4)})

    asked: list[CohortUpdate] = []
    server = small.server(
        Hooked(at_prune=ask),
        rules=Rules(deadline_s=1e-3),
        schedule=Schedule(rounds=1, cohort=3),
        devices=(small.DEVICE, POWERED),
    )
    original = server._exchange

    def noted(*args: Any, **options: Any) -> CohortUpdate:
        asked.append(original(*args, **options))
        return asked[-1]

    monkeypatch.setattr(server, "_exchange", noted)
    report = small.run(server)[-1]
    assert len(asked) == 2
    for kind, device in YARDSTICKS.items():
        slowest = [max(seconds(record.cost, device) for record in cohort.records) for cohort in asked]
        assert report.metrics[f"time/{kind}_s"] == pytest.approx(sum(slowest))
        assert report.metrics[f"total/time/{kind}_s"] == pytest.approx(sum(slowest))


# ── work beside the training ──────────────────────────────────────────────────────────────────────────────


def test_looks_at_validation_data_are_charged_to_the_server():
    def look(state: ServerState, ctx: ServerContext) -> None:
        ctx.validate(state.params, state.mask)
        ctx.validate(state.params, half(ctx.layout))

    server = small.server(Hooked(at_prune=look), schedule=Schedule(rounds=1, cohort=2))
    plain = small.server(Hooked(), schedule=Schedule(rounds=1, cohort=2))
    report, without = small.run(server)[-1].metrics, small.run(plain)[-1].metrics
    flops = server.place.flops
    passes = flops.dense() + flops.forward(half(server.place.model.layout))
    assert report["flops/server"] == pytest.approx(passes * small.VALIDATION)
    assert report["time/server_s"] > 0 == without["time/server_s"] == without["flops/server"]
    waited = without["time/simulated_s"] + report["time/server_s"]
    assert report["time/simulated_s"] == pytest.approx(waited)


def test_work_of_the_server_is_metered_once_and_apart():
    server = small.server(
        HookedWithData(
            batch_size=5, at_setup=train_at_server, at_prune=lambda state, ctx: train_at_server(state, ctx)
        ),
        server_rows=12,
        schedule=Schedule(rounds=2, cohort=2),
    )
    plain = small.server(HookedWithData(batch_size=5), server_rows=12, schedule=Schedule(rounds=2, cohort=2))
    flops = 3 * DENSE * 12 * 2
    for with_server, without in zip(small.run(server), small.run(plain), strict=True):
        assert with_server.metrics["flops/server"] == flops
        assert without.metrics["flops/server"] == 0
        assert with_server.metrics["time/simulated_s"] == pytest.approx(
            without.metrics["time/simulated_s"] + flops / 1000
        )
        for name in ("flops/clients", "flops/executed", "bytes/up", "bytes/down"):
            assert with_server.metrics[name] == without.metrics[name]
    assert with_server.metrics["total/flops/server"] == 3 * flops


def test_what_is_asked_is_metered_in_its_round():
    asked: list[CohortUpdate] = []

    def ask(state: ServerState, ctx: ServerContext) -> None:
        task = Task(state.params, state.mask)
        asked.append(ctx.ask(score, {k: task for k in (1, 4)}))

    rules = Rules(deadline_s=0.5, dropout=0.99)
    server = small.server(Hooked(at_setup=ask), rules=rules, partition=small.dealt(*[20] * 6))
    report = server.setup()
    (cohort,) = asked
    sizes = extras_size({"sums.gradient": torch.zeros(WEIGHTS)})
    assert [(r.client, r.fate) for r in cohort.records] == [(1, "folded"), (4, "folded")]
    assert report.metrics["bytes/down"] == 2 * (32 + 4 * WEIGHTS)
    assert cohort.cost.bytes_up == report.metrics["bytes/up"]
    assert report.metrics["bytes/up"] == 2 * (32 + sizes), "who sends no weights sends a header"
    assert report.metrics["flops/clients"] == 3 * DENSE * 40
    one = cohort.records[0].cost
    assert report.metrics["time/simulated_s"] == one.seconds == cohort.records[1].cost.seconds
    assert (report.clients, report.metrics["clients/selected"]) == ((), 0)
    clients = [small.client(Method(), id=k, round=0, partition=small.dealt(*[20] * 6)) for k in (1, 4)]
    gradients = [c.grad(server.state.params, server.state.mask) for c in clients]
    assert torch.equal(cohort.sum("gradient"), gradients[0] + gradients[1])


def test_what_is_asked_in_a_round_is_added_to_it():
    def ask(state: ServerState, ctx: ServerContext) -> None:
        task = Task(state.params, state.mask)
        first = ctx.ask(score, {0: task})
        second = ctx.ask(score, {0: task, 1: task}, keep_updates=True)
        assert (list(first.updates), list(second.updates)) == ([], [0, 1])
        costs.append(first.cost + second.cost)

    costs: list[Any] = []
    schedule = Schedule(rounds=2, cohort=3)
    with_ask, without = (
        small.run(small.server(Hooked(at_prune=hook), schedule=schedule)) for hook in (ask, None)
    )
    for cost, a, b in zip(costs, with_ask[1:], without[1:], strict=True):
        assert a.metrics["bytes/up"] - b.metrics["bytes/up"] == cost.bytes_up > 0
        assert a.metrics["bytes/down"] - b.metrics["bytes/down"] == cost.bytes_down > 0
        assert a.metrics["flops/clients"] - b.metrics["flops/clients"] == cost.flops > 0
        assert a.metrics["time/simulated_s"] - b.metrics["time/simulated_s"] == pytest.approx(cost.seconds)
        assert a.metrics["val/loss"] == b.metrics["val/loss"]
        assert a.clients == b.clients


# ── the clock ─────────────────────────────────────────────────────────────────────────────────────────────


def timed(rules: Rules = small.RULES, method: Method = Method()) -> RoundReport:  # noqa: B008
    """Return the report of a round of two fast and two slow clients, of ten examples each."""
    server = small.server(
        method,
        rules=rules,
        schedule=Schedule(rounds=1, cohort=4),
        partition=small.dealt(10, 10, 10, 10),
        devices=[small.DEVICE, SLOW],
    )
    server.setup()
    return server.step()


def test_a_round_takes_as_long_as_its_slowest_client():
    bytes_each = 32 + 4 * WEIGHTS
    assert timed().metrics["time/simulated_s"] == pytest.approx(
        1 + bytes_each / 100 + bytes_each / 50 + 3 * DENSE * 10 / 100
    )


def test_a_deadline_caps_the_round():
    slowest = timed().metrics["time/simulated_s"]
    report = timed(Rules(deadline_s=slowest / 2))
    assert [record.fate for record in report.clients] == ["folded", "late"] * 2
    assert report.metrics["time/simulated_s"] == slowest / 2
    assert report.metrics["clients/dropped"] == 2
    assert timed(Rules(deadline_s=2 * slowest)).metrics["time/simulated_s"] == slowest


def test_a_deadline_caps_the_round_also_of_those_whose_update_is_malformed():
    @dataclass(frozen=True, kw_only=True)
    class SlowOnesReturnNothing(Method):
        def client_update(self, task: Task, client: Client) -> Any:
            update = super().client_update(task, client)
            return None if client.info.profile.name == "slow" else update

    slowest = timed(Rules(max_failed=0.5), SlowOnesReturnNothing()).metrics["time/simulated_s"]
    report = timed(Rules(deadline_s=slowest / 2), SlowOnesReturnNothing())
    assert report.metrics["time/simulated_s"] == slowest / 2
    assert report.metrics["clients/failed"] == 0, "they are late"


def test_who_drops_out_is_waited_for_only_to_the_deadline():
    everybody = Rules(dropout=1 - 1e-12)
    assert timed(everybody).metrics["time/simulated_s"] == 0
    assert timed(replace(everybody, deadline_s=50.0)).metrics["time/simulated_s"] == 50


@dataclass(frozen=True, kw_only=True)
class InSteps(Method):
    """Local steps instead of epochs."""

    def local_steps(self, num_examples: int) -> int:
        """Return a number that does not depend on the examples."""
        return 7

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: so many steps."""
        return ClientUpdate(client.sgd(task.params, task.mask, steps=7), task.mask)


@pytest.mark.parametrize("method", [Method(local_epochs=2, batch_size=4), InSteps(batch_size=4)], ids=str)
def test_over_selection_keeps_those_who_will_be_fastest(method: Method):
    # 7 steps of 4 see 7, 17 (10 + 4 + … = 2 · 10 + 4), 28 and 28 of so many examples
    speeds = [130.0, 600.0, 1000.0, 900.0, 5000.0, 400.0]
    options: dict[str, Any] = {
        "partition": small.dealt(1, 10, 30, 28, 40, 13),
        "devices": [replace(small.DEVICE, flops_per_s=speed) for speed in speeds],
    }
    (_, everybody) = small.run(small.server(method, schedule=Schedule(rounds=1, cohort=6), **options))
    seconds = {record.client: record.cost.seconds for record in everybody.clients}
    for cohort in range(1, 6):
        schedule = Schedule(rounds=1, cohort=cohort, sampler=Fastest(over_selection=6.0))
        (_, report) = small.run(small.server(method, schedule=schedule, **options))
        assert {r.client for r in report.clients} == set(sorted(seconds, key=seconds.__getitem__)[:cohort])
