"""A round, worked out by hand; and what the server promises to every method, whatever it does."""

import math
import random
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fedray.costs.devices import DEVICES
from fedray.data.datasets import Examples
from fedray.errors import ClientError, MethodError
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext
from fedray.federation.server import Schedule, Server, ServerSide
from fedray.federation.worker import Rules
from fedray.types import ClientUpdate, Mask, Params, ServerState, Task
from tests import small
from tests.federation.probes import (
    Moving,
    Pruned,
    Recording,
    SpyPool,
    half,
    pruned_half,
    spied,
    without_clocks,
)

# ── a round by hand ───────────────────────────────────────────────────────────────────────────────────────


def by_hand(pruned: tuple[int, ...] = ()) -> Server:
    """One pixel that is always 1, three classes, three weights that start at zero; lr 0.3.

    Client 0 has one example of class 0, client 1 has three of class 1.
    """
    return small.server(
        Pruned(pruned=pruned, lr=0.3),
        schedule=Schedule(rounds=1, cohort=2),
        architecture=small.LINEAR,
        prune_last=True,
        data=small.pixels([1, 1, 1, 1], [0, 1, 1, 1], classes=3),
        partition=small.dealt(1, 3),
    )


def test_a_round_by_hand():
    server = by_hand()
    server.setup()
    report = server.step()
    # at w = 0 every class has p = 1/3, and the gradient is p − 1 at the label, p elsewhere:
    # client 0 gets (0.2, −0.1, −0.1), client 1 gets (−0.1, 0.2, −0.1); they weigh 1 and 3
    weights = [(0.2 - 3 * 0.1) / 4, (-0.1 + 3 * 0.2) / 4, -0.1]
    assert server.model.flat.tolist() == pytest.approx(weights)
    assert server.state.round == 2
    client_bytes, flops = 32 + 3 * 4, 3 * 2 * 3
    slowest_s = 1 + client_bytes / 100 + 3 * flops / 1000 + client_bytes / 50
    pi, gpu = DEVICES["raspberry_pi_4"], DEVICES["workstation_gpu"]
    elsewhere = {
        "compute_bound": 0.009
        + client_bytes * 8 / 270.91e6
        + (0.1 + 0.0025 + 3 * flops / pi.flops_per_s)
        + client_bytes * 8 / 124.37e6,
        "network_bound": 0.0635
        + client_bytes * 8 / 5.9e6
        + (0.1 + 0.0005 + 3 * flops / gpu.flops_per_s)
        + client_bytes * 8 / 2e6,
    }
    losses = [math.log(sum(map(math.exp, weights))) - weights[label] for label in (0, 1, 1, 1)]
    assert without_clocks(report).metrics == {
        name: pytest.approx(value)
        for name, value in {
            "density/global": 1.0,
            "density/client_mean": 1.0,
            "bytes/down": 2 * client_bytes,
            "bytes/up": 2 * client_bytes,
            "flops/clients": 4 * flops,
            "flops/executed": 4 * flops,
            "flops/server": 0,
            "time/simulated_s": slowest_s,
            "time/compute_bound_s": elsewhere["compute_bound"],
            "time/network_bound_s": elsewhere["network_bound"],
            "time/server_s": 0,
            "energy/clients_j": 0,
            "energy/server_j": 0,
            "clients/selected": 2,
            "clients/dropped": 0,
            "clients/failed": 0,
            "clients/memory_bytes": 0,
            "train/loss": math.log(3),
            "val/accuracy": 0.75,
            "val/loss": sum(losses) / 4,
            "total/bytes/down": 2 * client_bytes,
            "total/bytes/up": 2 * client_bytes,
            "total/flops/clients": 4 * flops,
            "total/flops/executed": 4 * flops,
            "total/flops/server": 0,
            "total/time/simulated_s": slowest_s,
            "total/time/compute_bound_s": elsewhere["compute_bound"],
            "total/time/network_bound_s": elsewhere["network_bound"],
            "total/time/server_s": 0,
            "total/energy/clients_j": 0,
            "total/energy/server_j": 0,
            "total/clients/dropped": 0,
            "total/clients/failed": 0,
        }.items()
    }
    assert [(r.client, r.fate, r.num_examples) for r in report.clients] == [
        (0, "folded", 1),
        (1, "folded", 3),
    ]


def test_a_pruned_round_by_hand():
    server = by_hand(pruned=(2,))
    server.setup()
    report = server.step()
    # the third logit is always 0, so that the other two get the gradients they had
    assert server.model.flat.tolist() == pytest.approx([-0.025, 0.125, 0.0])
    assert server.model.flat[2] == 0
    assert report.metrics["density/global"] == pytest.approx(2 / 3)
    assert report.metrics["bytes/down"] == report.metrics["bytes/up"] == 2 * (32 + 2 * 4 + 1)
    assert report.metrics["flops/clients"] == 4 * 3 * 2 * 2


# ── the six steps ─────────────────────────────────────────────────────────────────────────────────────────


def test_the_six_steps_in_their_order():
    method = Recording()
    reports = small.run(small.server(method, schedule=Schedule(rounds=2, cohort=2)))
    assert [report.round for report in reports] == [0, 1, 2]
    expected = [("setup", 0), ("eval_params", 1)]
    for report in reports[1:]:
        cohort = [record.client for record in report.clients]
        expected += [(f"configure {k}", report.round) for k in cohort]
        expected += [(f"client_update {k}", report.round) for k in cohort]
        expected += [("aggregate", report.round), ("prune", report.round), ("eval_params", report.round + 1)]
    assert method.calls == expected


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let torch use two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_hook_runs_on_one_thread_since_more_give_other_bits():
    method = Recording()
    server = small.server(method)
    small.run(server)
    server.evaluate(server.side.validation)
    assert method.threads == {1}
    assert torch.get_num_threads() == 2, "and it is put back"


def test_a_round_in_two_halves_is_a_step():
    whole, halved = (small.server(Moving(), schedule=Schedule(rounds=3, cohort=4)) for _ in range(2))
    reports = small.run(whole)
    found = [halved.setup()]
    random.seed(5)
    while halved.state.round <= 3:
        opened = halved.open_round()
        assert opened.state.round == halved.state.round, "the round is not over"
        found.append(halved.close_round(opened, halved.method.prune))
    assert [without_clocks(report) for report in found] == [without_clocks(report) for report in reports]
    assert halved.model.sha256 == whole.model.sha256
    assert random.random() == random.Random(5).random(), "the global generators were lent"


def test_the_caller_of_an_open_round_prunes_in_the_place_of_the_method():
    server = small.server(Moving(), schedule=Schedule(rounds=2, cohort=4))
    server.setup()
    opened = server.open_round()
    chosen = half(opened.state.mask.layout, seed=9)
    with server.at_work():
        accuracy, _ = opened.ctx.validate(opened.state.params, chosen)
    report = server.close_round(opened, lambda state, cohort, ctx: replace(state, mask=chosen))
    assert (server.state.mask, server.state.round) == (chosen, 2)
    assert report.metrics["val/accuracy"] == accuracy
    opened = server.open_round()
    with pytest.raises(MethodError, match="that prune returned is False on"):
        server.close_round(opened, lambda state, *_: replace(state, mask=Mask.none(state.mask.layout)))
    assert server.state.round == 2


def test_a_step_that_fails_leaves_the_state_as_it_was():
    @dataclass(frozen=True, kw_only=True)
    class Failing(Method):
        def client_update(self, task: Task, client: Client) -> ClientUpdate:
            raise ValueError("no")

    server = small.server(Failing())
    server.setup()
    before = deepcopy(server.state)
    with pytest.raises(ClientError, match="failed in round 1"):
        server.step()
    assert server.state == before


def test_validation_is_due_every_so_often_and_at_the_end():
    reports = small.run(small.server(Method(), schedule=Schedule(rounds=5, cohort=2, eval_every=2)))
    assert [report.round for report in reports if "val/loss" in report.metrics] == [0, 2, 4, 5]


def test_without_validation_data_nothing_is_evaluated():
    server = small.server(Method())
    nothing = Examples(server.side.validation.x[:0], server.side.validation.y[:0])
    server.side = ServerSide(server.side.profile, server.side.rows, nothing)
    assert not [name for report in small.run(server) for name in report.metrics if name.startswith("val/")]


# ── masks and what lies behind them ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Shadows(Method):
    """Prune half before training, and keep values of its own behind the mask, NaN among them."""

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        """Prune half; write 7, and one NaN, behind the mask."""
        mask = half(ctx.layout)
        flat = torch.where(mask.flat, state.params.flat, 7.0)
        flat[int((~mask.flat).nonzero()[0])] = math.nan
        return replace(state, params=Params(flat, ctx.layout), mask=mask)


def test_what_is_sent_evaluated_and_saved_is_zero_outside_the_mask():
    server = small.server(Shadows(), pool=SpyPool)
    small.run(server)
    pool, mask = spied(server), half(server.place.model.layout)
    assert len(pool.tasks) == 3
    assert len(pool.evaluated) == 4
    for params in (server.model, *(task.params for task in [*pool.tasks, *pool.evaluated])):
        assert params.flat[~mask.flat].count_nonzero() == 0
        assert params.flat[mask.flat].count_nonzero() > 90


def test_values_behind_the_mask_stay_with_the_server():
    server = small.server(Shadows())
    small.run(server)
    behind = server.state.params.flat[~server.state.mask.flat]
    assert (behind == 7).sum() == len(behind) - 1 == 63
    assert behind.isnan().sum() == 1


def test_values_behind_the_mask_change_nothing_else():
    assert small.run(small.server(Shadows()))[-1].metrics["val/loss"] == pytest.approx(
        small.run(small.server(Pruned(pruned=pruned_half())))[-1].metrics["val/loss"]
    )


@pytest.mark.parametrize("where", ["setup", "prune"])
def test_a_mask_must_hold_what_is_not_prunable(where: str):
    @dataclass(frozen=True, kw_only=True)
    class PrunesBiases(Method):
        def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
            return self.cut(state) if where == "setup" else state

        def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
            return self.cut(state)

        def cut(self, state: ServerState) -> ServerState:
            mask = state.mask.clone()
            mask["fc1.bias"][:5] = False
            return replace(state, mask=mask)

    server = small.server(PrunesBiases())
    with pytest.raises(MethodError, match=rf"{where} returned is False on 5 entries that are not prunable"):
        small.run(server)


# ── who counts ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Troubled(Method):
    """Some clients send NaN, some send nothing, some sit out."""

    diverge: tuple[int, ...] = ()
    forget: tuple[int, ...] = ()
    rest: tuple[int, ...] = ()

    def client_update(self, task: Task, client: Client) -> Any:
        """ON THE DEVICE: whatever this client does."""
        if client.id in self.forget:
            return None
        if client.id in self.rest:
            return ClientUpdate(task.params, Mask.none(task.mask.layout))
        update = super().client_update(task, client)
        if client.id in self.diverge:
            update.params.flat[0] = math.nan
        return update


EVERYBODY = Schedule(rounds=1, cohort=6, chunk=6)


def test_updates_that_are_left_out_are_named_and_change_nothing():
    server = small.server(
        Troubled(diverge=(1, 4), forget=(2,)), schedule=EVERYBODY, rules=Rules(max_failed=0.5)
    )
    report = small.run(server)[-1]
    assert report.notes == (
        "1 update(s) left out as malformed: clients [2]",
        "2 update(s) left out as non-finite: clients [1, 4] (NaN, infinite, or too large to be averaged)",
    )
    assert report.metrics["clients/dropped"] == 3
    resting = small.server(Troubled(rest=(1, 2, 4)), schedule=EVERYBODY)
    assert small.run(resting)[-1].notes == ()
    assert server.model == resting.model


def test_if_nobody_counts_the_model_stays():
    server = small.server(Troubled(diverge=tuple(range(6))), schedule=EVERYBODY, rules=Rules(max_failed=1))
    server.setup()
    before = server.state.params.clone()
    report = server.step()
    assert server.state.params == before
    assert report.metrics["clients/dropped"] == 6
    assert "train/loss" not in report.metrics
    assert "density/client_mean" not in report.metrics


def test_the_training_loss_is_that_of_those_who_trained():
    report = small.run(small.server(Troubled(rest=(0, 3)), schedule=EVERYBODY))[-1]
    trained = [r for r in report.clients if r.client not in (0, 3)]
    expected = sum(r.loss * r.num_examples for r in trained) / sum(r.num_examples for r in trained)
    assert report.metrics["train/loss"] == pytest.approx(expected)
    nobody = small.run(small.server(Troubled(rest=tuple(range(6))), schedule=EVERYBODY))[-1]
    assert "train/loss" not in nobody.metrics


def test_metrics_of_the_clients_are_reported():
    @dataclass(frozen=True, kw_only=True)
    class Telling(Method):
        def client_update(self, task: Task, client: Client) -> ClientUpdate:
            return replace(super().client_update(task, client), metrics={"id": float(client.id)})

    report = small.run(small.server(Telling(), partition=small.dealt(10, 30), schedule=EVERYBODY))[-1]
    assert report.metrics["train/id"] == 0.75
