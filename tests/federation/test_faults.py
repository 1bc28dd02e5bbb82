"""Clients that fail: who is left out and named, and when a run ends."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from fedray.errors import ClientError, MethodError, RunError
from fedray.experiment.interrupt import signals
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.faults import LONGEST_TRACEBACK, fault_of, too_far
from fedray.federation.method import Method, ServerContext
from fedray.federation.pool import ActorOptions, Group, RayPool
from fedray.federation.server import Schedule, Server
from fedray.federation.worker import Rules, Workplace
from fedray.types import ClientUpdate, Fate, Mask, Params, RoundReport, ServerState, Task
from tests import small
from tests.federation.probes import Hooked, without_clocks

COHORT = 20
SCHEDULE = Schedule(rounds=2, cohort=COHORT)


def raises(error: BaseException) -> Callable[[ClientUpdate], Any]:
    def change(update: ClientUpdate) -> Any:
        raise error

    return change


def with_value(value: float) -> Callable[[ClientUpdate], ClientUpdate]:
    def change(update: ClientUpdate) -> ClientUpdate:
        flat = update.params.flat.clone()
        flat[5] = value
        return replace(update, params=Params(flat, update.params.layout))

    return change


def silent(update: ClientUpdate) -> ClientUpdate:
    return replace(update, mask=Mask.none(update.mask.layout), metrics={})


@dataclass(frozen=True, kw_only=True)
class Failing(Method):
    """FedAvg with momentum in the clients' memories, in which some clients do something else.

    `early` and `late` change what a client does before, or after, its training.
    """

    early: dict[int, Callable[[Any], Any]] = field(default_factory=dict)
    late: dict[int, Callable[[ClientUpdate], Any]] = field(default_factory=dict)
    only: int | None = None

    def client_update(self, task: Task, client: Client) -> Any:
        """ON THE DEVICE."""
        now = self.only in (None, client.round)
        if now and client.id in self.early:
            self.early[client.id](task)
        moved = client.sgd(task.params, task.mask).flat - task.params.flat
        client.memory["velocity"] = velocity = 0.5 * client.memory.get("velocity", 0.0) + moved
        client.memory["calls"] = client.memory.get("calls", 0) + 1
        update = ClientUpdate(Params(task.params.flat + velocity, task.params.layout), task.mask)
        return self.late[client.id](update) if now and client.id in self.late else update


def begin(method: Method, **options: Any) -> Server:
    given: dict[str, Any] = {"schedule": SCHEDULE, "clients": COHORT} | options
    return small.server(method, **given)


def fates(report: RoundReport) -> dict[int, Fate]:
    return {record.client: record.fate for record in report.clients if record.fate != "folded"}


BAD: dict[str, tuple[Fate, Callable[[Any], Any]]] = {
    "raises": ("failed", raises(ZeroDivisionError("no examples of class 7"))),
    "exits": ("failed", raises(SystemExit(0))),
    "stops an iteration": ("failed", raises(StopIteration())),
    "returns None": ("malformed", lambda update: None),
    "returns its weights": ("malformed", lambda update: update.params),
    "NaN": ("non-finite", with_value(np.nan)),
    "inf": ("non-finite", with_value(-np.inf)),
    "3e38": ("non-finite", with_value(3e38)),
    "1e30": ("too-large", with_value(1e30)),
    "-1e5": ("too-large", with_value(-1e5)),
}


# ── within the share ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stack", [1, 8])
@pytest.mark.parametrize(("fate", "change"), BAD.values(), ids=BAD)
def test_one_client_of_20_is_left_out_and_named(fate: Fate, change: Callable[[Any], Any], stack: int):
    server = begin(Failing(late={7: change}), stack=stack)
    reports = small.run(server)
    sane = begin(Failing(late={7: silent}), stack=stack)
    small.run(sane)
    assert server.model == sane.model
    for report in reports[1:]:
        assert fates(report) == {7: fate}
        assert [(fault.client, fault.fate) for fault in report.faults] == [(7, fate)]
        assert (report.metrics["clients/failed"], report.metrics["clients/dropped"]) == (1, 1)
        (note,) = report.notes
        assert "clients [7]" in note and note.startswith("1 ")
    assert reports[-1].metrics["total/clients/failed"] == 2
    assert 7 not in server.checkpoint.memories
    assert {memory["calls"] for memory in server.checkpoint.memories.values()} == {2}


@pytest.mark.parametrize("stack", [1, 8])
@pytest.mark.parametrize("where", ["early", "late"])
def test_a_client_that_raised_has_its_memory_as_it_was(where: str, stack: int):
    options: dict[str, Any] = {where: {3: raises(ValueError("no"))}}
    method = Failing(**options, only=2)
    server = begin(method, schedule=Schedule(3, COHORT), stack=stack)
    reports = small.run(server)
    assert [fates(report) for report in reports[1:]] == [{}, {3: "failed"}, {}]
    assert server.checkpoint.memories[3]["calls"] == 2
    record = reports[2].clients[3]
    assert record.cost.bytes_up == 0 < record.cost.bytes_down
    assert (record.cost.flops > 0) == (where == "late"), "it is charged for what it did"


def test_the_traceback_is_kept_and_the_cause_named():
    (_, report, _) = small.run(begin(Failing(late={7: BAD["raises"][1], 9: BAD["raises"][1]})))
    first, second = report.faults
    assert first.cause == second.cause == "ZeroDivisionError: no examples of class 7"
    assert "test_faults.py" in first.traceback and first.traceback.endswith("class 7\n")
    assert report.notes == (
        "2 client(s) failed and were left out: clients [7, 9]: ZeroDivisionError: no examples of class 7",
    )


def test_causes_are_counted_apart():
    errors = {k: raises(KeyError(k) if k % 2 else OSError("gone")) for k in range(4)}
    (_, report, _) = small.run(begin(Failing(late=errors), rules=Rules(max_failed=0.2)))
    assert report.notes == (
        "2 client(s) failed and were left out: clients [0, 2]: OSError: gone",
        "1 client(s) failed and were left out: clients [1]: KeyError: 1",
        "1 client(s) failed and were left out: clients [3]: KeyError: 3",
    )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x" * 10**6),
        ValueError("a\ud800b"),
        ValueError("first\nsecond\n\n"),
        ValueError(),
        type("Mute", (Exception,), {"__str__": lambda self: 1 / 0})(),
    ],
    ids=["long", "surrogate", "lines", "empty", "mute"],
)
def test_any_error_becomes_a_line_and_a_text_that_can_be_written(error: Exception):
    fault = fault_of(3, error)
    assert fault.cause.isprintable() and 0 < len(fault.cause) < 300
    assert 0 < len(fault.traceback.encode()) < 2 * LONGEST_TRACEBACK


# ── beyond the share ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stack", [1, 8])
@pytest.mark.parametrize(("share", "allowed"), [(0.0, 0), (0.1, 2), (0.15, 3), (0.99, 19), (1.0, 20)])
def test_the_share_of_a_cohort_may_raise_and_not_one_more(share: float, allowed: int, stack: int):
    change, options = BAD["raises"][1], {"rules": Rules(max_failed=share), "stack": stack}
    bad = [1, 4, 7, 16, 19, *(k for k in range(COHORT) if k not in (1, 4, 7, 16, 19))]
    report = small.run(begin(Failing(late=dict.fromkeys(bad[:allowed], change)), **options))[-1]
    assert sorted(fates(report)) == sorted(bad[:allowed])
    if allowed < COHORT:
        server = begin(Failing(late=dict.fromkeys(bad[: allowed + 1], change)), **options)
        server.setup()
        before = server.state
        told = (
            rf"(?s)client \d+ failed in round 1: .*class 7.*clients\.max_failed lets {allowed or 'none'} fail"
        )
        with pytest.raises(ClientError, match=told):
            server.step()
        assert server.state == before and not server.checkpoint.memories


@pytest.mark.parametrize("name", ["returns None", "NaN", "inf", "3e38", "1e30"])
def test_a_round_in_which_nobody_counts_ends_the_run(name: str):
    fate, change = BAD[name]
    server = begin(Failing(late=dict.fromkeys(range(COHORT), change)))
    told = rf"round 1: 20 of 20 clients .* and clients\.max_failed lets 2 fail: {fate}: "
    with pytest.raises(RunError, match=told + r"clients \[0, 1, .*To change: .*or raise clients\.max_failed"):
        small.run(server)


def test_causes_of_all_kinds_count_together():
    late = {3: BAD["NaN"][1], 9: BAD["returns None"][1], 12: BAD["raises"][1]}
    told = (
        r"3 of 20 clients .* lets 2 fail: failed: clients \[12\] \(ZeroDivisionError: .*\); "
        r"malformed: clients \[9\] \(client_update returned None.*\); non-finite: clients \[3\] \(its"
    )
    with pytest.raises(RunError, match=told):
        small.run(begin(Failing(late=late)))


@pytest.mark.parametrize("name", BAD)
def test_in_a_cohort_of_nine_nobody_may_fail(name: str):
    server = begin(Failing(late={2: BAD[name][1]}), clients=9, schedule=Schedule(1, 9))
    with pytest.raises((ClientError, RunError), match=r"clients\.max_failed lets none fail"):
        small.run(server)


def test_a_bug_of_the_method_ends_the_run_before_all_have_trained():
    calls: list[int] = []

    def count(task: Any) -> None:
        calls.append(1)
        raise NameError("name 'totl' is not defined")

    clients = 100
    method = Failing(early=dict.fromkeys(range(clients), count))
    for chunk in (None, clients):
        calls.clear()
        server = begin(
            method,
            clients=clients,
            schedule=Schedule(1, clients, chunk=chunk),
            partition=small.dealt(*[1] * clients),
        )
        with pytest.raises(ClientError, match=r"(?s)name 'totl'.*1[14] client\(s\) failed so far"):
            small.run(server)
        assert len(calls) == (14 if chunk is None else 11), "two chunks of seven, or part of one"


# ── what is no fault of a client ─────────────────────────────────────────────────────────────────────────


def write_and_raise(task: Task) -> None:
    task.params.flat.add_(1)
    raise ValueError("after it wrote")


def write_metric(update: ClientUpdate) -> ClientUpdate:
    return replace(update, metrics={"gain": cast(float, "high")})


AT_ONCE = [
    ({"late": {3: raises(MethodError("undeclared"))}}, "undeclared$"),
    ({"late": {3: write_metric}}, "'metrics.gain' is str"),
    ({"early": {3: write_and_raise}}, "work on a copy$"),
    ({"late": {3: raises(MemoryError())}}, "MemoryError"),
    ({"late": {3: raises(torch.OutOfMemoryError("CUDA out of memory"))}}, "CUDA out of memory"),
    ({"late": {3: raises(OSError(28, "No space left on device"))}}, "No space left"),
]


@pytest.mark.parametrize("stack", [1, 8])
@pytest.mark.parametrize(("options", "told"), AT_ONCE, ids=[told for _, told in AT_ONCE])
def test_a_broken_rule_and_a_machine_without_room_end_the_run_at_once(
    options: dict[str, Any], told: str, stack: int
):
    with pytest.raises(ClientError, match=rf"(?s)client 3 failed in round 1.*{told}"):
        small.run(begin(Failing(**options), rules=Rules(max_failed=1), stack=stack))


def stop(update: ClientUpdate) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return update


def stop_and_wrap(update: ClientUpdate) -> Any:
    try:
        return stop(update)
    except SystemExit as error:
        raise RuntimeError("a library wraps what it meets") from error


def own_handler(*_: Any) -> None:
    sys.exit(7)


@pytest.mark.parametrize("handler", ["fedray", "own"])
@pytest.mark.parametrize("change", [stop, stop_and_wrap])
def test_a_signal_while_a_client_trains_is_no_fault_of_the_client(change: Callable[[Any], Any], handler: str):
    server = begin(Failing(late={3: change}), rules=Rules(max_failed=1))
    server.setup()
    before, ending = (
        server.state,
        pytest.raises(SystemExit if handler == "fedray" else (SystemExit, RuntimeError)),
    )
    old = signal.signal(signal.SIGTERM, signal.SIG_DFL if handler == "fedray" else own_handler)
    try:
        with ending, signals() as stopping, stopping.cuts():
            server.step()
    finally:
        signal.signal(signal.SIGTERM, old)
    assert server.state == before


def test_an_interrupt_is_no_fault():
    with pytest.raises(KeyboardInterrupt):
        small.run(begin(Failing(late={3: raises(KeyboardInterrupt())}), rules=Rules(max_failed=1)))


# ── too large ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [3e38, -3e38, 1e36, 1e30, 1e20, 1e10, 1e5])
@pytest.mark.parametrize("how", [{}, {"stack": 8}, {"schedule": Schedule(6, COHORT, chunk=1)}], ids=str)
def test_three_senders_of_huge_weights_harm_nobody_and_nobody_else_is_blamed(
    value: float, how: dict[str, Any]
):
    def play(change: Callable[[Any], Any]) -> tuple[list[RoundReport], Server]:
        late = {2: change, 3: change, 11: change}
        options = {"schedule": Schedule(6, COHORT), "rules": Rules(max_failed=0.15)} | how
        server = begin(Failing(late=late), **options)
        return small.run(server), server

    (reports, server), (_, sane) = play(with_value(value)), play(silent)
    assert [sorted(fates(report)) for report in reports[1:]] == [[2, 3, 11]] * 6
    assert server.model == sane.model


LAYOUT = small.workplace(Method(), architecture=small.CNN).model.layout
"""349 entries, of which 8 are running statistics."""


def moved(by: dict[int, float], start: float = 0.0, held: Mask | None = None) -> tuple[ClientUpdate, Task]:
    before = Params(torch.full((LAYOUT.size,), start), LAYOUT)
    after = before.flat.clone()
    for entry, change in by.items():
        after[entry] += change
    mask = held or Mask.full(LAYOUT)
    return ClientUpdate(Params(after, LAYOUT), mask), Task(before.masked(mask), mask)


WEIGHTS = LAYOUT.trainable_flat.nonzero().flatten().tolist()
STATISTICS = (~LAYOUT.trainable_flat).nonzero().flatten().tolist()


def test_the_bound_is_a_multiple_of_the_norm_that_the_weights_have_or_would_have_as_ones():
    assert (len(WEIGHTS), len(STATISTICS)) == (341, 8)
    ones = 341**0.5
    for start, norm in ((0.0, ones), (0.01, ones), (1.0, ones), (-100.0, 100 * ones)):
        for most in (1000.0, 3.0):
            assert too_far(*moved({0: 0.999 * most * norm}, start), most) is None
            told = too_far(*moved({0: 1.001 * most * norm}, start), most)
            assert told is not None and "its weights moved by" in told and f"beyond {most:g} × " in told
    for most in (1e-300, 1e300):
        too_far(*moved({0: 1.0}), most)


def test_running_statistics_have_a_bound_that_the_variance_of_raw_data_keeps():
    assert too_far(*moved(dict.fromkeys(STATISTICS, 1e9)), 3.0) is None
    told = too_far(*moved(dict.fromkeys(STATISTICS, 1e13)), 1000.0)
    assert told is not None and told.startswith("its running statistics moved by")


def test_behind_the_mask_anything_may_lie():
    held = Mask(torch.arange(LAYOUT.size) % 2 == 0, LAYOUT)
    for value in (1e30, np.nan, np.inf):
        assert too_far(*moved({1: value}, held=held), 1000.0) is None
        silent_one, task = moved({0: 1.0, 1: value}, held=Mask.none(LAYOUT))
        assert too_far(silent_one, task, 1000.0) is None
    assert too_far(*moved({0: 1e6, 1: np.nan}, held=held), 1000.0) is not None


def test_the_quick_look_never_lets_pass_what_is_too_far():
    rng = np.random.default_rng(0)
    for scale in np.geomspace(1e-2, 1e4, 60):
        update, task = moved(dict(enumerate((scale * rng.standard_normal(LAYOUT.size)).tolist())))
        change = (update.params.flat - task.params.flat)[WEIGHTS].double().norm()
        assert (too_far(update, task, 100.0) is not None) == (float(change) > 100 * 341**0.5)


# ── the method's own numbers ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("hook", ["setup", "aggregate", "prune"])
def test_a_model_that_a_hook_spoils_is_refused_before_clients_are_blamed_for_it(hook: str):
    @dataclass(frozen=True, kw_only=True)
    class Spoiling(Method):
        def spoilt(self, where: str, state: ServerState) -> ServerState:
            flat = state.params.flat.clone()
            flat[3] = np.nan if where == hook and state.round in (0, 2) else flat[3]
            return replace(state, params=Params(flat, state.params.layout))

        def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
            return self.spoilt("setup", state)

        def aggregate(self, state: ServerState, cohort: CohortUpdate) -> ServerState:
            return self.spoilt("aggregate", super().aggregate(state, cohort))

        def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
            return self.spoilt("prune", state)

    server = begin(Spoiling(), schedule=Schedule(4, COHORT))
    with pytest.raises(
        MethodError, match=rf"the model that {hook} returned has NaN or infinity in fc1\.weight"
    ):
        small.run(server)
    assert server.state.params.is_finite()
    assert server.state.round == {"setup": 0}.get(hook, 2)


# ── outside the training ─────────────────────────────────────────────────────────────────────────────────


def asking(
    change: Callable[[ClientUpdate], Any], clients: int
) -> Callable[[ServerState, ServerContext], None]:
    """Return a hook that asks some clients, of which client 1 does something else."""

    def answer(task: Task, client: Client) -> Any:
        update = ClientUpdate(task.params, task.mask, sums={"ones": torch.ones(1)})
        return change(update) if client.id == 1 else update

    def hook(state: ServerState, ctx: ServerContext) -> None:
        found = ctx.ask(answer, dict.fromkeys(range(clients), Task(state.params, state.mask)))
        assert found.sum("ones").item() == clients - 1

    return hook


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("when", ["at_setup", "at_prune"])
def test_the_share_of_an_exchange_outside_the_training_is_that_of_the_asked(name: str, when: str):
    fate, change = BAD[name]

    def asked(clients: int) -> Server:
        hooks: dict[str, Any] = {when: asking(change, clients)}
        return begin(Hooked(**hooks), schedule=Schedule(1, 4))

    reports = small.run(asked(10))
    report = reports[0 if when == "at_setup" else 1]
    assert [(fault.client, fault.fate) for fault in report.faults] == [(1, fate)]
    assert (report.metrics["clients/failed"], report.metrics["clients/dropped"]) == (1, 0)
    assert reports[-1].metrics["total/clients/failed"] == 1
    assert "clients [1]" in report.notes[0]
    with pytest.raises((ClientError, RunError), match=r"clients\.max_failed lets none fail"):
        small.run(asked(9))


@pytest.mark.parametrize(("bad", "ends"), [((), False), ((4,), False), ((4, 13), False), ((4, 13, 14), True)])
@pytest.mark.parametrize("name", BAD)
def test_of_clients_that_are_asked_in_turn_the_share_is_that_of_all(
    bad: tuple[int, ...], ends: bool, name: str
):
    fate, change = BAD[name]

    def answer(task: Task, client: Client) -> Any:
        update = ClientUpdate(task.params, task.mask)
        return change(update) if client.id in bad else update

    def in_turn(state: ServerState, ctx: ServerContext) -> None:
        for client in range(COHORT):
            found = ctx.ask(answer, {client: Task(state.params, state.mask)}, among=COHORT)
            assert len(found.folded) == (client not in bad)

    server = begin(Hooked(at_setup=in_turn))
    if ends:
        with pytest.raises((ClientError, RunError), match=r"clients\.max_failed lets 2 fail"):
            server.setup()
    else:
        assert [(f.client, f.fate) for f in server.setup().faults] == [(k, fate) for k in bad]


# ── what a client that failed leaves behind ──────────────────────────────────────────────────────────────


def test_a_client_that_fails_within_the_model_changes_nothing_for_the_next():
    """A BatchNorm that failed while its statistics were measured would track them from then on."""

    def spoil(task: Task, client: Client) -> Any:
        for module in client._engine.module.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.track_running_stats, module.momentum = True, 1.0
        raise ValueError("within the model")

    @dataclass(frozen=True, kw_only=True)
    class Spoiling(Method):
        bad: bool = True

        def client_update(self, task: Task, client: Client) -> Any:
            if client.id == 4:
                return spoil(task, client) if self.bad else None
            return super().client_update(task, client)

    options: dict[str, Any] = {"architecture": small.CNN, "norm": "static"}
    one, other = (begin(Spoiling(bad=bad), **options) for bad in (True, False))
    small.run(one)
    small.run(other)
    assert one.model == other.model


# ── on actors ────────────────────────────────────────────────────────────────────────────────────────────


TEN = Schedule(rounds=2, cohort=10)


def on_ray(actors: int, *, per_client: bool = False) -> Callable[[Workplace], RayPool]:
    return lambda place: RayPool(place, [Group(actors, ActorOptions(cpu=0.1))], per_client=per_client)


def told(report: RoundReport) -> str:
    """What a report says, NaN included; of tracebacks the last line, since Python draws their frames."""
    faults = (replace(fault, traceback=fault.traceback.rpartition("\n")[2]) for fault in report.faults)
    return repr(replace(without_clocks(report), faults=tuple(faults)))


@pytest.mark.slow
@pytest.mark.parametrize(("actors", "per_client"), [(1, False), (3, False), (10, True)])
def test_on_actors_the_same_clients_are_left_out(actors: int, per_client: bool, ray_local: Any):
    method, rules = Failing(late={3: BAD["raises"][1], 8: BAD["NaN"][1]}), Rules(max_failed=0.2)
    here = begin(method, clients=10, schedule=TEN, rules=rules)
    expected = small.run(here)
    pool = on_ray(actors, per_client=per_client)
    there = begin(method, clients=10, schedule=TEN, rules=rules, pool=pool)
    reports = small.run(there)
    assert there.model == here.model
    assert list(map(told, reports)) == list(map(told, expected))
    assert [fault.client for fault in reports[1].faults] == [3, 8]
    assert there.checkpoint.memories.keys() == here.checkpoint.memories.keys()
    there.pool.close()


@pytest.mark.slow
@pytest.mark.parametrize(("actors", "per_client"), [(2, False), (10, True)])
def test_on_actors_the_share_is_that_of_the_whole_cohort(actors: int, per_client: bool, ray_local: Any):
    """Two clients of one actor and one of another: each actor alone is within the share."""
    late = dict.fromkeys((0, 1, 9), BAD["raises"][1])
    rules, pool = Rules(max_failed=0.2), on_ray(actors, per_client=per_client)
    server = begin(Failing(late=late), clients=10, schedule=TEN, rules=rules, pool=pool)
    server.setup()
    with pytest.raises(ClientError, match=r"(?s)client 0 failed in round 1.*3 client\(s\) failed so far"):
        server.step()
    server.pool.close()
