"""Which trials run on: Tune's own schedulers, given worths instead of metrics, and right after a resume.

    judge = Judge(AshaRule(…), names, metric, direction, Journal(path), …)
    judge.recall()                  every report of earlier sessions, in its order
    tune.Tuner(…, scheduler=judge)

A `Rule` is one of Tune's schedulers. It sees `Seat`s in place of Tune's trials: a seat keeps its name from
session to session. All reports stand in the journal in the order in which they were judged, with their
values, so that a resumed sweep restores every rung by judging them again.

A trial that starts again asks first (`ASKS`) whether it may run: Tune starts all trials that it knows, also
those that wait for others.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from fedray import durable
from fedray.comparing import worth
from fedray.sweeps.outcome import writing
from fedray.sweeps.tune import ASKS
from fedray.types import Direction

logger = logging.getLogger(__name__)

WORST = -1e300
"""Worth of a diverged trial: finite, since Tune's schedulers interpolate, or leave out what is not."""

WORTH, ROUND = "worth", "round"

OnStop = Callable[[str, int], None]
"""Called with the trial that is stopped before its end, and its round."""

CONTINUE, PAUSE, STOP = TrialScheduler.CONTINUE, TrialScheduler.PAUSE, TrialScheduler.STOP


@dataclass(eq=False)
class Seat:
    """A trial as the rule knows it, in this session and in the next.

    Args:
        name: of the trial; Tune's ids change from session to session.
        status: as the rule has decided: PENDING, RUNNING, PAUSED, TERMINATED or ERROR.
        trial: Tune's trial, once Tune has added it in this session.
        round: of its last report.
        config: what the rule may change.
    """

    name: str
    status: str = "PENDING"
    trial: Any = None
    round: int = -1
    config: dict[str, Any] = field(default_factory=dict)

    is_saving = False
    experiment_tag = ""

    @property
    def trial_id(self) -> str:
        """The name: Tune's rules know trials by their ids."""
        return self.name

    def is_finished(self) -> bool:
        """Whether it will not report again."""
        return self.status in ("TERMINATED", "ERROR")


class Rule(Protocol):
    """One of Tune's schedulers, for seats."""

    def on_trial_add(self, desk: Any, trial: Seat) -> None: ...
    def on_trial_result(self, desk: Any, trial: Seat, result: dict[str, Any]) -> str: ...
    def on_trial_complete(self, desk: Any, trial: Seat, result: dict[str, Any]) -> None: ...
    def on_trial_error(self, desk: Any, trial: Seat) -> None: ...
    def on_trial_remove(self, desk: Any, trial: Seat) -> None: ...

    pauses: ClassVar[bool]
    """Whether trials wait for each other."""

    def may_go_on(self, seat: Seat) -> bool:
        """Tell whether a paused trial need not wait any longer."""
        ...


class AshaRule(ASHAScheduler):  # type: ignore[misc]  # Ray has no types
    """ASHA over rounds.

    Args:
        first: round of the first rung.
        last: round of the longest trial.
        reduction: one trial in this many is kept at each rung.
    """

    pauses = False

    def __init__(self, *, first: int, last: int, reduction: int) -> None:
        super().__init__(ROUND, WORTH, "max", max_t=last, grace_period=first, reduction_factor=reduction)

    def may_go_on(self, seat: Seat) -> bool:
        """Return True: no trial waits for another."""
        return True


class MedianRule(MedianStoppingRule):  # type: ignore[misc]
    """The median stopping rule over rounds: each report counts once.

    Args:
        first: round of the first comparison, and the first that counts in the means.
        min_trials: other trials that must have reached the round, at least.
    """

    pauses = False

    def __init__(self, *, first: int, min_trials: int) -> None:
        super().__init__(
            ROUND,
            WORTH,
            "max",
            grace_period=first,
            min_samples_required=min_trials,
            min_time_slice=inf,  # else it would pause trials that have too few others
        )

    def on_trial_result(self, tune_controller: Any, trial: Seat, result: dict[str, Any]) -> str:
        """Compare a trial, also one that went on after all."""
        self._stopped_trials.discard(trial)
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Seat, result: Mapping[str, Any]) -> None:
        """Do nothing: Tune's would count the last report twice."""

    def may_go_on(self, seat: Seat) -> bool:
        """Return True: no trial waits for another."""
        return True


class Journal:
    """The reports that were judged, a line each in their order: `judged.jsonl` in the sweep's directory.

    Args:
        path: the file; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def add(self, name: str, **what: Any) -> None:
        """Add a line."""
        if self.path is not None:
            with writing(self.path):
                durable.append_lines(self.path, [{"trial": name, **what}])

    def keep(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return the lines of some trials; those of others are removed: their directories are gone."""
        if self.path is None:
            return []
        kept, (lines, problem) = set(names), durable.scan_lines(self.path)
        if problem is not None:
            logger.warning("%s; the reports after it are judged again", problem)
        own = [line for line in lines if line["trial"] in kept]
        if self.path.exists():  # also without a torn last line, to which the next would be added
            with writing(self.path):
                durable.replace(self.path, durable.as_lines(own))
        return own


class Judge(FIFOScheduler):  # type: ignore[misc]
    """Tune's scheduler of a sweep: hands the reports to a rule, and keeps the journal.

    Args:
        rule: decides.
        names: of the trials, in order.
        metric: that is compared; a report without it decides nothing.
        direction: whether more of it is better.
        journal: of the reports.
        on_stop: called when a trial is stopped before its end.
        is_finished: tells whether a trial has all its rounds, by its files.
        is_ending: tells whether the sweep is ending: then nothing is decided any more.
        concurrent: trials at once; paused ones do not count.
    """

    def __init__(
        self,
        rule: Rule,
        names: Sequence[str],
        metric: str,
        direction: Direction,
        journal: Journal | None = None,
        *,
        on_stop: OnStop | None = None,
        is_finished: Callable[[str], bool] = lambda name: False,
        is_ending: Callable[[], bool] = lambda: False,
        concurrent: int | None = None,
    ) -> None:
        super().__init__()
        self._supports_buffered_results = False
        self.rule, self.compared, self.direction = rule, metric, direction
        self.journal = journal or Journal(None)
        self.on_stop, self.done, self.is_ending = on_stop, is_finished, is_ending
        self.limit: Callable[[], int] = lambda: concurrent or len(names)
        self.seats: dict[str, Seat] = {}
        self.desk = Desk(self)
        self.left: Counter[str] = Counter()
        for name in names:
            self._seat(name)

    @property
    def metric(self) -> None:
        """None: Tune would end the sweep with the first round that lacks the metric."""

    @property
    def pauses(self) -> bool:
        """Whether trials wait for each other."""
        return self.rule.pauses

    # ── earlier sessions
    # ─────────────────────────────────────────────────────────────────────────────────────────

    def recall(self, names: Iterable[str]) -> None:
        """Judge the reports of earlier sessions again.

        Args:
            names: trials whose directories are there; what is known of others is forgotten.
        """
        names, lines = list(names), self.journal.keep(names)
        self.left = Counter(line["trial"] for line in lines)
        for line in lines:
            self.left[line["trial"]] -= 1
            seat = self._seat(line["trial"])
            if seat.is_finished():
                continue
            if "ended" in line:
                self._end(seat, line["ended"])
            elif self._judge(seat, line[ROUND], line["value"]) == STOP:
                self._stop(seat)  # the driver may have been killed before it could
        for name in names:
            seat = self.seats[name]
            if self.done(name) and not seat.is_finished():
                self._end(seat, "TERMINATED")

    # ── Tune's calls
    # ──────────────────────────────────────────────────────────────────────────────────────────────

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Let a trial take its seat."""
        seat = self._seat(trial.config["name"])
        if seat.status == "ERROR":  # resume tries it again
            seat.status = "PENDING"
            self.rule.on_trial_add(self.desk, seat)
        seat.trial = trial

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Decide whether a trial continues after a report."""
        self.desk.controller = tune_controller
        seat = self.seats[trial.config["name"]]
        if seat.is_finished():
            return str(STOP)
        if self.is_ending():
            return str(CONTINUE)
        if result.get(ASKS):
            return self._answer(seat)
        if self.compared not in result or result[ROUND] <= seat.round:  # Tune repeats the last one at the end
            return str(CONTINUE)
        value = result[self.compared]
        self.journal.add(seat.name, round=result[ROUND], value=_plain(value))
        decision = self._judge(seat, result[ROUND], value)
        if decision == STOP:
            self._stop(seat)
        elif self.done(seat.name):  # it need not wait for others
            seat.status, decision = "RUNNING", CONTINUE
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        """Take leave of a trial that has all its rounds; one that was interrupted keeps its place."""
        self._leave(tune_controller, trial, "TERMINATED")

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Take leave of a trial that ended while it did not run."""
        self._leave(tune_controller, trial, "TERMINATED")

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Take leave of a trial that failed for good."""
        self._leave(tune_controller, trial, "ERROR")

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Return a trial that has not begun, or else a paused one that need not wait any longer."""
        present = [seat for seat in self.seats.values() if seat.trial is not None]
        for seat in present:
            if seat.trial.status == "PENDING":
                return seat.trial
        if not self.has_room():
            return None
        for seat in present:
            if seat.trial.status == "PAUSED" and seat.status == "PAUSED" and self.rule.may_go_on(seat):
                return seat.trial
        return None

    def has_room(self) -> bool:
        """Tell whether one more trial may run."""
        trials = [seat.trial for seat in self.seats.values() if seat.trial is not None]
        return sum(trial.status in ("PENDING", "RUNNING") for trial in trials) < self.limit()

    # ── decisions
    # ──────────────────────────────────────────────────────────────────────────────────────────────

    def _seat(self, name: str) -> Seat:
        """Return the seat of a trial, a new one where it has none."""
        if name not in self.seats:
            self.seats[name] = Seat(name)
            self.rule.on_trial_add(self.desk, self.seats[name])
        return self.seats[name]

    def _judge(self, seat: Seat, round: int, value: float | None) -> str:
        seat.round, seat.status = round, "RUNNING"
        result = {ROUND: round, WORTH: max(WORST, worth(value, self.direction))}
        decision: str = self.rule.on_trial_result(self.desk, seat, result)
        seat.status = "PAUSED" if decision == PAUSE else "RUNNING"
        return decision

    def _answer(self, seat: Seat) -> str:
        """Answer a trial that asks whether it may train."""
        if seat.status == "PAUSED" and not self.rule.may_go_on(seat):
            return str(PAUSE)
        seat.status = "RUNNING"
        return str(CONTINUE)

    def _stop(self, seat: Seat) -> None:
        """Note that the rule has stopped a trial.

        A trial with later reports was not stopped then: others that it was compared with are gone.
        """
        if self.left[seat.name]:
            return
        seat.status = "TERMINATED"
        if self.on_stop is not None:
            self.on_stop(seat.name, seat.round)

    def _end(self, seat: Seat, status: str) -> None:
        """Tell the rule that a trial is at its end."""
        seat.status = status
        if status == "ERROR":
            self.rule.on_trial_error(self.desk, seat)
        else:
            self.rule.on_trial_complete(self.desk, seat, {})

    def _leave(self, controller: Any, trial: Any, status: str) -> None:
        seat = self.seats[trial.config["name"]]
        self.desk.controller = controller
        if self.is_ending() or seat.status == "ERROR":
            return
        stopped = seat.status == "TERMINATED"
        if not stopped:
            if status != "ERROR" and not self.done(seat.name):
                return
            self.journal.add(seat.name, ended=status)
        self._end(seat, status)


class Desk:
    """Tune's controller as the rule sees it: of seats."""

    search_alg = None

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.controller: Any = None

    def get_trials(self) -> list[Seat]:
        """Return all seats."""
        return list(self.judge.seats.values())

    def get_live_trials(self) -> list[Seat]:
        """Return the seats of trials that are not at their end."""
        return [seat for seat in self.get_trials() if not seat.is_finished()]

    def stop_trial(self, seat: Seat) -> None:
        """Stop a paused trial."""
        self.judge._stop(seat)
        if not seat.is_finished():
            self.judge.rule.on_trial_complete(self, seat, {})
        elif seat.trial is not None and self.controller is not None:
            self.controller.stop_trial(seat.trial)  # which ends in `_leave`
        else:
            self.judge._end(seat, "TERMINATED")


def _plain(value: Any) -> float | None:
    """Return a number as JSON has it: NaN and infinities, which are worth the same, as null."""
    text = json.dumps(value)
    return None if text in ("NaN", "Infinity", "-Infinity", "null") else float(value)
