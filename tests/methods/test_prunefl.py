"""PruneFL: initial pruning at one client and its price, what clients gather, how the mask is rebuilt."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import sigmoid

from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError, MethodError, RunError
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client, Step
from fedray.federation.method import Method, ServerContext
from fedray.federation.server import Schedule, Server
from fedray.federation.worker import Rules
from fedray.methods import prunefl
from fedray.methods.prunefl import PruneFL, binary_cross_entropy
from fedray.pruning.greedy import rebuild
from fedray.types import Mask, Params, ServerState, Task
from tests import small
from tests.federation.probes import without_clocks

SIZE, WEIGHTS = 163, 128
"""Weights of small.MLP, and how many of them are prunable."""
DATA = small.dataset(400)
COSTLY: dict[str, Any] = {"layer_times_s": {"fc1.weight": 1.0}, "constant_s": 1.0}
"""Times that make most weights not worth it."""


def begin(method: PruneFL, rounds: int = 12, cohort: int = 4, **place: Any) -> Server:
    return small.server(method, schedule=Schedule(rounds, cohort), data=DATA, **place)


@dataclass(frozen=True, kw_only=True)
class Watched(PruneFL):
    """PruneFL that remembers the state before and after each `prune`."""

    seen: list[tuple[ServerState, ServerState]] = field(default_factory=list, compare=False)

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        after = super().prune(state, cohort, ctx)
        self.seen.append((state, after))
        return after


@dataclass
class Calls:
    """What `client.sgd` was asked for."""

    clients: list[int] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    steps: list[int | None] = field(default_factory=list)
    dense: list[bool] = field(default_factory=list)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    found, sgd = Calls(), Client.sgd

    def watched(self: Client, params: Params, mask: Mask, **options: Any) -> Params:
        found.clients.append(self.id)
        found.densities.append(mask.density)
        found.steps.append(options.get("steps"))
        found.dense.append(options["on_grad"] is not None)
        return sgd(self, params, mask, **options)

    monkeypatch.setattr(Client, "sgd", watched)
    return found


# ── when


@pytest.mark.parametrize(
    ("rounds", "options", "events"),
    [
        (300, {}, (50, 100, 150, 200, 250)),  # as published, and not after the last round
        (100, {}, (20, 40, 60, 80)),
        (12, {}, (2, 4, 6, 8, 10)),
        (3, {}, (1, 2)),
        (1, {}, ()),
        (100, {"interval": 30}, (30, 60, 90)),
        (100, {"interval": 500}, ()),
    ],
)
def test_the_rounds_that_rebuild(rounds: int, options: dict[str, Any], events: tuple[int, ...]) -> None:
    server = begin(PruneFL(initial_max_rounds=0, **options), rounds)
    server.setup()
    assert server.state.memory.events == events


def test_the_mask_moves_in_those_rounds_only() -> None:
    server = begin(PruneFL(interval=3, **COSTLY))
    server.setup()
    for round in range(1, 13):
        before = server.state.mask
        server.step()
        assert (server.state.mask != before) == (round in (3, 6, 9))


def test_what_is_dropped_decays(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []

    def watched(*args: Any) -> Mask:
        shares.append(args[4])
        return rebuild(*args)

    monkeypatch.setattr(prunefl, "rebuild", watched)
    small.run(begin(PruneFL(interval=4, drop=0.4, half_life=4.0, initial_max_rounds=0)))
    assert shares == [0.2, 0.1]
    shares.clear()
    begin(PruneFL(half_life=4.0)).setup()
    assert set(shares) == {0.3}  # constant in initial pruning


def test_a_round_that_nobody_answers_rebuilds_nothing() -> None:
    server = begin(PruneFL(interval=1, **COSTLY), rules=Rules(deadline_s=1e-6))
    server.setup()
    mask, sha256 = server.state.mask, server.model.sha256
    small.run(server)
    assert (server.state.mask, server.model.sha256) == (mask, sha256)


# ── initial pruning


def test_it_is_done_by_one_client_and_ends_by_the_published_rule(calls: Calls) -> None:
    server = begin(PruneFL(interval=2, **COSTLY))
    server.setup()
    assert len(set(calls.clients)) == 1
    sizes = [round(d * WEIGHTS) + SIZE - WEIGHTS for d in (*calls.densities[1:], server.state.mask.density)]
    pruned = sizes[next(i for i, size in enumerate(sizes) if size < SIZE) :]
    changes = [abs(b / a - 1) <= 0.1 for a, b in pairwise(pruned)]
    assert all(changes[-5:])
    assert not any(all(changes[i : i + 5]) for i in range(len(changes) - 5))  # and not sooner
    assert all(a >= b for a, b in pairwise(sizes))  # what is gone stays gone


@pytest.mark.parametrize(
    ("examples", "options", "steps"),
    [
        (230, {"interval": 2}, [20, 20, 20, 10]),  # 10 batches are a round; the seventh is left over
        (230, {"interval": 5, "initial_batches": 2}, [10, 4]),
        (41, {"interval": 3}, [9, 9, 3]),  # no more than a pass over its examples
    ],
)
def test_its_rounds_are_batches(
    examples: int, options: dict[str, Any], steps: list[int], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prunefl, "settled", lambda counts: False)
    method = PruneFL(initial_max_rounds=7, initial_client=1, **options)
    begin(method, partition=small.dealt(30, examples)).setup()
    assert calls.steps == steps
    assert set(calls.clients) == {1}


def test_the_first_mask_by_hand() -> None:
    method = PruneFL(interval=3, initial_max_rounds=3, initial_client=2, lr=0.3, **COSTLY)
    server = begin(method)
    start, layout = server.state.params, server.place.model.layout
    server.setup()
    client = small.client(method, id=2, round=0, data=DATA)
    squares: list[torch.Tensor] = []
    rounds = 3 * min(10, -(-client.num_examples // 20))
    trained = client.sgd(start, Mask.full(layout), steps=rounds, on_grad=lambda g: squares.append(g**2))
    mask = rebuild(trained, Mask.full(layout), torch.stack(squares).sum(0), server.state.memory.times, 0.3)
    assert server.state.mask == mask
    assert 0 < mask.density < 1
    # the server holds the trained weights, those behind the mask too
    assert torch.equal(server.state.params.flat, trained.flat)
    zeroed = begin(replace(method, regrow_value="zero"))
    zeroed.setup()
    assert torch.equal(zeroed.state.params.flat, trained.masked(mask).flat)


def test_it_is_paid_for() -> None:
    server = begin(PruneFL(initial_client=3, **COSTLY))
    asked = server.population[3]
    setup = server.setup().metrics
    held = server.state.mask.count
    assert 0 < setup["bytes/down"] - (32 + 4 * SIZE) < 250  # the dense model; times and an interval beside it
    up = setup["bytes/up"] - 32 - 4 * SIZE  # held weights, and those behind the mask
    assert 0 < up < SIZE / 8 + 100
    per_example = server.place.flops.train(Mask.full(server.place.model.layout))
    assert setup["flops/clients"] > asked.num_examples * per_example
    seconds = 1 + setup["bytes/down"] / 100 + setup["flops/executed"] / 1000 + setup["bytes/up"] / 50
    assert setup["time/simulated_s"] == pytest.approx(seconds)
    sparse = begin(PruneFL(initial_client=3, regrow_value="zero", **COSTLY))
    assert sparse.setup().metrics["bytes/up"] <= 32 + 4 * held + SIZE / 8 + 1


def test_while_the_client_guesses_nothing_is_pruned() -> None:
    server = begin(PruneFL(lr=1e-9, interval=1, initial_max_rounds=4, **COSTLY))
    setup = server.setup()
    assert server.state.mask.is_full
    assert setup.metrics["flops/clients"] > 0


def test_normalisation_that_stays_with_clients_is_not_taken_for_pruned() -> None:
    times = {"conv1.weight": 1.0, "conv2.weight": 1.0}
    method = PruneFL(layer_times_s=times, constant_s=1.0)
    server = begin(method, architecture=small.CNN, norm="local")
    initial = server.state.params
    server.setup()
    state = server.state
    assert bool(state.mask.flat[~state.mask.layout.prunable_flat].all())
    assert state.mask.density < 0.5
    assert torch.equal(state.params["bn1.weight"], initial["bn1.weight"])
    assert not torch.equal(state.params["conv2.weight"], initial["conv2.weight"])


def test_without_it_nobody_is_asked() -> None:
    server = begin(PruneFL(initial_max_rounds=0, **COSTLY))
    setup = server.setup().metrics
    assert server.state.mask.is_full
    assert [setup[name] for name in ("bytes/up", "bytes/down", "flops/clients", "time/simulated_s")] == [
        0
    ] * 4


def test_the_client_with_most_examples_is_the_first(calls: Calls) -> None:
    begin(PruneFL(), partition=small.dealt(20, 30, 90, 40)).setup()
    assert set(calls.clients) == {2}


def test_divergence_says_so_at_once(calls: Calls) -> None:
    with pytest.raises(MethodError, match=r"initial pruning diverged at client \d; lower method\.lr"):
        begin(PruneFL(lr=1e30), rules=Rules(max_failed=1)).setup()
    assert len(calls.steps) == 1
    with pytest.raises(RunError, match=r"round 0: 1 of 1 clients .* non-finite: clients .* lower method\.lr"):
        begin(PruneFL(lr=1e30)).setup()


# ── what clients gather


def task(method: PruneFL, since: int, upload: bool) -> Task:
    model = small.workplace(method).model
    return Task(model.init(0), Mask.full(model.layout), extras={"since": since, "upload": upload})


@pytest.mark.parametrize(
    ("options", "examples"), [({}, 50), ({"local_epochs": 2}, 100), ({"steps": 5}, 90), ({"steps": 2}, 40)]
)
def test_the_sum_of_a_rounds_gradients_is_squared(options: dict[str, Any], examples: int) -> None:
    method, partition = PruneFL(lr=0.125, **options), small.dealt(50)
    asked = task(method, since=0, upload=True)
    update = method.client_update(asked, small.client(method, partition=partition))
    moved = (asked.params.flat - update.params.flat) / 0.125  # SGD: the sum of the gradients
    torch.testing.assert_close(update.sums["importance"], moved**2 * examples, rtol=1e-3, atol=1e-4)
    assert method.processed(50) == examples


def test_rounds_add_up_until_they_are_uploaded() -> None:
    method, memory, rounds = PruneFL(), dict[str, Any](), []
    for round in (1, 2, 3):
        client = small.client(method, round=round, memory=memory)
        update = method.client_update(task(method, since=0, upload=round == 3), client)
        alone = method.client_update(task(method, since=0, upload=True), small.client(method, round=round))
        rounds.append(alone.sums["importance"])
        assert bool(memory) == (round < 3) == (not update.sums)
    torch.testing.assert_close(update.sums["importance"], torch.stack(rounds).sum(0))


def test_what_was_gathered_in_an_interval_before_is_forgotten() -> None:
    method, memory = PruneFL(), dict[str, Any]()
    method.client_update(task(method, since=0, upload=False), small.client(method, memory=memory))
    assert memory["since"] == 0
    late = method.client_update(
        task(method, since=5, upload=True), small.client(method, round=7, memory=memory)
    )
    fresh = method.client_update(task(method, since=5, upload=True), small.client(method, round=7))
    assert torch.equal(late.sums["importance"], fresh.sums["importance"])


@pytest.mark.parametrize(
    ("gather", "rounds"), [("interval", [1, 2, 3, 4, 5, 6]), ("round", [3, 6])], ids=["interval", "round"]
)
def test_dense_gradients_are_taken_and_charged_while_they_are_of_use(gather: Any, rounds: list[int]) -> None:
    server = begin(PruneFL(gather=gather, interval=3, local_epochs=2, **COSTLY), rounds=8)
    server.setup()
    for round in range(1, 9):
        mask = server.state.mask
        report = server.step()
        examples = sum(2 * record.num_examples for record in report.clients)
        per_example = server.place.flops.train(mask, dense_gradient=round in rounds)
        assert report.metrics["flops/clients"] == pytest.approx(examples * per_example)
        uploads = [record.cost.bytes_up - 4 * mask.count for record in report.clients]
        assert all((extra > 4 * SIZE) == (round in (3, 6)) for extra in uploads)
        if gather == "round":
            assert not server.checkpoint.memories


def test_the_published_work_is_five_steps_whatever_a_client_has() -> None:
    server = begin(PruneFL(steps=5, initial_max_rounds=0, interval=100))
    _, report = server.setup(), server.step()
    examples = sum(PruneFL(steps=5).processed(record.num_examples) for record in report.clients)
    assert 4 * 4 * 20 < examples <= 4 * 5 * 20  # a pass ends with a short batch
    full = Mask.full(server.place.model.layout)
    assert report.metrics["flops/clients"] == examples * server.place.flops.train(full)


def test_bce_compares_every_logit_with_yes_or_no() -> None:
    logits, y = torch.tensor([[2.0, -1.0], [0.5, 0.0]]), torch.tensor([0, 1])
    p = sigmoid(logits)
    expected = -(p[0, 0].log() + (1 - p[0, 1]).log() + (1 - p[1, 0]).log() + p[1, 1].log()) / 4
    step = Step(torch.zeros(2, 1), y, logits, torch.zeros(2, 1), {}, 0)
    torch.testing.assert_close(binary_cross_entropy(step), expected)
    server = begin(PruneFL(loss="bce", lr=0.5))
    first = server.evaluate(server.side.validation).loss
    assert small.run(server)[-1].metrics["val/loss"] < first


# ── the masks of the run


@pytest.mark.parametrize("regrow_value", ["shadow", "zero"])
def test_a_weight_that_comes_back_resumes_where_it_was_or_from_zero(regrow_value: Any) -> None:
    method = Watched(regrow_value=regrow_value, interval=1, lr=0.3, **COSTLY)
    server = begin(method, rounds=20)
    server.setup()
    last = server.state.params.flat.clone()  # the value that each weight had when it was last held
    returned = 0
    while server.state.round <= 20:
        server.step()
        before, after = method.seen[-1]
        held, back = before.mask.flat, after.mask.flat & ~before.mask.flat
        last[held] = before.params.flat[held]
        expected = last if regrow_value == "shadow" else torch.zeros(SIZE)
        assert torch.equal(after.params.flat[back], expected[back])
        returned += int(back.count_nonzero())
    assert returned > 5


@pytest.mark.parametrize("initial", [0, 1000])
def test_the_cap_holds(initial: int) -> None:
    server = begin(PruneFL(max_density=0.25, interval=2, initial_max_rounds=initial), rounds=6)
    densities = [report.metrics["density/global"] for report in small.run(server)]
    assert max(densities[2 if initial == 0 else 0 :]) == 0.25


def test_cheap_weights_stay_and_costly_ones_go() -> None:
    cheap = {"layer_times_s": {"fc1.weight": 1e-9}, "constant_s": 1.0}
    ends = [small.run(begin(PruneFL(**times)))[-1].metrics["density/global"] for times in (cheap, COSTLY)]
    # pixels that never change have no gradient; all others pay
    assert ends[0] > 0.9 > 0.3 > ends[1]


# ── what it needs


def tree(model: str = "cnn", **options: Any) -> dict[str, Any]:
    return {"method": {"name": "prunefl", **options}, "model": model, "tracking": {"uri": "none"}}


def test_times_must_be_those_of_the_models_layers() -> None:
    fits = PruneFL(**COSTLY)
    assert fits.check(small.setting()) is None
    assert PruneFL().check(small.setting(architecture=small.CNN)) is None
    fault = fits.check(small.setting(architecture=small.CNN)) or ""
    assert fault.startswith("method.layer_times_s: no time for conv1.weight, conv2.weight; give every layer")
    assert "go together" in (PruneFL(constant_s=1.0).check(small.setting()) or "")
    with pytest.raises(ConfigError, match=r"method\.time_model=vgg11_cifar10: no time for conv1\.weight"):
        RunConfig.from_tree(tree(time_model="vgg11_cifar10"))
    with pytest.raises(ConfigError, match=r"method\.time_model=conv2_femnist: no time for fc3\.weight; give"):
        RunConfig.from_tree(tree("lenet5", time_model="conv2_femnist"))
    config = RunConfig.from_tree(tree("conv2", time_model="conv2_femnist"))
    assert RunConfig.from_tree(config.to_tree()) == config
    config = RunConfig.from_tree(tree("mlp", layer_times_s={"fc1.weight": 1e-6}, constant_s=2.0))
    assert RunConfig.from_tree(config.to_tree()) == config


def test_published_times_are_for_the_steps_that_clients_make() -> None:
    method = PruneFL(initial_max_rounds=0, steps=5, time_model="conv2_femnist")
    server = small.server(method)
    server.setup()
    assert server.state.memory.times.constant_s == pytest.approx(6.2464, abs=1e-4)


def test_a_first_client_that_there_is_not() -> None:
    assert PruneFL(initial_client=9).check(small.setting(population=10)) is None
    fault = PruneFL(initial_client=10).check(small.setting(population=10))
    assert fault == "method.initial_client=10, but there are 10 clients"


# ── what a checkpoint holds of it


def test_what_clients_gathered_is_kept_for_its_interval_only() -> None:
    server = begin(PruneFL(interval=3, initial_max_rounds=0), clients=40)
    server.setup()
    held = []
    for round in range(1, 13):
        server.step()
        since = 3 * (round // 3)
        assert all(memory["since"] == since for memory in server.checkpoint.memories.values())
        held.append(len(server.checkpoint.memories))
    assert held[0] > 0 and held[1] > held[0] and held[2::3] == [0, 0, 0, 0]
    assert held[9:] == [0, 0, 0]  # after the last event nothing is gathered


@pytest.mark.parametrize("cohort", [2, 4])
def test_forgetting_changes_nothing_else(cohort: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = PruneFL(interval=3, initial_max_rounds=0)
    forgetful = begin(method, clients=12, cohort=cohort)
    reports = small.run(forgetful)
    monkeypatch.setattr(PruneFL, "forgets", Method.forgets)
    hoarding = begin(method, clients=12, cohort=cohort)
    assert [without_clocks(r) for r in small.run(hoarding)] == [without_clocks(r) for r in reports]
    assert hoarding.state.params == forgetful.state.params and hoarding.state.mask == forgetful.state.mask
    assert len(hoarding.checkpoint.memories) > len(forgetful.checkpoint.memories) == 0
