"""ASHA for resumable sweeps: NaN is the worst value, and a resumed sweep restores the rungs.

    scheduler = Rungs(tune.metric, tune.direction, ...)
    scheduler.recall("00-lr=0.1", rounds)     # a trial's rounds from before, finished, stopped or interrupted
    tune.Tuner(..., scheduler=scheduler)

Ray's scheduler does the halving; its rungs know trials by their names, which a resumed sweep keeps.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.schedulers import ASHAScheduler

from fedray.comparing import worth
from fedray.types import Direction

WORST = -1e300
"""Worth of a diverged trial at a rung: finite, since Ray interpolates between the values of a rung."""

OnStop = Callable[[str, int], None]
"""Called with the trial that ASHA stops, and the round."""


@dataclass(frozen=True)
class Named:
    """A trial as the rungs know it."""

    trial_id: str


class Rungs(ASHAScheduler):  # type: ignore[misc]  # Ray has no types
    """ASHA over rounds.

    Args:
        metric: the compared metric; a round without it decides nothing.
        direction: whether more of it is better.
        first: round of the first rung.
        last: round of the longest trial.
        reduction: one trial in this many is kept at each rung.
        on_stop: called when a trial is stopped before its last round.
    """

    def __init__(
        self,
        metric: str,
        direction: Direction,
        *,
        first: int,
        last: int,
        reduction: int,
        on_stop: OnStop | None = None,
    ) -> None:
        super().__init__(
            time_attr="round",
            metric=metric,
            mode="max",  # of worths
            max_t=last,
            grace_period=first,
            reduction_factor=reduction,
        )
        self.compared, self.direction, self.on_stop = metric, direction, on_stop

    @property
    def metric(self) -> None:
        """None: Tune would end the sweep with the first round that lacks the metric."""

    def recall(self, name: str, rounds: Iterable[Mapping[str, Any]]) -> None:
        """Record a trial's earlier rounds at the rungs, in the order in which they were reported.

        Args:
            name: of the trial.
            rounds: `round` and metrics of each, as in `rounds.jsonl`, ascending.
        """
        (bracket,) = self._brackets
        for line in rounds:
            if self.compared in line:
                bracket.on_result(Named(name), line["round"], self._worth(line))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Let a trial compete."""
        super().on_trial_add(tune_controller, _named(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """Decide whether a trial continues after a round."""
        decision: str = super().on_trial_result(tune_controller, _named(trial), self._compared(result))
        if decision == self.STOP and self.on_stop is not None:
            self.on_stop(trial.config["name"], result["round"])
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> None:
        """Record the last result of a trial that ended by itself."""
        super().on_trial_complete(tune_controller, _named(trial), self._compared(result))

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that never ran."""
        super().on_trial_remove(tune_controller, _named(trial))

    def _compared(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Return a result as Ray compares it."""
        if self.compared not in result:
            return dict(result)
        return {**result, self.compared: self._worth(result)}

    def _worth(self, result: Mapping[str, Any]) -> float:
        return max(WORST, worth(result[self.compared], self.direction))


def _named(trial: Any) -> Named:
    return Named(trial.config["name"])
