"""The stage process: what is seen, what actions do, what is safe, what a decision brings."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from math import inf, nan

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.policies import observation, situation, stages
from fedray.policies.history import Decision, History
from fedray.policies.observation import FEATURES, observe
from fedray.policies.situation import Situation
from fedray.policies.stages import ACTIONS, reward, safe, target_mask
from fedray.pruning.masks import top_k
from fedray.types import Layout, Mask, Params

GROW = ACTIONS.index("×1.25")
LAYOUT = Layout(("a", "b", "bias"), ((10, 8), (20,), (4,)), (True, True, False), (True, True, True))
PRUNABLE = 100
PARAMS = Params(torch.arange(1.0, 105.0), LAYOUT)  # a holds the smaller ones
FULL = Mask.full(LAYOUT)

HERE = Situation(
    progress=0.5,
    stages_left=0.25,
    spent_bytes=0.2,
    spent_flops=0.4,
    bytes_now=0.3,
    density=0.1,
    accuracy=0.8,
    loss=0.4,
    train_loss=0.2,
    probes=(1.0, 1.5, inf, 1.5),
    moved=0.01,
    agreement=0.6,
    loss_spread=0.2,
    participation=0.9,
    on_the_wire=0.7,
    sparsest_layer=0.05,
    layer_spread=0.1,
    smaller_half=0.15,
)


def seen(now: Situation, history: History | None = None, preference: float = 0.1) -> Mapping[str, float]:
    values = observe(now, history or History(preference))
    return dict(zip(FEATURES, values.tolist(), strict=True))


def after(now: Situation, asked: int = 0, action: int = 0, factor: float = 1.0, best: float = 0.0) -> History:
    """Return a history with one decision, made in round 4 at λ = 0.1."""
    return History(0.1, best=best).record(Decision(4, now, asked, action, factor))


# ── what is seen


def test_an_observation_by_hand() -> None:
    before = replace(HERE, accuracy=0.7, loss=0.5)
    history = History(0.1, last=Decision(3, before, asked=3, action=3, factor=0.5), best=0.84)
    found = seen(HERE, history)
    expected = {
        "progress": 0.5,
        "stages left": 0.25,
        "bytes spent": 0.2,
        "bytes now": 0.3,
        "density": 0.1,
        "log density": 2 / 3,  # a third of the way from 1 to 0.001
        "accuracy": 0.8,
        "loss": 0.2,
        "accuracy gained": 0.5,  # five times a tenth
        "loss fallen": 0.2,  # by a fifth
        "behind the best": 0.2,
        "last factor": -0.30103,
        "moved": 0.5,  # halfway between 0.0001 and 1
        "agreement": 0.6,
        "train loss gap": 1 / 3,  # 0.2 of 0.6
        "probe 0.75": 0.0,
        "probe 0.5": 0.2027326,  # ln 1.5 / 2
        "probe 0.3": 1.0,
        "probe 0.1": 0.2027326,
        "spread of losses": 0.2,
        "participation": 0.9,
        "on the wire": 0.7,
        "sparsest layer": 0.05,
        "spread of layers": 0.2,
        "smaller half": 0.3,
        "preference": 0.5,  # halfway between 0.01 and 1
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_first_stage_has_nothing_to_compare_with() -> None:
    found = seen(HERE)
    assert found["accuracy gained"] == found["loss fallen"] == found["last factor"] == 0


numbers = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1e-12, 1e9, inf, nan]))


@settings(deadline=None)
@given(st.lists(numbers, min_size=17, max_size=17), st.floats(1e-6, 1e6))
def test_an_observation_is_finite_and_in_range(values, preference):
    fields = [name for name in vars(HERE) if name != "probes"]
    now = replace(HERE, **dict(zip(fields, values, strict=True)), probes=tuple(values[:4]))
    for history in (History(preference), replace(after(HERE, factor=0.001), preference=preference, best=0.9)):
        found = observe(now, history)
        assert found.shape == (len(FEATURES),) and found.dtype == np.float32
        assert np.isfinite(found).all() and np.abs(found).max() <= 1


@pytest.mark.parametrize("loss", [nan, inf])
def test_a_model_that_diverged_is_seen_as_worse(loss: float) -> None:
    found = seen(replace(HERE, loss=loss), after(HERE))
    assert (found["loss"], found["loss fallen"], found["train loss gap"]) == (1.0, -1.0, 1.0)
    mended = seen(HERE, after(replace(HERE, loss=loss)))
    assert mended["loss fallen"] == 1.0
    assert seen(replace(HERE, loss=loss), after(replace(HERE, loss=loss)))["loss fallen"] == 0.0


def test_an_accuracy_of_nan_is_the_lowest() -> None:
    found = seen(replace(HERE, accuracy=nan), after(HERE))
    assert (found["accuracy"], found["accuracy gained"], found["behind the best"]) == (0.0, -1.0, 1.0)
    assert after(replace(HERE, accuracy=nan), best=0.4).best == 0.4


def test_layer_summary_by_hand() -> None:
    mask = Mask(FULL.flat.clone(), LAYOUT)
    mask.flat[:40] = False  # half of a; its others are 41 … 80, and b is 81 … 100
    sparsest, layer_spread, smaller_half = situation.layer_summary(PARAMS, mask)
    assert (sparsest, layer_spread) == pytest.approx((0.5, 0.25))
    squares = [w * w for w in range(41, 101)]
    assert smaller_half == pytest.approx(sum(squares[:30]) / sum(squares))
    nothing = Mask(~LAYOUT.prunable_flat, LAYOUT)
    assert situation.layer_summary(PARAMS, nothing) == (0.0, 0.0, 0.5)


def test_spread_and_ratio() -> None:
    assert situation.spread([1.0, 3.0]) == pytest.approx(0.5)
    assert situation.spread([]) == situation.spread([nan]) == situation.spread([0.0, 0.0]) == 0.0
    assert (situation.ratio(1, 2), situation.ratio(0, 0), situation.ratio(1, 0)) == (0.5, 1.0, inf)


# ── what actions do


@pytest.mark.parametrize(
    ("action", "density"), [(0, 1.0), (1, 0.9), (2, 0.75), (3, 0.5), (4, 0.3), (GROW, 1.0)]
)
def test_actions_on_a_dense_model(action: int, density: float) -> None:
    mask = target_mask(action, PARAMS, FULL, 0.01)
    assert mask.density == pytest.approx(density)
    held = PARAMS.flat[mask.flat & LAYOUT.prunable_flat]
    assert float(held.min()) == 101 - round(density * PRUNABLE)  # the largest ones
    assert bool(mask.flat[~LAYOUT.prunable_flat].all())


def test_regrowing_takes_the_largest_behind_the_mask() -> None:
    half = target_mask(3, PARAMS, FULL, 0.01)
    grown = target_mask(GROW, PARAMS, half, 0.01)
    new = PARAMS.flat[grown.flat & ~half.flat]
    assert sorted(new.tolist()) == list(range(39, 51))  # a quarter of 50, rounded to even


def test_what_comes_back_starts_from_zero() -> None:
    half = target_mask(3, PARAMS, FULL, 0.01)
    grown = target_mask(GROW, PARAMS, half, 0.01)
    after = stages.regrown(PARAMS, half, grown)
    back = grown.flat & ~half.flat
    assert after.flat[back].tolist() == [0.0] * 12
    assert torch.equal(after.flat[~back], PARAMS.flat[~back])
    assert stages.regrown(PARAMS, FULL, half) is PARAMS


def test_nothing_is_pruned_below_the_floor() -> None:
    third = target_mask(4, PARAMS, FULL, 0.01)
    assert target_mask(4, PARAMS, third, 0.2).density == pytest.approx(0.2)
    assert target_mask(3, PARAMS, third, 0.4) is third  # below it already, by another's doing


@settings(deadline=None)
@given(st.integers(0, GROW), st.floats(0.02, 1.0), st.floats(0.01, 1.0))
def test_the_density_moves_as_asked(action, density, floor):
    mask = top_k(PARAMS.flat, density, LAYOUT)
    moved = target_mask(action, PARAMS, mask, floor)
    if action == GROW:
        assert mask.density <= moved.density <= max(1.25 * mask.density, mask.density + 0.01) + 0.005
    else:
        assert moved.density <= mask.density
        assert moved.density >= min(floor, mask.density) - 0.005
        assert bool((moved.flat <= mask.flat).all())


# ── what is safe


def losses(table: Mapping[float, float]):
    return lambda mask: table[round(mask.density, 2)]


@pytest.mark.parametrize(
    ("table", "done"),
    [
        ({1.0: 1, 0.3: 1.4}, 4),
        ({1.0: 1, 0.3: 1.6, 0.5: 1.5}, 3),
        ({1.0: 1, 0.3: nan, 0.5: inf, 0.75: 2, 0.9: 1.2}, 1),
        ({1.0: 1, 0.3: 9, 0.5: 9, 0.75: 9, 0.9: 9}, 0),
    ],
)
def test_the_next_milder_action_is_taken(table: dict[float, float], done: int) -> None:
    action, mask = safe(4, PARAMS, FULL, losses(table), min_density=0.01, rollback=1.5)
    assert action == done and mask.density == pytest.approx(stages.FACTORS[done])


@pytest.mark.parametrize(("steepest", "done"), [(0.0, 4), (0.3, 4), (0.31, 3), (0.5, 3), (0.8, 1), (0.95, 0)])
def test_nothing_steeper_than_allowed_is_done(steepest: float, done: int) -> None:
    action, mask = safe(4, PARAMS, FULL, lambda _: 1.0, min_density=0.01, rollback=1.5, steepest=steepest)
    assert action == done and mask.density == pytest.approx(stages.FACTORS[done])


def test_a_model_that_diverged_already_is_pruned_only_if_that_mends_it() -> None:
    for table, done in [({1.0: nan, 0.3: 2.0}, 4), (dict.fromkeys((1.0, 0.3, 0.5, 0.75, 0.9), nan), 0)]:
        assert safe(4, PARAMS, FULL, losses(table), min_density=0.01, rollback=1.5)[0] == done


@pytest.mark.parametrize("action", [0, GROW])
def test_holding_and_regrowing_cost_no_look_at_the_data(action: int) -> None:
    def never(mask: Mask) -> float:
        raise AssertionError("validated")

    half = target_mask(3, PARAMS, FULL, 0.01)
    assert safe(action, PARAMS, half, never, min_density=0.01, rollback=1.5)[0] == action


@pytest.mark.parametrize(("action", "density", "floor"), [(GROW, 1.0, 0.01), (4, 0.2, 0.2), (1, 0.01, 0.001)])
def test_what_leaves_the_mask_as_it_is_is_holding(action: int, density: float, floor: float) -> None:
    mask = top_k(PARAMS.flat, density, LAYOUT)
    done, moved = safe(action, PARAMS, mask, lambda _: 1.0, min_density=floor, rollback=1.5)
    assert done == 0 and moved == mask


@pytest.mark.parametrize(
    ("density", "floor", "steepest", "found"),
    [
        (1.0, 0.01, 0.0, (0, 1, 2, 3, 4)),
        (0.5, 0.01, 0.0, (0, 1, 2, 3, 4, 5)),
        (0.5, 0.01, 0.5, (0, 1, 2, 3, 5)),
        (0.2, 0.2, 0.0, (0, 5)),
        (1.0, 1.0, 0.0, (0,)),
        (1.0, 0.01, 1.0, (0,)),
    ],
)
def test_what_is_possible(density: float, floor: float, steepest: float, found: tuple[int, ...]) -> None:
    assert stages.possible(density, floor, steepest) == found


def test_names_are_derived_from_the_table_of_factors() -> None:
    assert ACTIONS == ("hold", "×0.9", "×0.75", "×0.5", "×0.3", "×1.25")
    assert observation.INTERFACE.actions is ACTIONS


def test_another_table_of_actions_may_have_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "FACTORS", (1.0, 0.5, 1.25, 0.75, 1.5, 0.1))
    half = top_k(PARAMS.flat, 0.5, LAYOUT)
    assert stages.allowed(0.5) == (0, 1, 2, 3, 4)
    assert stages.possible(1.0, 0.01, 0.0) == (0, 1, 3, 5)
    assert [round(target_mask(a, PARAMS, half, 0.01).count - 4, 1) for a in (2, 4)] == [62, 75]
    refused: list[float] = []

    def loss(mask: Mask) -> float:
        refused.append(mask.density)
        return 9.0 if mask.density < 0.7 else 1.0

    assert safe(5, PARAMS, FULL, loss, min_density=0.01, rollback=1.5)[0] == 3
    assert refused == pytest.approx([1.0, 0.1, 0.5, 0.75])


def test_what_was_asked_for_and_what_was_done_learn_from_one_reward() -> None:
    later = after(HERE, asked=4, action=1).reward(replace(HERE, accuracy=0.83))
    assert [(action, round(gained, 6)) for action, gained in later.tried] == [(1, 0.03), (4, 0.03)]
    assert [action for action, _ in after(HERE, asked=1, action=1).reward(HERE).tried] == [1]


@pytest.mark.parametrize("open_to", [(0,), (0, 5), (1, 2), (0, 1, 2, 3, 5)])
def test_the_bandit_chooses_among_what_is_possible(open_to: tuple[int, ...]) -> None:
    tried: list[tuple[int, float]] = [(4, 9.0)]
    for _ in range(40):
        tried.append((stages.bandit(tried, open_to), 0.1))
    assert {action for action, _ in tried[1:]} == set(open_to)


# ── what it brings


def test_a_reward_by_hand() -> None:
    now = replace(HERE, accuracy=0.85, spent_bytes=0.3, spent_flops=0.6)
    # five points, less λ = 0.1 times (a tenth of the traffic + a quarter of a fifth of the FLOPs)
    assert reward(HERE, now, 0.1) == pytest.approx(0.05 - 0.1 * (0.1 + 0.25 * 0.2))
    assert reward(HERE, now, 0.1, flops_weight=0) == pytest.approx(0.05 - 0.01)


def test_rewards_add_up_to_the_end() -> None:
    path = [replace(HERE, accuracy=a, spent_bytes=b) for a, b in [(0.1, 0.1), (0.5, 0.3), (0.7, 0.35)]]
    brought = sum(reward(x, y, 0.2) for x, y in itertools.pairwise(path))
    assert brought == pytest.approx(0.6 - 0.2 * 0.25)


def test_a_history_rewards_the_last_action_by_the_preference_it_was_taken_with() -> None:
    assert History(0.1).reward(HERE).tried == ()
    history = after(HERE, asked=4, action=2)
    assert history.best == 0.8 and history.last is not None and history.last.round == 4
    now = replace(HERE, accuracy=0.83, spent_bytes=HERE.spent_bytes + 0.1)
    assert dict(history.reward(now).tried) == pytest.approx({2: 0.02, 4: 0.02})
    assert history.reward(now).keep_to(0.175, now).preference > history.preference
    assert history.keep_to(None, now) is history


def test_a_history_reports_the_decision_of_its_round_only() -> None:
    history = after(HERE, asked=4, action=2, factor=0.75)
    assert history.measures(4) == {"action": 2, "asked": 4, "factor": 0.75, "preference": 0.1}
    assert history.measures(5) == history.measures(3) == History(0.1).measures(0) == {}


def test_a_decision_drops_the_model_that_was_sent() -> None:
    sent = History(0.1).send(PARAMS)
    assert sent.sent is PARAMS and sent.record(Decision(1, HERE, 0, 0, 1.0)).sent is None


def test_under_a_budget_the_price_follows_what_is_left() -> None:
    # a run that holds on at half of the way: 0.2 spent + 0.3 · half of the rounds = 0.35
    assert stages.dual(0.1, HERE, 0.35) == pytest.approx(0.1)
    assert stages.dual(0.1, HERE, 0.175) == pytest.approx(0.1 * np.e)
    assert stages.dual(0.1, HERE, 0.7) == pytest.approx(0.1 * np.exp(-0.5))
    assert stages.dual(0.1, HERE, 1e-9) == pytest.approx(0.1 * np.exp(2))
    assert stages.dual(0.9, HERE, 0.01) == 1.0 and stages.dual(0.011, HERE, 9.0) == 0.01


def test_the_bandit_tries_everything_and_then_the_best() -> None:
    tried: list[tuple[int, float]] = []
    for _ in ACTIONS:
        tried.append((stages.bandit(tried), 0.0))
    assert [action for action, _ in tried] == list(range(len(ACTIONS)))
    for _ in range(200):
        action = stages.bandit(tried)
        tried.append((action, 0.3 if action == 2 else 0.1))
    assert sum(action == 2 for action, _ in tried) > 150


def test_a_reward_of_nan_is_the_worst() -> None:
    tried = [(action, nan if action == 1 else 0.1) for action in range(len(ACTIONS))]
    for _ in range(100):
        action = stages.bandit(tried)
        assert action != 1
        tried.append((action, 0.1))
