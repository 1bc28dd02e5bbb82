"""Client samplers: hand-worked cohorts, what each learns, and what none of them may cost."""

from collections.abc import Sequence
from dataclasses import replace
from math import nan
from typing import Any

import numpy as np
import pytest

from fedray.errors import RunError
from fedray.federation.population import LOOK_AGAIN_S, Population, sample, wait_for_any
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
from fedray.types import ClientRecord, Cost
from tests import small


def context(
    sizes: Sequence[int] = (10,) * 8,
    cohort: int = 2,
    round: int = 1,
    losses: dict[int, float] | None = None,
    seconds: dict[int, float] | None = None,
    seed: int = 0,
    asked: list[Sequence[int]] | None = None,
) -> SamplerContext:
    population = Population(small.dealt(*sizes), small.fleet(len(sizes)))
    rng = np.random.default_rng(seed)

    def report(clients: Sequence[int]) -> dict[int, float]:
        if asked is not None:
            asked.append(clients)
        return {k: losses[k] for k in clients if losses and k in losses}

    return SamplerContext(
        round=round,
        cohort=cohort,
        clients=population,
        rng=rng,
        predicted_seconds=lambda k: (seconds or {}).get(k, float(k)),
        losses=report,
    )


def record(client: int, loss: float = 1.0, seconds: float = 1.0, n: int = 10, **more: Any) -> ClientRecord:
    usual: dict[str, Any] = {"device": "d", "fate": "folded", "density": 1.0}
    return ClientRecord(client=client, num_examples=n, loss=loss, cost=Cost(seconds=seconds), **usual | more)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
@pytest.mark.parametrize("cohort", [1, 3, 8, 12])
def test_a_cohort_is_of_different_known_clients_in_order(sampler: type[Sampler], cohort: int):
    memory = None
    for round in range(1, 8):
        losses = {k: float(k) for k in range(8)}
        drawn = sampler().draw(memory, context(cohort=cohort, round=round, losses=losses, seed=round))
        assert list(drawn) == sorted(set(drawn)) and set(drawn) <= set(range(8))
        assert len(drawn) == min(cohort, 8)
        memory = sampler().learn(memory, [record(k, loss=1 + k) for k in drawn], round)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_a_cohort_depends_on_the_round_s_generator_alone(sampler: type[Sampler]):
    sizes = tuple(range(5, 25))
    drawn = [sampler().draw(None, context(sizes, cohort=4, seed=seed)) for seed in (1, 1, 2, 3, 4)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_nothing_is_looked_up_for_each_registered_client(sampler: type[Sampler], monkeypatch):
    looked: list[int] = []
    look_up = Population.__getitem__

    def counted(self: Population, client: int) -> Any:
        looked.append(client)
        return look_up(self, client)

    monkeypatch.setattr(Population, "__getitem__", counted)
    monkeypatch.setattr(Population, "__iter__", lambda self: pytest.fail("walked over all clients"))
    ctx = context((3,) * 20_000, cohort=5, losses=dict.fromkeys(range(20_000), 1.0))
    memory = sampler().learn(None, [record(k) for k in range(5)], 1)
    sampler().draw(memory, replace(ctx, round=2))
    assert len(looked) < 200


def looks(
    size: int, availability: Sequence[float] = (1.0,), cohort: int = 2, seed: int = 0
) -> SamplerContext:
    """Return a context in which client k is available as often as the k-th number says."""
    devices = [replace(small.DEVICE, name=f"d{i}", availability=a) for i, a in enumerate(availability)]
    ctx = context((20,) * size, cohort, seed=seed)
    never: Any = lambda *_: pytest.fail("asked a client")  # noqa: E731
    people = Population(ctx.clients.partition, small.fleet(size, devices))
    return replace(ctx, clients=people, predicted_seconds=never, losses=never)


def test_uniform_predicts_no_times():
    ctx, again = looks(100, cohort=7), looks(100)
    assert Sampler().draw(None, ctx) == sample(again.clients, 7, again.rng)


def test_over_selection_keeps_the_fastest():
    ctx, again = context((20,) * 100, cohort=5), context((20,) * 100)
    drawn, asked = sample(again.clients, 10, again.rng), list[int]()

    def seconds(client: int) -> float:
        asked.append(client)
        return -float(client)  # the higher the id, the faster

    kept = Fastest(over_selection=1.0).draw(None, replace(ctx, predicted_seconds=seconds))
    assert kept == drawn[5:]
    assert sorted(asked) == list(drawn), "only drawn clients are timed"
    ctx = replace(context((20,) * 100, cohort=5), predicted_seconds=lambda client: 1.0)
    assert Fastest(over_selection=1.0).draw(None, ctx) == drawn[:5], "a tie goes to the lower id"


@pytest.mark.parametrize(("over", "drawn"), [(0.3, 13), (0.04, 10), (100.0, 20)])
def test_over_selection_is_a_share_of_the_cohort(over: float, drawn: int):
    ctx, asked = context((20,) * 20, cohort=10), list[int]()
    ctx.predicted_seconds = lambda client: asked.append(client) or 0.0  # type: ignore[func-returns-value]
    assert len(Fastest(over_selection=over).draw(None, ctx)) == 10
    assert len(asked) == (drawn if drawn > 10 else 0)


@pytest.mark.parametrize("sampler", [Sampler(), Fastest(over_selection=0.5)])
def test_a_cohort_is_as_large_as_it_can_be(sampler: Sampler):
    assert sampler.draw(None, looks(3, cohort=10)) == (0, 1, 2)
    assert sampler.draw(None, looks(40, [1.0] + [0.0] * 9, cohort=10)) == (0, 10, 20, 30)


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_no_client_available_is_an_error(sampler: type[Sampler]):
    with pytest.raises(RunError, match=r"no client is available.*clients\.devices"):
        sampler().draw(None, looks(10, [0.0], cohort=3))


def test_the_server_waits_for_the_first_client_only():
    ctx, again = looks(3, [0.05], seed=5), looks(3, [0.05], seed=5)
    found, waited_s = wait_for_any(again.clients, 2, again.rng)
    assert ctx.available(2) == found and ctx.waited_s == waited_s >= LOOK_AGAIN_S
    assert ctx.available(2) == sample(again.clients, 2, again.rng)
    assert ctx.waited_s == waited_s, "a second draw of the round does not wait"
    assert all(ctx.is_available(k) for k in ctx.present)
    assert not looks(3, [0.0]).is_available(0)


def test_power_of_choice_takes_the_highest_losses_among_its_candidates():
    losses = {0: 0.1, 1: 0.9, 2: 0.5, 3: 0.7, 4: 0.2, 5: 0.3, 6: 0.8, 7: 0.4}
    asked: list[Sequence[int]] = []
    ctx = context(cohort=2, losses=losses, asked=asked)
    assert PowerOfChoice(candidates=4.0).draw(None, ctx) == (1, 6)
    assert [len(clients) for clients in asked] == [8]
    # three candidates for one place: the highest loss of just these
    asked = []
    (chosen,) = PowerOfChoice(candidates=3.0).draw(None, context(cohort=1, losses=losses, asked=asked))
    assert len(asked[0]) == 3 and chosen == max(asked[0], key=lambda k: losses[k])


def test_power_of_choice_takes_a_silent_candidate_last_and_nan_first():
    losses = {k: 1.0 for k in range(6)} | {2: nan}
    assert PowerOfChoice(candidates=8.0).draw(None, context(cohort=1, losses=losses)) == (2,)
    assert 7 not in PowerOfChoice(candidates=4.0).draw(None, context(cohort=6, losses=losses))


def test_power_of_choice_from_known_losses_asks_no_client():
    sampler, asked = PowerOfChoice(candidates=4.0, ask=False), list[Sequence[int]]()
    memory = sampler.learn(None, [record(k, loss=float(k)) for k in range(6)], 1)
    memory = sampler.learn(memory, [record(5, loss=0.5), record(4, loss=nan)], 2)
    assert memory == Losses({0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 0.5})
    ctx = context(cohort=3, asked=asked)
    assert sampler.draw(memory, ctx) == (4, 6, 7)  # 6 and 7 never trained
    assert asked == []


def test_candidates_are_drawn_in_proportion_to_their_examples():
    often = np.zeros(4)
    for seed in range(400):
        ctx = context((10, 10, 10, 70), cohort=1, losses={}, seed=seed)
        often[list(PowerOfChoice(candidates=1.0).draw(None, ctx))] += 1
    assert often[3] / 400 == pytest.approx(0.7, abs=0.06)


def test_oort_notes_utility_and_seconds_of_the_updates_that_counted():
    first = Oort().learn(None, [record(3, loss=2.0, seconds=5.0), record(1, loss=1.0, fate="late")], 1)
    assert first.clients.tolist() == [3] and first.utility.tolist() == [20.0]
    assert first.preferred_s == 5.0 and first.history == (20.0,)
    second = Oort().learn(first, [record(1, loss=1.0, seconds=1.0, n=4), record(3, loss=0.5)], 2)
    assert second.clients.tolist() == [1, 3] and second.utility.tolist() == [4.0, 5.0]
    assert second.seen.tolist() == [2, 2] and second.times.tolist() == [1, 2]
    assert first.clients.tolist() == [3]  # a checkpoint may still hold it


def test_oort_exploits_high_utility_and_explores_fast_clients():
    memory = Oort().learn(None, [record(k, loss=float(k + 1)) for k in range(4)], 1)
    options: dict[str, Any] = {
        "exploration": 0.5,
        "exploration_min": 0.5,
        "exploration_decay": 1.0,
        "cut_off": 1.0,
        "clip": 1.0,
    }
    ctx = context(cohort=2, round=2, seconds={4: 4.0, 5: 1.0, 6: 2.0, 7: 3.0})
    drawn = Oort(**options).draw(memory, ctx)
    assert set(drawn) == {3, 5}  # the highest loss; the fastest of those never seen


def test_oort_leaves_slow_clients_behind():
    records = [record(0, loss=4.0, seconds=100.0), record(1, loss=3.0), record(2, loss=0.1)]
    memory = Oort().learn(None, records, 1)
    assert memory.preferred_s == 1.0
    options: dict[str, Any] = {"exploration": 0.0, "exploration_min": 0.0, "cut_off": 1.0, "clip": 1.0}
    assert Oort(**options).draw(memory, context(cohort=1, round=2)) == (1,)
    assert Oort(**options, penalty=0.0).draw(memory, context(cohort=1, round=2)) == (0,)


def test_oort_leaves_out_whoever_took_part_often_enough():
    memory: OortMemory | None = None
    for round in (1, 2):
        memory = Oort().learn(memory, [record(0, loss=9.0), record(1, loss=1.0)][: 3 - round], round)
    options: dict[str, Any] = {"exploration": 0.0, "exploration_min": 0.0, "clip": 1.0, "most_times": 2}
    assert Oort(**options).draw(memory, context((10, 10), cohort=1, round=3)) == (1,)


def test_the_pacer_takes_longer_rounds_when_utility_falls():
    sampler, memory = Oort(pacer_rounds=2, pacer_step_s=3.0), None
    for round, loss in enumerate((4.0, 4.0, 2.0, 2.0, 5.0, 5.0), start=1):
        memory = sampler.learn(memory, [record(0, loss=loss)], round)
    assert memory is not None and memory.preferred_s == 4.0  # after round 4; not after round 6
