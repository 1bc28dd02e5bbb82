"""A round, worked out by hand; and what the server promises to every method, whatever it does."""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fedray.costs.codec import Codec
from fedray.costs.extras import extras_size
from fedray.data.datasets import Examples
from fedray.errors import ClientError, MethodError
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext
from fedray.federation.pool import LocalPool
from fedray.federation.server import Schedule, Server, ServerSide
from fedray.federation.worker import Answer, Chunk, Job, Rules
from fedray.pruning import masks
from fedray.types import (
    METRICS,
    ClientInfo,
    ClientUpdate,
    Layout,
    Mask,
    Params,
    RoundReport,
    ServerState,
    Task,
)
from tests import small

WEIGHTS = 163
DENSE = 2 * (8 * 16 + 3 * 8)
CLOCKS = tuple(f"{total}time/{clock}" for total in ("", "total/") for clock in ("wall_s", "server_wall_s"))


class SpyPool(LocalPool):
    """A local pool that keeps copies of the jobs that it was given, and checks that nobody changes them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.jobs: list[tuple[Job, tuple[Chunk, ...]]] = []
        self.evaluated: list[Task] = []

    def run(self, job: Job, chunks: Sequence[Chunk]) -> Answer:
        """Keep the job and run it."""
        before = deepcopy(job.tasks)
        self.jobs.append((replace(job, tasks=before), tuple(chunks)))
        answer = super().run(job, chunks)
        assert job.tasks == before, "what is broadcast stays as it was"
        return answer

    def evaluate(self, task: Task, examples: Examples) -> Any:
        """Keep the task and evaluate."""
        self.evaluated.append(task)
        return super().evaluate(task, examples)

    @property
    def tasks(self) -> list[Task]:
        """Every task that was sent, in order."""
        return [task for job, _ in self.jobs for task in job.tasks]


def spied(server: Server) -> SpyPool:
    assert isinstance(server.pool, SpyPool)
    return server.pool


def half(layout: Layout, seed: int = 0) -> Mask:
    return masks.random(layout, 0.5, np.random.default_rng(seed))


def without_clocks(report: RoundReport) -> RoundReport:
    return replace(report, metrics={k: v for k, v in report.metrics.items() if k not in CLOCKS})


# ── a round by hand ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Pruned(Method):
    """Start with some entries pruned."""

    pruned: tuple[int, ...] = ()

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        """Take the entries out of the mask."""
        mask = state.mask.clone()
        mask.flat[list(self.pruned)] = False
        return replace(state, mask=mask)


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
            "time/server_s": 0,
            "clients/selected": 2,
            "clients/dropped": 0,
            "train/loss": math.log(3),
            "val/accuracy": 0.75,
            "val/loss": sum(losses) / 4,
            "total/bytes/down": 2 * client_bytes,
            "total/bytes/up": 2 * client_bytes,
            "total/flops/clients": 4 * flops,
            "total/flops/executed": 4 * flops,
            "total/flops/server": 0,
            "total/time/simulated_s": slowest_s,
            "total/time/server_s": 0,
            "total/clients/dropped": 0,
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


# ── the six steps ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Recording(Method):
    """Write down which hook is called, in which round, and with how many threads torch may work."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    def note(self, hook: str, round: int) -> None:
        """Write down a call."""
        self.calls.append((hook, round))
        self.threads.add(torch.get_num_threads())

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        """Note the call."""
        assert ctx.round == state.round
        self.note("setup", state.round)
        return super().setup(state, ctx)

    def configure(self, state: ServerState, client: ClientInfo) -> Task:
        """Note the call; tell the client the round."""
        self.note(f"configure {client.id}", state.round)
        return replace(super().configure(state, client), extras={"round": state.round})

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """Note the call."""
        round = task.extras["round"]
        assert isinstance(round, int)
        self.note(f"client_update {client.id}", round)
        return super().client_update(task, client)

    def aggregate(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
        """Note the call."""
        self.note("aggregate", state.round)
        return super().aggregate(state, cohort)

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        """Note the call."""
        assert ctx.round == state.round
        self.note("prune", state.round)
        return super().prune(state, cohort, ctx)

    def eval_params(self, state: ServerState) -> Params:
        """Note the call, with the round that the state has advanced to."""
        self.note("eval_params", state.round)
        return super().eval_params(state)


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


def test_the_reported_metrics_are_those_of_the_list():
    first, *others = small.run(small.server(Method()))
    reported = {name for name in others[-1].metrics if not name.startswith("total/")}
    assert reported == set(METRICS) - {"test/accuracy", "test/loss"}
    assert set(first.metrics) == set(others[-1].metrics) - {"train/loss", "density/client_mean"}


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


# ── masks and what lies behind them ──────────────────────────────────────────────────────────────────────


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


def pruned_half() -> tuple[int, ...]:
    return tuple((~half(small.workplace(Method()).model.layout).flat).nonzero().flatten().tolist())


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


# ── what a hook may use ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Hooked(Method):
    """Do something in `setup`, something in `prune`."""

    at_setup: Callable[[ServerState, ServerContext], Any] | None = None
    at_prune: Callable[[ServerState, ServerContext], Any] | None = None

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        """Do the first thing."""
        if self.at_setup:
            self.at_setup(state, ctx)
        return state

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        """Do the second thing."""
        if self.at_prune:
            self.at_prune(state, ctx)
        return state


@dataclass(frozen=True, kw_only=True)
class HookedWithData(Hooked):
    """The same, with data on the server."""

    uses_server_data: ClassVar[bool] = True


def train_at_server(state: ServerState, ctx: ServerContext) -> Params:
    return ctx.server.sgd(state.params, state.mask, epochs=2)


def test_the_server_has_no_data_unless_the_method_declares_it():
    server = small.server(Hooked(at_setup=train_at_server), server_rows=12)
    with pytest.raises(MethodError, match=r"Hooked trains on server data.*uses_server_data"):
        server.setup()


def test_the_server_has_no_data_unless_it_is_given_some():
    server = small.server(HookedWithData(at_setup=train_at_server))
    with pytest.raises(MethodError, match=r"data\.server_fraction"):
        server.setup()


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


def score(task: Task, client: Client) -> ClientUpdate:
    """Send a gradient and no weights."""
    gradient = client.grad(task.params, task.mask)
    return ClientUpdate(task.params, Mask.none(task.mask.layout), sums={"gradient": gradient})


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


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Moving(Method):
    """Prune half before training, and another half after round 2."""

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        """Prune half."""
        return replace(state, mask=half(ctx.layout))

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        """Prune another half."""
        return replace(state, mask=half(ctx.layout, seed=1)) if state.round == 2 else state


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


def test_totals_are_the_sums_over_the_rounds():
    server = small.server(HookedWithData(at_setup=train_at_server), server_rows=12, rules=Rules(dropout=0.3))
    reports = small.run(server)
    names = {name.removeprefix("total/") for name in reports[0].metrics if name.startswith("total/")}
    assert names == {name for name in METRICS if name.split("/")[0] in ("bytes", "flops", "time")} | {
        "clients/dropped"
    }
    for name in names:
        sums = np.cumsum([report.metrics[name] for report in reports])
        assert [report.metrics[f"total/{name}"] for report in reports] == pytest.approx(sums.tolist())
    assert reports[-1].metrics["total/clients/dropped"] > 0


# ── the clock ────────────────────────────────────────────────────────────────────────────────────────────

SLOW = replace(small.DEVICE, name="slow", flops_per_s=100.0)


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

    slowest = timed(method=SlowOnesReturnNothing()).metrics["time/simulated_s"]
    report = timed(Rules(deadline_s=slowest / 2), SlowOnesReturnNothing())
    assert report.metrics["time/simulated_s"] == slowest / 2


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
        schedule = Schedule(rounds=1, cohort=cohort, over_selection=6.0)
        (_, report) = small.run(small.server(method, schedule=schedule, **options))
        assert {r.client for r in report.clients} == set(sorted(seconds, key=seconds.__getitem__)[:cohort])


# ── who counts ───────────────────────────────────────────────────────────────────────────────────────────


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
    server = small.server(Troubled(diverge=(1, 4), forget=(2,)), schedule=EVERYBODY)
    report = small.run(server)[-1]
    assert report.notes == (
        "2 update(s) left out as non-finite: clients [1, 4]",
        "1 update(s) left out as malformed: clients [2]",
    )
    assert report.metrics["clients/dropped"] == 3
    resting = small.server(Troubled(rest=(1, 2, 4)), schedule=EVERYBODY)
    assert small.run(resting)[-1].notes == ()
    assert server.model == resting.model


def test_if_nobody_counts_the_model_stays():
    server = small.server(Troubled(diverge=tuple(range(6))), schedule=EVERYBODY)
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


# ── the same bits ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Everything(Moving):
    """Everything that may depend on chance, on memory or on the order of things."""

    uses_server_data: ClassVar[bool] = True

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: remember the last model, and start half way to it."""
        last = client.memory.get("last", task.params.flat)
        start = Params((task.params.flat + last) / 2, task.params.layout)
        params = client.sgd(start, task.mask)
        client.memory["last"] = params.flat
        return ClientUpdate(params, task.mask, metrics={"draw": float(client.rng.random())})

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        """Move the mask, train at the server, ask a client; remember a number."""
        state = super().prune(state, cohort, ctx)
        asked = ctx.ask(score, {k: Task(state.params, state.mask) for k in ctx.sample(2)})
        step = Params(state.params.flat - 0.1 * asked.sum("gradient"), ctx.layout)
        params = ctx.server.sgd(step, state.mask)
        return replace(state, params=params, memory=(state.memory or 0.0) + float(ctx.rng.random()))


def everything(**options: Any) -> Server:
    usual: dict[str, Any] = {
        "server_rows": 12,
        "rules": Rules(dropout=0.2),
        "schedule": Schedule(rounds=4, cohort=4),
    }
    return small.server(Everything(batch_size=5, momentum=0.5), **usual | options)


def test_the_same_seed_gives_the_same_bits():
    first, again, other = everything(), everything(), everything(seed=1)
    reports = [[without_clocks(report) for report in small.run(server)] for server in (first, again, other)]
    assert reports[0] == reports[1] != reports[2]
    assert first.model.sha256 == again.model.sha256 != other.model.sha256
    assert first.state == again.state


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_other_chunks_give_almost_the_same_numbers(chunk: int):
    whole = everything(schedule=Schedule(rounds=4, cohort=4, chunk=4))
    cut = everything(schedule=Schedule(rounds=4, cohort=4, chunk=chunk))
    for a, b in zip(small.run(whole), small.run(cut), strict=True):
        assert [(r.client, r.fate, r.cost) for r in a.clients] == [
            (r.client, r.fate, r.cost) for r in b.clients
        ]
        assert a.metrics["val/loss"] == pytest.approx(b.metrics["val/loss"], rel=1e-4)
    np.testing.assert_allclose(whole.model.flat.numpy(), cut.model.flat.numpy(), atol=1e-5)


def test_a_run_that_goes_on_from_a_checkpoint_equals_one_that_never_stopped():
    whole = everything()
    reports = small.run(whole)
    stopped = everything(schedule=Schedule(rounds=4, cohort=4))
    stopped.setup()
    stopped.step()
    stopped.step()
    saved = deepcopy(stopped.checkpoint)
    stopped.step()  # what happens after it was saved must not reach it
    resumed = everything(checkpoint=saved)
    rest = small.run(resumed)
    assert [report.round for report in rest] == [3, 4]
    assert list(map(without_clocks, rest)) == list(map(without_clocks, reports[3:]))
    assert resumed.state == whole.state
    assert resumed.checkpoint.holds == whole.checkpoint.holds
    assert resumed.checkpoint.memories.keys() == whole.checkpoint.memories.keys() != set()
    for client, memory in whole.checkpoint.memories.items():
        assert torch.equal(memory["last"], resumed.checkpoint.memories[client]["last"])


def test_what_a_client_forgets_is_not_kept():
    @dataclass(frozen=True, kw_only=True)
    class Once(Method):
        def client_update(self, task: Task, client: Client) -> ClientUpdate:
            if client.memory:
                client.memory.clear()
            else:
                client.memory["met"] = True
            return super().client_update(task, client)

    server = small.server(Once(), schedule=Schedule(rounds=2, cohort=6))
    server.setup()
    server.step()
    assert server.checkpoint.memories == {k: {"met": True} for k in range(6)}
    server.step()
    assert server.checkpoint.memories == {}


# ── the schedule ─────────────────────────────────────────────────────────────────────────────────────────


def test_validation_is_due_every_so_often_and_at_the_end():
    reports = small.run(small.server(Method(), schedule=Schedule(rounds=5, cohort=2, eval_every=2)))
    assert [report.round for report in reports if "val/loss" in report.metrics] == [0, 2, 4, 5]


def test_without_validation_data_nothing_is_evaluated():
    server = small.server(Method())
    nothing = Examples(server.side.validation.x[:0], server.side.validation.y[:0])
    server.side = ServerSide(server.side.profile, server.side.rows, nothing)
    assert not [name for report in small.run(server) for name in report.metrics if name.startswith("val/")]


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


def test_memories_travel_with_the_chunk_of_their_client():
    server = everything(pool=SpyPool)
    small.run(server)
    for job, chunks in spied(server).jobs:
        for chunk in chunks:
            assert set(chunk.memories) <= {order.client for order in chunk.orders}
        assert job.round <= 4
    assert any(chunk.memories for _, chunks in spied(server).jobs for chunk in chunks)
