"""Schedulers without a cluster: which trials they stop, and what they know after `resume`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedray.sweeps.hyperband import HyperBandRule
from fedray.sweeps.schedulers import AshaRule, Journal, Judge, MedianRule, Rule
from fedray.sweeps.tune import ASKS

METRIC = "val/loss"


def trial(name: str, session: str = "first") -> Any:
    """Return a trial of Tune's; its id is another one in each session."""
    return SimpleNamespace(config={"name": name}, trial_id=f"{session}_{hash(name):x}", status="PENDING")


def asha(names: str, direction: Any = "min", *, first=2, last=100, reduction=3, **more: Any) -> Judge:
    return Judge(AshaRule(first=first, last=last, reduction=reduction), names, METRIC, direction, **more)


def median(names: str, direction: Any = "min", *, first=2, min_trials=1, **more: Any) -> Judge:
    return Judge(MedianRule(first=first, min_trials=min_trials), names, METRIC, direction, **more)


def report(judge: Judge, name: str, round: int, value: Any, session="first") -> str:
    return judge.on_trial_result(None, trial(name, session), {"round": round, METRIC: value})


def known(judge: Judge) -> dict[float, dict[str, float]]:
    (bracket,) = judge.rule._brackets  # type: ignore[attr-defined]
    return {rung: dict(recorded) for rung, recorded in bracket._rungs}


# ── what is worse
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("judge_of", [asha, median])
@pytest.mark.parametrize(
    "direction, good, bad", [("min", 0.1, 0.9), ("max", 0.9, 0.1), ("min", 9.0, nan), ("max", 0.1, nan)]
)
def test_the_worse_are_stopped_and_nan_is_the_worst(judge_of, direction, good, bad):
    judge = judge_of("abcd", direction)
    for name in "abc":
        assert report(judge, name, 2, good) == "CONTINUE"
    assert report(judge, "d", 2, bad) == "STOP"


@pytest.mark.parametrize("judge_of", [asha, median])
@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("bad", [nan, inf, -inf, None])
def test_diverged_trials_do_not_keep_worse_ones_alive(judge_of, direction, bad):
    """Ray leaves NaN out of its percentile, and interpolates to NaN with infinity: neither stops anything."""
    judge = judge_of("abcdef", direction)
    report(judge, "a", 2, bad)
    for name, value in zip("bcd", (0.5, 0.5, 0.5), strict=True):
        assert report(judge, name, 2, value) == "CONTINUE"
    assert report(judge, "e", 2, 0.6 if direction == "min" else 0.4) == "STOP"
    assert report(judge, "f", 2, bad) == "STOP"


def test_a_round_without_the_metric_decides_nothing():
    judge = asha("ab")
    report(judge, "a", 2, 0.1)
    assert judge.on_trial_result(None, trial("b"), {"round": 2}) == "CONTINUE"
    assert known(judge)[2] == {"a": -0.1}
    assert report(judge, "b", 3, 0.2) == "STOP"
    judge.on_trial_complete(None, trial("b"), {"round": 3})  # nor the end


def test_tune_does_not_ask_for_the_metric_in_every_round():
    assert asha("a").metric is None


def test_who_is_stopped_is_told_with_the_round():
    told: list[tuple[str, int]] = []
    judge = asha("ab", on_stop=lambda *what: told.append(what))
    report(judge, "a", 3, 0.1)
    report(judge, "b", 4, 0.2)
    assert told == [("b", 4)]


def test_a_round_that_runs_again_is_judged_once():
    """A trial that is tried again from an older checkpoint reports some rounds twice."""
    judge = median("ab")
    for _ in range(2):
        for round in range(4):
            assert report(judge, "a", round, 0.5) == "CONTINUE"
    (seat,) = judge.rule._results  # type: ignore[attr-defined]
    assert [result["round"] for result in judge.rule._results[seat]] == [0, 1, 2, 3]  # type: ignore[attr-defined]


def test_median_waits_for_enough_trials():
    judge = median("abcd", min_trials=2)
    assert report(judge, "a", 2, 0.1) == "CONTINUE"
    assert report(judge, "b", 2, 0.9) == "CONTINUE"  # one other is not enough
    assert report(judge, "c", 2, 0.8) == "STOP"


# ── as Tune runs them
# ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class World:
    """Trials with given curves under a rule, one at a time, as Tune runs them; with their files.

    Args:
        make: makes the rule.
        curves: name → value of round 0, 1, 2 and so on.
        folder: of the journal.
        every: rounds between reports of the metric.
        fails: name → round in which it fails for good.
    """

    make: Callable[[], Rule]
    curves: Mapping[str, list[float]]
    folder: Path
    every: int = 1
    fails: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stopped: dict[str, int] = {}
        self.round = dict.fromkeys(self.curves, -1)
        self.order: list[tuple[str, int]] = []

    def is_finished(self, name: str) -> bool:
        return self.round[name] == len(self.curves[name]) - 1

    def session(self, most: int = 10_000) -> None:
        """Run until all trials are at their end, or for some rounds; then the driver is killed."""
        self.judge = Judge(
            self.make(),
            list(self.curves),
            METRIC,
            "min",
            Journal(self.folder / "judged.jsonl"),
            on_stop=self.stopped.__setitem__,
            is_finished=self.is_finished,
            concurrent=1,
        )
        self.judge.recall([name for name, round in self.round.items() if round >= 0])
        waiting = [name for name in self.curves if not self.is_finished(name) and name not in self.stopped]
        self.trials = [trial(name, session=str(most)) for name in waiting]
        new = list(self.trials)
        for _ in range(2000):
            if new and self.judge.has_room():
                self.judge.on_trial_add(self, new.pop(0))
            running = next((one for one in self.trials if one.status == "RUNNING"), None)
            running = running or self.judge.choose_trial_to_run(self)
            if running is None:
                break
            if self.start(running):
                if most == 0:
                    return
                most -= 1
                self.advance(running)
        assert all(one.status in ("TERMINATED", "ERROR") for one in self.trials), "trials wait for ever"

    def start(self, running: Any) -> bool:
        """Let a trial begin, or begin again: it asks first."""
        name = running.config["name"]
        if running.status == "RUNNING":
            return True
        running.status = "RUNNING"
        if self.round[name] >= 0:
            self.act(running, self.judge.on_trial_result(self, running, {"round": 0, ASKS: True}))
        return bool(running.status == "RUNNING")

    def advance(self, running: Any) -> None:
        """Make a round of a trial."""
        name = running.config["name"]
        self.round[name] += 1
        round = self.round[name]
        if round == self.fails.get(name):
            running.status = "ERROR"
            self.judge.on_trial_error(self, running)
            return
        self.order.append((name, round))
        result: dict[str, Any] = {"round": round}
        if round % self.every == 0 or self.is_finished(name):
            result[METRIC] = self.curves[name][round]
        self.act(running, self.judge.on_trial_result(self, running, result))
        if running.status == "RUNNING" and self.is_finished(name):
            self.act(running, self.judge.on_trial_result(self, running, result))  # Tune repeats the last
            if running.status == "RUNNING":
                self.stop_trial(running)

    def act(self, running: Any, decision: str) -> None:
        if decision == "PAUSE":
            running.status = "PAUSED"
        if decision == "STOP":
            self.stop_trial(running)

    def stop_trial(self, one: Any) -> None:
        """Do what Tune's controller does."""
        before, one.status = one.status, "TERMINATED"
        if before == "RUNNING":
            self.judge.on_trial_complete(self, one, {})
        else:
            self.judge.on_trial_remove(self, one)


ROUNDS = 18
CURVES = {
    name: [start / (n + 1) for n in range(ROUNDS + 1)]
    for name, start in zip("abcdefghij", (3, 9, 1, 8, 5, 7, 2, 6, 4, 10), strict=True)
} | {"e": [nan] * (ROUNDS + 1)}

RULES: dict[str, Callable[[], Rule]] = {
    "asha": lambda: AshaRule(first=2, last=ROUNDS, reduction=2),
    "median": lambda: MedianRule(first=2, min_trials=2),
    "hyperband": lambda: HyperBandRule(last=ROUNDS, reduction=3),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("every", [1, 4])
def test_a_resumed_sweep_decides_as_an_undisturbed_one(tmp_path, rule, every):
    undisturbed = World(RULES[rule], CURVES, tmp_path, every)
    undisturbed.session()
    finished = {name for name in CURVES if undisturbed.is_finished(name)}
    assert undisturbed.stopped and finished
    for cut in range(1, len(undisturbed.order), 7):
        folder = tmp_path / str(cut)
        folder.mkdir()
        world = World(RULES[rule], CURVES, folder, every)
        world.session(cut)
        world.session(2)
        world.session()
        assert world.stopped == undisturbed.stopped, cut
        assert {name for name in CURVES if world.is_finished(name)} == finished


def test_hyperband_keeps_the_best_of_a_bracket_and_nan_is_the_worst(tmp_path):
    world = World(RULES["hyperband"], CURVES, tmp_path)
    world.session()
    # brackets of Tune: 3 trials to the end; then 6 or more of which the best third runs on after round 6
    assert set("abc") <= {name for name in CURVES if world.is_finished(name)}
    assert world.stopped["e"] == min(world.stopped.values())
    rungs = set(world.stopped.values())
    assert rungs <= {2, 6}
    for rung in rungs:
        gone = [CURVES[name][rung] for name, round in world.stopped.items() if round == rung]
        assert len(gone) >= 1


def test_hyperband_pauses_at_a_rung_and_one_trial_runs_at_a_time(tmp_path):
    world = World(RULES["hyperband"], CURVES, tmp_path)
    world.session()
    second = [name for name, round in world.order if name in "defghi" and round <= 6]
    assert second[:7] == ["d"] * 7 and second[7:14] == ["e"] * 7


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("round", [1, 3, 7])
def test_a_trial_that_fails_keeps_no_other_from_going_on(tmp_path, rule, round):
    fails = {"d": round, "f": round + 1}
    world = World(RULES[rule], CURVES, tmp_path, fails=fails)
    world.session()
    world.fails, world.round = {}, {**world.round, "d": -1}  # resume tries it again, from its start
    world.session()
    for name in CURVES:
        assert name in world.stopped or world.is_finished(name)


def test_rungs_that_lie_between_two_reports_are_passed_at_once(tmp_path):
    """With a report every 10 rounds, the rungs at 2 and 6 fall together: nobody waits for ever."""
    world = World(RULES["hyperband"], CURVES, tmp_path, every=10)
    world.session()
    assert all(name in world.stopped or world.is_finished(name) for name in CURVES)


# ── after an interruption
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_resumed_trial_reports_late_is_not_taken_for_an_early_rung(tmp_path):
    journal = Journal(tmp_path / "judged.jsonl")
    for name, start, last in (("early", 1.0, 25), ("late", 2.0, 60)):
        for round in range(last + 1):
            journal.add(name, round=round, value=start - round / 100 * (name == "late"))
    resumed = asha(["early", "late", "new"], first=25, journal=journal)  # type: ignore[arg-type]
    resumed.recall(["early", "late"])
    late = 2.0 - 25 / 100
    assert known(resumed)[25] == {"early": -1.0, "late": -late}


def test_a_trial_whose_directory_is_gone_is_forgotten(tmp_path):
    journal = Journal(tmp_path / "judged.jsonl")
    judge = asha("ab", journal=journal)
    report(judge, "a", 2, 0.1)
    report(judge, "b", 2, 0.2)
    again = asha("ab", journal=journal)
    again.recall(["a"])
    assert known(again)[2] == {"a": -0.1}
    assert [line["trial"] for line in journal.keep("ab")] == ["a"]


def test_a_torn_last_line_is_left_out(tmp_path):
    journal = Journal(tmp_path / "judged.jsonl")
    report(asha("ab", journal=journal), "a", 2, 0.1)
    with open(tmp_path / "judged.jsonl", "a") as file:
        file.write('{"trial": "b", "rou')
    again = asha("ab", journal=journal)
    again.recall("ab")
    assert known(again)[2] == {"a": -0.1}
    report(again, "b", 2, 0.2)
    assert [line["trial"] for line in journal.keep("ab")] == ["a", "b"]


def test_a_stop_that_the_driver_could_not_note_is_noted_by_resume(tmp_path):
    journal, told = Journal(tmp_path / "judged.jsonl"), dict[str, int]()
    judge = asha("ab", journal=journal)  # killed before `on_stop`
    report(judge, "a", 3, 0.1)
    report(judge, "b", 4, nan)
    asha("ab", journal=journal, on_stop=told.__setitem__).recall("ab")
    assert told == {"b": 4}


def test_nothing_is_decided_while_a_sweep_ends(tmp_path):
    journal, ending = Journal(tmp_path / "judged.jsonl"), [False]
    judge = asha("ab", journal=journal, is_ending=lambda: ending[0])
    report(judge, "a", 3, 0.1)
    ending[0] = True
    assert report(judge, "b", 3, 0.9) == "CONTINUE"
    judge.on_trial_error(None, trial("a"))
    assert len(journal.keep("ab")) == 1
