"""ASHA without a cluster: which trials it stops, by which direction, and what it knows after `resume`."""

from collections.abc import Iterable
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest

from fedray.sweeps.asha import Named, Rungs

METRIC = "val/loss"


def trial(name: str, session: str = "first") -> Any:
    """Return a trial of Tune's; its id is another one in each session."""
    return SimpleNamespace(config={"name": name}, trial_id=f"{session}_{hash(name):x}")


def rungs(direction="min", metric=METRIC, first=2, last=100, reduction=3, on_stop=None) -> Rungs:
    return Rungs(metric, direction, first=first, last=last, reduction=reduction, on_stop=on_stop)


def report(scheduler: Rungs, name: str, round: int, value: Any, session="first") -> str:
    decision: str = scheduler.on_trial_result(
        None, trial(name, session), {"round": round, scheduler.compared: value}
    )
    return decision


def known(scheduler: Rungs) -> dict[float, dict[str, float]]:
    (bracket,) = scheduler._brackets
    return {rung: dict(recorded) for rung, recorded in bracket._rungs}


def started(scheduler: Rungs, names: Iterable[str], session="first") -> Rungs:
    for name in names:
        scheduler.on_trial_add(None, trial(name, session))
    return scheduler


@pytest.mark.parametrize(
    "direction, good, bad", [("min", 0.1, 0.9), ("max", 0.9, 0.1), ("min", 9.0, nan), ("max", 0.1, nan)]
)
def test_the_worse_are_stopped_and_nan_is_the_worst(direction, good, bad):
    scheduler = started(rungs(direction), "abcd")
    for name in "abc":
        assert report(scheduler, name, 2, good) == "CONTINUE"
    assert report(scheduler, "d", 2, bad) == "STOP"


@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("bad", [nan, inf, -inf, None])
def test_diverged_trials_do_not_keep_worse_ones_alive(direction, bad):
    """Ray leaves NaN out of its percentile, and interpolates to NaN with infinity: neither stops anything."""
    scheduler = started(rungs(direction), "abcdef")
    report(scheduler, "a", 2, bad)
    for name, value in zip("bcd", (0.5, 0.5, 0.5), strict=True):
        assert report(scheduler, name, 2, value) == "CONTINUE"
    assert report(scheduler, "e", 2, 0.6 if direction == "min" else 0.4) == "STOP"
    assert report(scheduler, "f", 2, bad) == "STOP"


def test_a_round_without_the_metric_decides_nothing():
    scheduler = started(rungs(), "ab")
    report(scheduler, "a", 2, 0.1)
    assert scheduler.on_trial_result(None, trial("b"), {"round": 2}) == "CONTINUE"
    assert known(scheduler)[2] == {"a": -0.1}
    assert report(scheduler, "b", 3, 0.2) == "STOP"
    scheduler.on_trial_complete(None, trial("b"), {"round": 3})  # nor the end


def test_tune_does_not_ask_for_the_metric_in_every_round():
    assert rungs().metric is None


def test_who_is_stopped_is_told_with_the_round():
    told: list[tuple[str, int]] = []
    scheduler = started(rungs(on_stop=lambda *what: told.append(what)), "ab")
    report(scheduler, "a", 3, 0.1)
    report(scheduler, "b", 4, 0.2)
    assert told == [("b", 4)]


# ── after an interruption
# ──────────────────────────────────────────────────────────────────────────────────────────

RUNS = {  # loss after each round; one round at a time each, in this order
    "a": [1.0 / (n + 1) for n in range(60)],
    "b": [2.0 / (n + 1) for n in range(60)],
    "c": [nan] * 60,
    "d": [0.5 / (n + 1) for n in range(60)],
}


def lines(values: list[float], upto: int) -> list[dict[str, Any]]:
    """Return the rounds as `rounds.jsonl` has them: NaN is null, round 0 is the set-up."""
    return [{"round": n, METRIC: None if value != value else value} for n, value in enumerate(values[:upto])]


def test_what_was_known_comes_back():
    """Finished, stopped and interrupted trials: every rung holds the value of its own round."""
    undisturbed = started(rungs(reduction=3, first=3), "abcd")
    upto: dict[str, int] = {}
    stopped: set[str] = set()
    for n in range(40):
        for name, values in RUNS.items():
            if name not in stopped:
                upto[name] = n + 1
                if report(undisturbed, name, n, values[n]) == "STOP":
                    stopped.add(name)
    assert stopped >= {"c"}
    again = rungs(reduction=3, first=3)
    for name in reversed(RUNS):  # in whatever order
        again.recall(name, lines(RUNS[name], upto[name]))
    assert known(again) == known(undisturbed)
    assert known(again)[27]["a"] == -RUNS["a"][27]


def test_a_resumed_trial_is_not_judged_at_an_early_rung_by_a_late_value():
    resumed = rungs(first=25, last=100)
    resumed.recall("early", lines([1.0] * 26, 26))
    resumed.recall("late", lines([2.0 - n / 100 for n in range(61)], 61))
    started(resumed, ["early", "late", "new"], session="second")
    late = 2.0 - 25 / 100
    assert known(resumed)[25] == {"early": -1.0, "late": -late}
    for round in (51, 60, 61):
        assert report(resumed, "late", round, 0.5, session="second") == "CONTINUE"
    assert known(resumed)[25] == {"early": -1.0, "late": -late}
    assert report(resumed, "new", 25, 1.5, session="second") == "STOP"  # against those before


def test_without_recall_it_would_be():
    """The fault: the rung of round 25 gets the value of round 61, and nobody is compared with the past."""
    fresh = started(rungs(first=25, last=100), ["late"], session="second")
    report(fresh, "late", 60, 0.5, session="second")
    assert known(fresh)[25] == {"late": -0.5}


def test_a_trial_is_known_by_its_name():
    assert Named("a") == Named("a")
    scheduler = rungs()
    scheduler.recall("a", lines([1.0, 1.0, 1.0], 3))
    assert known(scheduler)[2] == {"a": -1.0}
