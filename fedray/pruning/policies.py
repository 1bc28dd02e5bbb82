"""Who decides the pruning rate: FRLP's decision process and what solves it.

`RateSearch` is the paper's process as a plain object: states are steps of the pruning rate above the best
sampled rate, and the episode ends where the learning distance has grown by a set ratio. `solve` walks it. The
line searches `scan` and `bisect` are here; a trained agent steps the same object, and takes its place in
SOLVERS beside them.

Source: Nie et al., "Distributed model pruning by federated reinforcement learning", CSA 33(5), 2024, section
    on RGP.
"""

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from math import inf, isinf, isnan
from typing import Literal

from fedray.errors import ConfigError, MethodError, unknown

Solver = Literal["scan", "bisect"]


class RateSearch:
    """The search for a density in one pruning event.

    In the paper's words: rates `p = 1 − density` are sampled over the single-shot range, the one with the
    smallest learning distance is `p_0` (state 0), state s stands for the rate `p_0 + s·step`, and a state is
    an end where |D(p)/D(p_0) − y| < ε.

    Args:
        now: density before the event, in (0, 1].
        stop: lowest density that the event may reach, below `now`.
        distance: density → learning distance D of the model pruned to it and fine-tuned; called once per
            density, which lies in [stop, now]. NaN (the fine-tuning diverged) counts as infinitely far.
        samples: K, how many equally spaced rates are tried for p_0, both ends in; ≥ 2.
        step: width of a state in rate.
        ratio: y, the growth of the distance that is looked for.
        tolerance: ε.

    Raises:
        MethodError: if no sampled rate has a finite distance.
    """

    def __init__(
        self,
        now: float,
        stop: float,
        distance: Callable[[float], float],
        *,
        samples: int = 6,
        step: float = 0.0005,
        ratio: float = 1.05,
        tolerance: float = 0.015,
    ) -> None:
        self.now, self.stop = now, stop
        self.step, self.ratio, self.tolerance = step, ratio, tolerance
        self._distance, self._seen = distance, dict[float, float]()
        rates = [(1 - now) + i * (now - stop) / (samples - 1) for i in range(samples)]
        self.samples = {rate: self._at(rate) for rate in rates}
        self.start_rate = min(self.samples, key=lambda rate: self.samples[rate])
        self.end_rate = rates[-1]
        if isinf(self.samples[self.start_rate]):
            raise MethodError(
                f"no candidate between density {stop:g} and {now:g} has a finite learning distance: "
                f"fine-tuning diverged at all {samples} sampled rates; lower the learning rate"
            )

    @cached_property
    def limit(self) -> int:
        """The last state (the paper's uplimit)."""
        return max(0, round((self.end_rate - self.start_rate) / self.step))

    @property
    def evaluations(self) -> int:
        """How many models were pruned and fine-tuned so far."""
        return len(self._seen)

    def density(self, state: int) -> float:
        """Return the density that a state stands for."""
        return self._density(self._rate(state))

    def growth(self, state: int) -> float:
        """Return D(p)/D(p_0) at a state."""
        start = self._at(self.start_rate)
        return self._at(self._rate(state)) / start if start > 0 else 1.0

    def is_end(self, state: int) -> bool:
        """Tell whether a state lies in the window around the ratio."""
        return abs(self.growth(state) - self.ratio) < self.tolerance

    def is_below(self, state: int) -> bool:
        """Tell whether a state lies below that window: the search has to go on upwards."""
        return self.growth(state) - self.ratio <= -self.tolerance

    @property
    def looks_monotone(self) -> bool:
        """Whether the sampled distances never fall from the best rate on."""
        curve = [d for rate, d in self.samples.items() if rate >= self.start_rate]
        return all(a <= b for a, b in pairwise(curve))

    def _rate(self, state: int) -> float:
        return self.end_rate if state >= self.limit else self.start_rate + state * self.step

    def _density(self, rate: float) -> float:
        # rounded, so that one rate reached by two sums is one candidate; 1 − (1 − now) may lie beside `now`
        return min(self.now, max(self.stop, 1 - round(rate, 9)))

    def _at(self, rate: float) -> float:
        density = self._density(rate)
        if density not in self._seen:
            distance = self._distance(density)
            self._seen[density] = inf if isnan(distance) else distance
        return self._seen[density]


def scan(search: RateSearch, stride: int = 10) -> int:
    """Return the first end state, walking up from state 0 by `stride` states; the last state if there is
    none.

    Without noise this is the optimal policy of the paper's process: "always increase".
    """
    walk = range(0, search.limit, stride)
    return next((state for state in walk if search.is_end(state)), search.limit)


def bisect(search: RateSearch, stride: int = 10) -> int:
    """Return the same state as `scan` with stride 1 where the distance is monotone, in ⌈log2 limit⌉
    evaluations.

    Falls back to `scan` where the samples are not monotone, or where the curve jumps over the window.
    """
    if not search.looks_monotone:
        return scan(search, stride)
    if search.is_below(search.limit):
        return search.limit
    below, above = -1, search.limit  # state −1 stands for "below", and is never looked at
    while above - below > 1:
        middle = (below + above) // 2
        if search.is_below(middle):
            below = middle
        else:
            above = middle
    return above if search.is_end(above) else scan(search, stride)


SOLVERS: dict[str, Callable[[RateSearch, int], int]] = {"scan": scan, "bisect": bisect}


def solve(search: RateSearch, solver: str, stride: int = 10) -> float:
    """Return the density that a solver settles on.

    Raises:
        ConfigError: if the solver is unknown.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"method.solver: {unknown('solver', solver, SOLVERS)}")
    return search.density(SOLVERS[solver](search, stride))
