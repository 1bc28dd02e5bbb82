"""`tune.stop:` targets at which a trial ends as finished; whether a sweep's trials can reach them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from fedray.types import Direction, direction_of

ROUND = "round"
SHARES = ("accuracy", "density/")
"""Parts of the names of metrics between 0 and 1."""


def sense(metric: str, direction: Direction | None) -> Direction | None:
    """Return whether a target is reached from below (`max`) or from above (`min`).

    Rounds and totals only grow, so that a target of them is a limit.
    """
    return "max" if metric == ROUND or metric.startswith("total/") else direction


@dataclass
class Targets:
    """The targets of a trial. It ends after an evaluated round in which, or before which, it reached one.

    Args:
        stop: metric, or `round` → target.
        direction: returns the better direction of a metric.
        every: rounds between evaluations.
    """

    stop: Mapping[str, float]
    direction: Callable[[str], Direction | None] = direction_of
    every: int = 1
    reached: str | None = None

    def __call__(self, round: int, metrics: Mapping[str, Any]) -> str | None:
        """Return the reason why the trial ends with this round; None: it continues. Round 0 ends none."""
        if round and self.reached is None:
            self.reached = next(self._reached({**metrics, ROUND: round}), None)
        return self.reached if round % self.every == 0 else None

    def _reached(self, metrics: Mapping[str, Any]) -> Iterator[str]:
        for metric, target in self.stop.items():
            value = metrics.get(metric)
            if value is None or not isfinite(value):
                continue
            more = sense(metric, self.direction(metric)) == "max"
            if value >= target if more else value <= target:
                yield f"{metric} {value:.4g} {'≥' if more else '≤'} {target:.6g}"


def target_problems(stop: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the problems of targets that do not depend on the points."""
    for metric, target in stop.items():
        key = f"tune.stop.{metric}"
        if not isfinite(target):
            yield key, f"got {target}; must be a finite number"
        elif metric == ROUND and (target < 1 or target != int(target)):
            yield key, f"got {target:g}; must be a whole number of at least 1"
        elif any(part in metric for part in SHARES) and not 0 <= target <= 1:
            yield key, f"got {target:g}; {metric} is a share between 0 and 1"


def round_problems(target: float, rounds: Sequence[int], every: int) -> Iterator[tuple[str, str]]:
    """Yield why a target round ends no trial, or none that is evaluated.

    Args:
        target: the round.
        rounds: planned rounds of each trial.
        every: all trials are evaluated together every so many rounds.
    """
    if target > max(rounds):
        yield "tune.stop.round", f"{target:g} is more than the {max(rounds)} rounds of the longest trial"
    elif target % every and target != max(rounds):
        lower = int(target // every * every)
        near = [number for number in (lower, lower + every) if 0 < number <= max(rounds)]
        yield (
            "tune.stop.round",
            f"got {target:g}, but rounds are evaluated every {every} (eval_every); "
            f"{' or '.join(map(str, near or [max(rounds)]))} would do",
        )
