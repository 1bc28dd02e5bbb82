"""Who decides at the stages of `staged`: when, from what, within what bounds, and what is remembered."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError
from fedray.federation.server import Schedule, Server
from fedray.methods.staged import Staged
from fedray.policies import observation, stages
from fedray.policies.stages import ACTIONS, FACTORS
from tests import small

GROW = ACTIONS.index("×1.25")
WEIGHTS = 128
"""Prunable weights of small.MLP."""
TWELVE = Schedule(rounds=12, cohort=6)


class Fixed:
    """A policy that plays actions from a list, and keeps what it was shown."""

    def __init__(self, actions: list[int]) -> None:
        self.actions, self.seen = actions, list[np.ndarray]()

    def act(self, observation: np.ndarray, allowed: Sequence[int]) -> int:
        self.seen.append(observation)
        self.allowed = tuple(allowed)
        return self.actions[len(self.seen) - 1]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Fixed:
    policy = Fixed([3, 0, 5, 1, 0, 0])
    monkeypatch.setattr("fedray.policies.decider.TrainedPolicy.load", lambda *_: policy)
    return policy


def test_an_agent_decides_at_each_stage(agent: Fixed) -> None:
    method = Staged(policy="agent", stages=6, start=1 / 12, until=0.5, rollback=1e9)
    reports = small.run(small.server(method, schedule=TWELVE))
    found = [report.metrics["density/global"] for report in reports]
    assert [round(found[r] * WEIGHTS) for r in range(1, 7)] == [64, 64, 80, 72, 72, 72]
    decided = [r.round for r in reports if "method/action" in r.metrics]
    assert decided == [1, 2, 3, 4, 5, 6] and len(agent.seen) == 6
    assert [reports[r].metrics["method/asked"] for r in decided] == agent.actions
    assert reports[1].metrics["method/factor"] == 0.5
    shown = [dict(zip(observation.FEATURES, seen.tolist(), strict=True)) for seen in agent.seen]
    assert [s["density"] for s in shown] == pytest.approx(found[0:6])
    assert [s["progress"] for s in shown] == pytest.approx([r / 12 for r in decided])
    assert all(s["preference"] == pytest.approx(0.5) for s in shown)


def test_what_would_spoil_the_model_is_not_done(agent: Fixed) -> None:
    agent.actions = [4] * 6
    method = Staged(
        policy="agent", stages=6, start=1 / 12, until=0.5, rollback=1.0
    )  # not the least rise of the loss
    for report in small.run(small.server(method, schedule=TWELVE)):
        if "method/action" in report.metrics:
            assert report.metrics["method/action"] <= report.metrics["method/asked"] == 4


def test_the_traffic_of_all_rounds_is_counted(agent: Fixed) -> None:
    server = small.server(Staged(policy="agent", stages=6, start=1 / 12, until=0.5), schedule=TWELVE)
    last = small.run(server)[-1].metrics
    dense = 12 * 6 * 2 * 4 * server.place.model.layout.size
    spent = server.state.memory.history.spent.bytes
    assert spent == pytest.approx((last["total/bytes/up"] + last["total/bytes/down"]) / dense)


def test_a_tight_budget_raises_the_price_and_a_wide_one_lowers_it(agent: Fixed) -> None:
    prices = {}
    for budget in (0.05, 0.95):
        agent.seen.clear()
        method = Staged(policy="agent", stages=6, start=1 / 12, until=0.5, budget=budget)
        reports = small.run(small.server(method, schedule=TWELVE))
        prices[budget] = [r.metrics["method/preference"] for r in reports if "method/preference" in r.metrics]
        shown = [10 ** (2 * float(seen[-1]) - 2) for seen in agent.seen]
        assert shown == pytest.approx(prices[budget], rel=1e-3)
    assert prices[0.05] == sorted(prices[0.05]) and prices[0.05][-1] == 1.0
    assert prices[0.95] == sorted(prices[0.95], reverse=True) and prices[0.95][-1] < 0.1


@pytest.mark.parametrize("policy", ["bandit", "agent"])
def test_the_same_seed_gives_the_same_decisions(policy: Any, agent: Fixed) -> None:
    method = Staged(policy=policy, stages=6, start=1 / 12, until=0.5)
    first, second = (small.server(method, schedule=TWELVE) for _ in range(2))
    small.run(first)
    agent.seen.clear()
    small.run(second)
    assert first.model.sha256 == second.model.sha256
    assert first.state.memory.history.tried == second.state.memory.history.tried


def test_decisions_go_on_from_a_checkpoint() -> None:
    method = Staged(policy="bandit", stages=9)
    whole = small.server(method, schedule=TWELVE)
    small.run(whole)
    first = small.server(method, schedule=TWELVE)
    first.setup()
    for _ in range(5):
        first.step()
    second = small.server(method, schedule=TWELVE, checkpoint=first.checkpoint)
    small.run(second)
    assert second.model.sha256 == whole.model.sha256


def test_by_default_a_policy_decides_twelve_times_from_the_first_round() -> None:
    server = small.server(Staged(policy="bandit"), schedule=Schedule(rounds=60, cohort=2))
    server.setup()
    assert server.state.memory.stages == (1, 5, 10, 15, 20, 25, 29, 34, 39, 44, 49, 54)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"policy": "bandit", "threshold": 0.5}, r"method\.policy=bandit prunes by magnitude"),
        ({"policy": "bandit", "importance": "gradient"}, r"set method\.policy=schedule"),
        ({"agent": "here"}, r"method\.agent is given, but method\.policy=schedule"),
        ({"policy": "agent", "agent": "nowhere"}, r"method\.agent: .*nowhere.*fedray agent train"),
        ({"budget": 0.3}, r"method\.budget is given, but a schedule has no budget"),
        ({"policy": "bandit", "budget": 0}, r"method\.budget"),
        ({"policy": "bandit", "rollback": 0.9}, r"method\.rollback"),
        ({"policy": "bandit", "preference": 0}, r"method\.preference"),
        ({"policy": "agnt"}, r"method\.policy"),
    ],
)
def test_policies_that_cannot_be_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RunConfig.from_tree({"method": {"name": "staged", **options}, "tracking": {"uri": "none"}})


@pytest.mark.parametrize(("regrow_from", "zeros"), [("zero", True), ("shadow", False)])
def test_what_comes_back_has_the_value_that_is_asked_for(agent: Fixed, regrow_from: Any, zeros: bool) -> None:
    agent.actions = [3, 5, 0, 0, 0, 0]
    method = Staged(policy="agent", stages=6, start=1 / 12, until=0.5, regrow_from=regrow_from)
    server = small.server(method, schedule=TWELVE)
    server.setup()
    server.step()
    before = server.state.mask
    server.step()
    back = server.state.mask.flat & ~before.flat
    assert int(back.sum()) == 16
    assert bool((server.state.params.flat[back] == 0).all()) is zeros


# ── what is asked for, and what is learnt from it


def decisions(server: Server) -> list[tuple[int, int]]:
    """Make a run; return what was asked for and what was done at each stage."""
    metrics = [report.metrics for report in small.run(server)]
    return [(int(m["method/asked"]), int(m["method/action"])) for m in metrics if "method/asked" in m]


@pytest.mark.parametrize("steepest", [0.31, 0.5, 0.8, 0.95])
def test_a_bandit_never_asks_for_what_is_too_steep(steepest: float) -> None:
    method = Staged(
        policy="bandit", stages=40, steepest=steepest, rollback=1e9, until=1.0, initial_density=0.5
    )
    server = small.server(method, schedule=Schedule(rounds=40, cohort=4))
    found = decisions(server)
    allowed = [a for a, factor in enumerate(FACTORS) if factor >= steepest]
    assert {asked for asked, _ in found} == set(allowed), "and it has tried all that it may"
    assert all(done in (asked, 0) for asked, done in found), "0: there was nothing left to prune"


def test_a_bandit_asks_for_nothing_that_cannot_move_the_mask() -> None:
    method = Staged(policy="bandit", stages=30, min_density=0.25, rollback=1e9, until=1.0)
    server = small.server(method, schedule=Schedule(rounds=30, cohort=4))
    reports = small.run(server)
    seen = [
        (before.metrics["density/global"], int(report.metrics["method/asked"]))
        for before, report in pairwise(reports)
        if "method/asked" in report.metrics
    ]
    assert min(density for density, _ in seen) == 0.25 and max(density for density, _ in seen) == 1.0
    for density, action in seen:
        assert action in (0, GROW) or density > 0.25
        assert action != GROW or density < 1


def test_a_bandit_whose_every_wish_is_refused_does_not_repeat_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "no_worse", lambda loss, bound: False)
    method = Staged(policy="bandit", stages=24, until=1.0)
    server = small.server(method, schedule=Schedule(rounds=24, cohort=4))
    found = decisions(server)
    refused = [asked for asked, done in found if asked != done]
    assert len(refused) >= 8 and set(refused) == {1, 2, 3, 4}
    assert max(refused.count(action) for action in set(refused)) <= len(refused) / 2
    tried = server.state.memory.history.tried
    assert len(tried) == len(found) - 1 + sum(asked != done for asked, done in found[:-1])


@pytest.mark.parametrize(("steepest", "allowed"), [(0.0, (0, 1, 2, 3, 4, 5)), (0.5, (0, 1, 2, 3, 5))])
def test_an_agent_is_told_what_is_allowed(agent: Fixed, steepest: float, allowed: tuple[int, ...]) -> None:
    method = Staged(policy="agent", stages=6, start=1 / 12, until=0.5, steepest=steepest)
    small.run(small.server(method, schedule=TWELVE))
    assert agent.allowed == allowed


def test_to_regrow_a_whole_model_and_to_prune_at_the_floor_is_to_hold(agent: Fixed) -> None:
    agent.actions = [GROW, 4, 4, 1, GROW, 0]
    method = Staged(policy="agent", stages=6, start=1 / 12, until=0.5, min_density=0.25, rollback=1e9)
    assert decisions(small.server(method, schedule=TWELVE)) == [
        (5, 0),
        (4, 4),
        (4, 4),
        (1, 0),
        (5, 5),
        (0, 0),
    ]
