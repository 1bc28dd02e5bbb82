"""CEAFL: both stages by hand, regrowth, what is undone, and the one classifier that teaches."""

from dataclasses import dataclass, field, replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, softmax

from fedray.federation.aggregate import CohortUpdate, Fold
from fedray.federation.method import ServerContext
from fedray.federation.server import Schedule, Server
from fedray.federation.worker import Rules
from fedray.methods.ceafl import CEAFL, CEAFLMemory
from fedray.models.spec import Architecture
from fedray.pruning import masks
from fedray.types import Extra, Mask, Params, ServerState, Task
from tests import small

SIZE, WEIGHTS = 163, 128
"""Weights of small.MLP, and how many of them (fc1.weight, which comes first) are prunable."""
DATA = small.dataset(400)
SPEC = small.setting().model
EVENTS = range(10, 61, 10)


@dataclass(frozen=True, kw_only=True)
class Watched(CEAFL):
    """CEAFL that keeps all updates, and what each `prune` was given and left; it may be told the losses."""

    seen: list[tuple[ServerState, ServerState, CohortUpdate]] = field(default_factory=list, compare=False)
    probes: list[float] = field(default_factory=list, compare=False)

    @property
    def fold(self) -> Fold:
        return Fold(keep_updates=True)

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        if self.probes:
            ctx = replace(ctx, _validate=lambda params, mask: (0.0, self.probes.pop(0)))
        after = super().prune(state, cohort, ctx)
        self.seen.append((state, after, cohort))
        return after


def begin(method: CEAFL, rounds: int = 6, **place: Any) -> Server:
    return small.server(method, schedule=Schedule(rounds, cohort=4), data=DATA, **place)


def extras(server: Server) -> dict[str, Extra]:
    """Return what a client would be sent beside the model in the round to come."""
    return dict(server.method.configure(server.state, server.population[0]).extras)


def weights(seed: int) -> Params:
    flat = np.random.default_rng(seed).standard_normal(SIZE, dtype=np.float32)
    return Params(torch.from_numpy(flat) / 2, SPEC.layout)


def holding(*entries: int) -> Mask:
    flat = ~SPEC.layout.prunable_flat
    flat[list(entries)] = True
    return Mask(flat, SPEC.layout)


def with_losses(density: float, losses: tuple[float, ...], round: int = 20) -> ServerState:
    mask = masks.random(SPEC.layout, density, np.random.default_rng(0))
    return ServerState(round, weights(0), mask, CEAFLMemory(EVENTS, losses, done=10))


# ── stage 1


@pytest.mark.parametrize("importance", ["gw", "g", "g2"])
def test_the_first_mask_is_by_shares_of_importance_of_clients_by_their_examples(importance: Any) -> None:
    method = CEAFL(importance=importance, initial_density=0.25, min_density=0.1, scorer_batches=99)
    server = begin(method, partition=small.dealt(10, 90))
    place, params, total = server.place, server.state.params, torch.zeros(WEIGHTS)
    for k, n in enumerate((10, 90)):
        rows = place.population.partition.rows(k)
        x, y = place.dataset.normalise(DATA.train.x[rows]), torch.from_numpy(DATA.train.y[rows])
        module = place.model.bind(params.flat.clone())
        (g,) = torch.autograd.grad(cross_entropy(module(x), y), [module.get_parameter("fc1.weight")])
        w = params["fc1.weight"]
        score = {"gw": (g * w).abs(), "g": g.abs(), "g2": g.square()}[importance].flatten()
        total += n * score / score.sum()
    server.setup()
    held = server.state.mask["fc1.weight"].flatten()
    assert set(held.nonzero().flatten().tolist()) == set(total.topk(32).indices.tolist())


def test_a_few_batches_of_some_clients_are_charged() -> None:
    server = begin(CEAFL(scorers=3, scorer_batches=2, batch_size=5), clients=6)
    setup = server.setup().metrics
    assert setup["flops/clients"] == 3 * 2 * 5 * 3 * server.place.flops.dense()
    assert 3 * 4 * WEIGHTS < setup["bytes/up"] < 3 * (4 * WEIGHTS + 200)


# ── when, and how far


@pytest.mark.parametrize(
    ("rounds", "options", "events"),
    [
        (100, {}, [10, 20, 30, 40, 50, 60]),
        (30, {}, [3, 6, 9, 12, 15, 18]),
        (3, {}, [1]),
        (1, {}, []),
        (100, {"interval": 25}, [25, 50]),
        (100, {"until": 0.0}, []),
    ],
)
def test_events(rounds: int, options: dict[str, Any], events: list[int]) -> None:
    server = begin(CEAFL(**options), rounds)
    server.setup()
    assert list(server.state.memory.events) == events


FELL = (2.0,) * 10 + (1.5,) * 10  # by a quarter


@pytest.mark.parametrize(
    ("density", "losses", "options", "plan"),
    [
        # 96 held; 0.75 (1 − 1/4 − 0.02) of 128 is 70: 26 fewer, and a fifth of those removed is grown
        (0.75, FELL, {}, (32, 6)),
        (0.75, FELL, {"kappa": 0.0}, (2, 0)),
        (0.75, FELL, {"kappa0": 0.0, "regrow": 0.0}, (24, 0)),
        (0.75, FELL[:19], {}, (30, 6)),  # before: 9 rounds; last: from 2.0 on, so it fell by 0.225 to 72
        (0.75, FELL[:9], {}, (2, 0)),  # and has none before it
        (0.75, (), {}, (2, 0)),
        (0.75, FELL[::-1], {}, (2, 0)),  # a loss that rises
        (0.75, (0.0,) * 20, {}, (2, 0)),
        (0.75, FELL, {"min_density": 0.7}, (8, 2)),  # 90 are left
        (0.75, FELL, {"kappa": 9.0, "regrow": 0.0}, (58, 0)),  # never below 0.3: 38
        (0.3, FELL, {}, (0, 0)),
        (1.0, FELL, {}, (35, 0)),  # 93 are left, and nothing was free that could grow
        (0.75, FELL, {"regrow": 0.9}, (58, 32)),  # everything that was free
        (0.9, FELL, {"kappa": 2.0, "regrow": 0.9}, (73, 13)),
        (0.6, FELL, {"kappa": 2.0, "regrow": 0.9}, (77, 38)),  # no more than are left
    ],
)
def test_how_far_an_event_goes(
    density: float, losses: tuple[float, ...], options: dict[str, Any], plan: tuple[int, int]
) -> None:
    assert CEAFL(**options).plan(with_losses(density, losses)) == plan
    assert CEAFL(**options).plan(with_losses(density, losses, round=19)) == (0, 0)


def test_an_event_removes_the_least_important_and_grows_what_is_voted_for() -> None:
    method = Watched(interval=1, until=1.0, kappa0=0.1, min_density=0.2, regrow=0.4, rollback=99.0)
    server = begin(method, rounds=5)
    small.run(server)
    assert server.state.mask.density < 0.45
    for before, after, cohort in method.seen:
        removed, grown = method.plan(before)
        old, new = before.mask.flat, after.mask.flat
        assert int((old & ~new).count_nonzero()) == removed > int((new & ~old).count_nonzero()) == grown > 0
        importance = cohort.sum("importance")  # of fc1.weight, where it was held
        kept = new[:WEIGHTS][old[:WEIGHTS]]
        assert importance[kept].min() >= importance[~kept].max()
        votes = torch.zeros(SIZE)
        for k, vote in cohort.each.items():
            assert len(vote["positions"]) == grown
            votes[vote["positions"].long()] += server.population[k].num_examples * vote["gradient"]
        assert votes.abs()[new & ~old].min() >= votes.abs()[~new & ~old].max()
        assert not bool(after.params.flat[new & ~old].any())  # what grows starts from zero
        assert len(after.memory.losses) == min(2, before.round)


@pytest.mark.parametrize(
    ("loss", "undone"), [(1.04, False), (1.06, True), (0.5, False), (nan, True), (inf, True)]
)
def test_an_event_that_spoils_the_model_is_undone(loss: float, undone: bool) -> None:
    method = Watched(interval=2, probes=[1.0, loss])
    server = begin(method, rounds=4)
    server.setup()
    mask = server.state.mask
    server.step()
    server.step()
    before, after, _ = method.seen[-1]
    assert method.probes == []
    assert (server.state.mask == mask) == undone
    assert (after.params == before.params) == undone
    assert ("finetune" in extras(server)) != undone


@pytest.mark.parametrize("losses", [(1.0, 1.0, nan, nan), (nan, nan, 1.0, 1.0), (1.0, 1.0, inf, inf)])
def test_a_loss_that_is_no_number_has_not_fallen(losses: tuple[float, ...]) -> None:
    method = CEAFL(kappa=1.0, kappa0=0.1, regrow=0.0)
    server = begin(method, rounds=4)
    server.setup()
    memory = CEAFLMemory(range(2, 5, 2), losses)
    removed, _ = method.plan(replace(server.state, round=4, memory=memory))
    assert removed == round(0.7 * WEIGHTS) - round(0.7 * 0.9 * WEIGHTS)  # kappa0 alone


def test_an_event_that_nobody_answers_changes_nothing() -> None:
    server = begin(CEAFL(interval=1), rules=Rules(deadline_s=1e-6))
    server.setup()
    before = server.state
    server.step()
    assert server.state == replace(before, round=2)


# ── importance on the clients


def test_importance_is_remembered_while_a_weight_is_held() -> None:
    method = CEAFL(mu=0.75, lr=0.5, local_epochs=3, batch_size=5)
    client = small.client(method)
    assert method.local_steps(client.num_examples) > 3
    scale = method.lr * method.local_steps(client.num_examples)
    full, ones = holding(0, 1, 2), torch.ones(SIZE)

    def moved(mask: Mask, *by: float) -> list[float]:
        """Let weights 0, 1, 2 move from 1 + by to 1; return their importance."""
        before = ones.clone()
        before[: len(by)] += torch.tensor(by) * scale
        start, end = (Params(flat, SPEC.layout).masked(mask) for flat in (before, ones))
        mean = method.remember(start, end, mask, client)
        assert torch.equal(client.memory["importance"][:3], torch.where(mask.flat[:3], mean[:3], 0.0))
        return mean[:3].tolist()

    assert moved(full, 4.0, -8.0, 0.0) == pytest.approx([4.0, 8.0, 0.0], abs=1e-5)
    assert moved(full, 0.0, 4.0, 1.0) == pytest.approx([3.0, 7.0, 1.0], abs=1e-5)
    moved(holding(0, 2), 1.0, 9.0, 1.0)  # 1 is pruned
    assert client.memory["importance"][:3].tolist() == pytest.approx([2.5, 0.0, 1.0], abs=1e-5)
    # and grown again: it is as important as it is now, with nothing to make up for
    assert moved(full, 2.5, 6.0, 1.0) == pytest.approx([2.5, 6.0, 1.0], abs=1e-5)


def test_one_step_of_sgd_moves_by_the_gradient_itself() -> None:
    method = CEAFL(batch_size=1000, lr=0.01)
    client, params, mask = small.client(method), weights(1), holding(*range(0, WEIGHTS, 2))
    gradient = client.grad(params, mask)
    after = client.sgd(params, mask)
    scores = method.remember(params.masked(mask), after, mask, client)
    expected = torch.where(mask.flat, (gradient * after.flat).abs(), 0.0)
    np.testing.assert_allclose(scores.numpy(), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("regrow", [0.0, 0.5])
def test_an_event_costs_one_dense_batch_and_only_if_something_grows(regrow: float) -> None:
    method = Watched(interval=2, kappa0=0.2, regrow=regrow, batch_size=7, rollback=99.0)
    server = begin(method, rounds=4)
    flops = server.place.flops
    for report in small.run(server)[1:3]:
        state, _, cohort = method.seen[report.round - 1]
        dense = 7 * flops.train(state.mask, dense_gradient=True) if report.round == 2 and regrow else 0.0
        for client in report.clients:
            assert client.cost.flops == client.num_examples * flops.train(state.mask) + dense
        assert bool(cohort.each) == bool(dense)


def test_after_the_last_event_it_is_masked_fedavg() -> None:
    server = begin(CEAFL(interval=2, until=0.5, finetune_epochs=0), rounds=6)
    small.run(server)
    assert extras(server) == {}
    asked = {k for round in (5, 6) for k in asked_in(server, round)}
    assert asked and not asked & server.checkpoint.memories.keys()


def asked_in(server: Server, round: int) -> set[int]:
    again = begin(server.method, rounds=6)  # type: ignore[arg-type]
    return {r.client for r in small.run(again)[round].clients}


def test_after_the_last_event_no_client_remembers_anything() -> None:
    server = begin(CEAFL(interval=2, until=0.5, finetune_epochs=0), rounds=6, clients=30)
    server.setup()
    for round in range(1, 7):
        server.step()
        assert bool(server.checkpoint.memories) == (round < 2), "until=0.5 of 6 rounds: the event is in 2"


def test_a_teacher_is_kept_until_it_has_taught() -> None:
    server = begin(CEAFL(interval=2, until=1.0, rollback=99.0, kappa0=0.2), rounds=6)
    server.setup()
    taught = []
    for _ in range(3):
        server.step()
        taught.append(server.state.memory.teacher is not None)
    assert taught == [False, True, False]


# ── fine-tuning


@pytest.mark.parametrize("alpha", ["class", "uniform"])
def test_the_teacher_is_the_ensemble_of_the_cohorts_classifiers(alpha: Any) -> None:
    method = Watched(interval=2, until=1.0, alpha=alpha, lr=0.5)
    server = begin(method)
    server.setup()
    server.step()
    assert "teacher" not in extras(server)
    server.step()
    (_, _, cohort), phi = method.seen[-1], torch.randn(5, 8)
    logits, total = torch.zeros(5, 3), torch.zeros(3)
    for k, update in cohort.updates.items():
        labels = DATA.train.y[server.place.population.partition.rows(k)]
        count = torch.from_numpy(np.bincount(labels, minlength=3)).float()
        count = count if alpha == "class" else torch.ones(3)
        logits += count * linear(phi, update.params["fc2.weight"], update.params["fc2.bias"])
        total += count
    teacher = extras(server)["teacher"]
    assert isinstance(teacher, Tensor) and teacher.shape == (3, 9)
    voted, one = logits / total, linear(phi, teacher[:, :-1], teacher[:, -1])
    np.testing.assert_allclose(one.numpy(), voted.numpy(), atol=1e-5)
    server.step()
    assert extras(server) == {"track": True, "grow": method.plan(server.state)[1]}


@pytest.mark.parametrize("kd_weight", [0.0, 0.25, 1.0])
def test_fine_tuning_by_hand(kd_weight: float) -> None:
    method = CEAFL(kd_weight=kd_weight, temperature=3.0, finetune_epochs=2, batch_size=1000, lr=0.3)
    client, start, mask = small.client(method), weights(2), holding(*range(40))
    teacher = torch.randn(3, 9)
    names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    leaves = [start.masked(mask)[name].clone().requires_grad_() for name in names]
    for step in range(2):  # an epoch each; the classifier rests in the first
        w1, b1, w2, b2 = leaves
        phi = linear(client.x.flatten(1), w1, b1).relu()
        logits = linear(phi, w2, b2)
        p = softmax(linear(phi.detach(), teacher[:, :-1], teacher[:, -1]) / 3, 1)
        apart = (p * (p.log() - softmax(logits / 3, 1).log())).sum(1).mean()
        loss = (1 - kd_weight) * cross_entropy(logits, client.y) + kd_weight * 9 * apart
        grads = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
                leaf -= 0.3 * grad * mask[names[i]] * (step == 1 or i < 2)
    given: dict[str, Extra] = {"teacher": teacher} if kd_weight else {}
    tuned = method.finetune(Task(start.masked(mask), mask, {"finetune": True} | given), client)
    for name, leaf in zip(names, leaves, strict=True):
        np.testing.assert_allclose(tuned[name].numpy(), leaf.detach().numpy(), atol=1e-5)
    once = replace(method, finetune_epochs=1, batch_size=-(-client.num_examples // 2))
    half = small.client(once)
    tuned = once.finetune(Task(start.masked(mask), mask, {"finetune": True} | given), half)
    assert not torch.equal(tuned["fc2.weight"], start["fc2.weight"])  # in the second of two steps it moved


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, {"track", "finetune", "teacher"}),
        ({"kd_weight": 0.0}, {"track", "finetune"}),
        ({"finetune_epochs": 0}, {"track"}),
    ],
)
def test_what_is_switched_off_is_not_sent(options: dict[str, Any], sent: set[str]) -> None:
    method = Watched(interval=2, until=1.0, rollback=99.0, **options)
    server = begin(method)
    server.setup()
    server.step()
    server.step()
    assert set(extras(server)) == sent
    taught = {"classifiers", "weights"} if "teacher" in sent else set()
    assert set(method.seen[-1][2].partial.sums) == {"importance"} | taught


# ── what it needs


def test_settings_that_cannot_work_are_refused() -> None:
    problem = CEAFL(min_density=0.8).check(small.setting())
    assert problem == "method.min_density=0.8 is above method.initial_density=0.7"
    assert CEAFL().check(small.setting()) is None

    def pooled(shape: Any, classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(shape[0], classes, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    convolutions = Architecture(pooled, lambda shape: None, "made up", "conv classes")
    setting = small.setting(architecture=convolutions)
    assert "method.finetune_epochs must be 0" in (CEAFL().check(setting) or "")
    assert CEAFL(finetune_epochs=0).check(setting) is None


@pytest.mark.parametrize("architecture", [small.CNN, small.LINEAR])
@pytest.mark.parametrize("prune_last", [False, True])
def test_other_models(architecture: Architecture, prune_last: bool) -> None:
    method = CEAFL(interval=1, until=1.0, min_density=0.5, rollback=99.0)
    server = begin(method, architecture=architecture, prune_last=prune_last)
    reports = small.run(server)
    prunable = server.state.mask.layout.prunable_count
    assert server.state.mask.density == (pytest.approx(0.5, abs=0.1) if prunable else 1.0)
    assert reports[-1].metrics["val/loss"] < reports[0].metrics["val/loss"]
