"""What a hook may use: the server's own examples, questions to clients, validation, chance."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedray.data.datasets import Examples
from fedray.errors import MethodError, RunError
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext
from fedray.federation.population import LOOK_AGAIN_S
from fedray.federation.worker import Rules
from fedray.methods.autoflip import AutoFLIP
from fedray.methods.ceafl import CEAFL
from fedray.methods.fedavg_warm import FedAvgWarm
from fedray.methods.prunefl import PruneFL
from fedray.methods.snip import SNIP
from fedray.methods.staged import Staged
from fedray.types import Mask, Params, ServerState, Task
from tests import small
from tests.federation.probes import Hooked, HookedWithData, half, score, train_at_server

# ── the server's own examples ─────────────────────────────────────────────────────────────────────────────


def test_the_server_has_no_data_unless_the_method_declares_it():
    server = small.server(Hooked(at_setup=train_at_server), server_rows=12)
    with pytest.raises(MethodError, match=r"Hooked trains on server data.*uses_server_data"):
        server.setup()


def test_the_server_has_no_data_unless_it_is_given_some():
    server = small.server(HookedWithData(at_setup=train_at_server))
    with pytest.raises(MethodError, match=r"data\.server_fraction"):
        server.setup()


def test_the_server_trains_on_its_own_rows():
    seen: list[Client] = []
    server = small.server(
        HookedWithData(at_setup=lambda state, ctx: seen.extend([ctx.server, ctx.server])), server_rows=12
    )
    server.setup()
    data = server.place.dataset
    assert seen[0] is seen[1], "one client for a phase, so that its generator goes on"
    assert (seen[0].id, seen[0].info.profile.name) == (-1, "server")
    assert torch.equal(seen[0].x, data.normalise(data.train.x[:12]))
    assert seen[0].y.tolist() == data.train.y[:12].tolist()


# ── questions to clients ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("clients", "told"), [((), "at least one"), ((2, 6), r"\[6\].*0 … 5")])
def test_only_clients_that_exist_can_be_asked(clients: tuple[int, ...], told: str):
    def ask(state: ServerState, ctx: ServerContext) -> None:
        ctx.ask(score, {k: Task(state.params, state.mask) for k in clients})

    with pytest.raises(MethodError, match=told):
        small.server(Hooked(at_setup=ask)).setup()


@pytest.mark.parametrize("wrong", ["params", "mask"])
def test_a_task_of_another_layout_is_the_methods_mistake(wrong: str):
    def ask(state: ServerState, ctx: ServerContext) -> None:
        good = Task(state.params, state.mask)
        renamed = replace(ctx.layout, names=tuple(f"{name}!" for name in ctx.layout.names))
        if wrong == "params":
            foreign = replace(good, params=Params(state.params.flat, renamed))
        else:
            foreign = replace(good, mask=Mask.full(renamed))
        ctx.ask(score, {1: good, 2: foreign, 3: good})

    with pytest.raises(MethodError, match=rf"the task for client 2 has (a )?{wrong} of another layout"):
        small.server(Hooked(at_setup=ask)).setup()


# ── clients that are away ─────────────────────────────────────────────────────────────────────────────────

AWAY = replace(small.DEVICE, name="away", availability=0.2)


@pytest.mark.parametrize(
    "method",
    [
        SNIP(scorers=2),
        CEAFL(scorers=2),
        AutoFLIP(),
        AutoFLIP(scouts="aliased"),
        FedAvgWarm(),
        PruneFL(),
        PruneFL(initial_client=1),
    ],
)
def test_a_set_up_waits_for_clients_and_is_charged_for_it(method: Method):
    waited = []
    for seed in range(5):
        server = small.server(method, clients=2, seed=seed, devices=[AWAY])
        report = server.setup()
        accounts = server._accounts
        waited.append(accounts.waited_s)
        assert accounts.asked.seconds > 0
        assert report.metrics["time/simulated_s"] == pytest.approx(accounts.asked.seconds + waited[-1])
        assert any("waited" in note for note in report.notes) == (waited[-1] > 0)
    assert max(waited) > 0 and all(wait % LOOK_AGAIN_S == 0 for wait in waited)


def test_a_round_that_waits_is_charged_too():
    server = small.server(Method(), clients=1, devices=[AWAY])
    server.setup()
    waited = []
    for _ in range(3):
        report = server.step()
        waited.append(report.metrics["time/simulated_s"] - report.clients[0].cost.seconds)
    assert max(waited) > 0 and [wait % LOOK_AGAIN_S for wait in waited] == pytest.approx([0.0] * 3)


def test_who_took_part_in_the_round_is_not_waited_for_again():
    def ask(state: ServerState, ctx: ServerContext) -> None:
        ctx.ask(score, {k: Task(state.params, state.mask) for k in server._accounts.present})

    server = small.server(Hooked(at_prune=ask), devices=[AWAY])
    server.setup()
    for _ in range(3):
        server.step()
        cohort_waited = server._accounts.waited_s
        assert cohort_waited in (0.0, LOOK_AGAIN_S, 2 * LOOK_AGAIN_S), "for the cohort alone"


def test_a_client_that_never_comes_is_missing_and_named():
    def ask(state: ServerState, ctx: ServerContext) -> None:
        answers.append(ctx.ask(score, {k: Task(state.params, state.mask) for k in range(4)}))

    answers: list[CohortUpdate] = []
    gone = replace(small.DEVICE, name="gone", availability=1e-9)
    server = small.server(Hooked(at_setup=ask), clients=4, devices=[small.DEVICE, gone])
    report = server.setup()
    assert [record.client for record in answers[0].folded] == [0, 2]
    assert any("2 client(s) were asked and never came: [1, 3]" in note for note in report.notes)
    with pytest.raises(RunError, match="no client is available: the 4 asked were away"):
        small.server(Hooked(at_setup=ask), clients=4, devices=[gone]).setup()


@pytest.mark.parametrize("method", [SNIP(), CEAFL()])
def test_scorers_whose_answers_are_not_finite_are_named_as_the_cause(
    method: Method, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Client, "grad", lambda self, params, mask, **_: params.flat * torch.nan)
    told = r"round 0: 6 of 6 clients sent no update .*non-finite: clients \[0, 1, 2, .*check data and model"
    with pytest.raises(RunError, match=told):
        small.server(method).setup()
    with pytest.raises(MethodError, match="all 6 scorers are not finite"):
        small.server(method, rules=Rules(max_failed=1)).setup()


# ── validation data ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "method",
    [
        Hooked(at_prune=lambda state, ctx: ctx.validate(state.params, state.mask)),
        CEAFL(interval=1),
        Staged(policy="bandit", stages=3),
        Staged(policy="agent", stages=3),
    ],
)
def test_nobody_decides_without_validation_data(method: Method):
    server = small.server(method)
    server.side = replace(server.side, validation=Examples(server.side.validation.x[:0], np.zeros(0, int)))
    with pytest.raises(MethodError, match=rf"{type(method).__name__} decides.*data\.validation_fraction"):
        small.run(server)


# ── the rest ──────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_hook_sees():
    seen: list[tuple[int, int, int]] = []
    draws: list[tuple[float, tuple[int, ...]]] = []

    def look(state: ServerState, ctx: ServerContext) -> None:
        seen.append((ctx.round, ctx.rounds, len(ctx.clients)))
        draws.append((float(ctx.rng.random()), ctx.sample(3)))
        mask = half(ctx.layout)
        outcome = server.pool.evaluate(Task(state.params.masked(mask), mask), server.side.validation)
        assert ctx.validate(state.params, mask) == (outcome.accuracy, outcome.loss)
        assert ctx.clients[2] == server.population[2]

    server = small.server(Hooked(at_setup=look, at_prune=look))
    reports = small.run(server)
    assert seen == [(0, 3, 6), (1, 3, 6), (2, 3, 6), (3, 3, 6)]
    assert len({draw for draw, _ in draws}) == 4, "a generator for each hook and round"
    assert all(len(set(sampled)) == 3 for _, sampled in draws)
    assert reports[0].metrics["flops/clients"] == 0, "validation is not charged"
