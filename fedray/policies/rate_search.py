"""FRLP's decision process: which pruning rate, one step up or down at a time.

`RateSearch` is the paper's process as a plain object. States are steps of the pruning rate above the best
sampled rate; the episode ends where the learning distance has grown by a set ratio. The server's solvers
(`fedray.policies.line_search`) and the environment that an agent is trained in step this very object.

    search = RateSearch(now, stop, distance)
    state = search.start()
    while not search.is_done:
        state, reward, done = search.step(action)      # 0: increase the rate, 1: decrease it
    search.density(search.settled)

Source: Nie et al., "Distributed model pruning by federated reinforcement learning", CSA 33(5), 2024, section
    on RGP: eq. 4 (end of an episode) and eq. 5 (reward).
"""

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from math import isinf
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedray.comparing import as_loss
from fedray.errors import MethodError
from fedray.policies.trained import PolicyInterface

PROCESS = "rate_search"
"""Name of the process among trained policies."""
OBSERVATION_VERSION = 1
"""Raise it when `RateSearch.observation` changes its meaning: older policies are then refused."""
FEATURES = 1

MOVES = {"increase": 1, "decrease": -1}
"""The actions: the sign of a step of the pruning rate. Their order is the order of a policy's outputs."""

ACTIONS = tuple(MOVES)
"""Names of the actions, by index."""

INTERFACE = PolicyInterface(PROCESS, OBSERVATION_VERSION, FEATURES, ACTIONS)

Outcome = Literal["end", "above", "below", "step limit"]
"""Why an episode is over: an end state, out of the range on either side, or too many steps."""


class RateSearch:
    """The search for a density in one pruning event.

    In the paper's words: rates `p = 1 − density` are sampled over the single-shot range, the one with the
    smallest learning distance is `p_0` (state 0), state s is the rate `p_0 + s·step`, and a state is
    an end where |D(p)/D(p_0) − y| < ε.

    Args:
        now: density before the event, in (0, 1].
        stop: lowest density that the event may reach, below `now`.
        distance: density → learning distance D of the model pruned to it and fine-tuned; called once per
            density, in [stop, now]. NaN (the fine-tuning diverged) counts as infinitely far.
        samples: K, the number of equally spaced rates that are tried for p_0, both ends included; ≥ 2.
        step: width of a state in rate.
        ratio: y, the growth of the distance at an end.
        tolerance: ε.

    Attributes:
        outcome: why the episode is over; None before its end.
        state: of the episode now.

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
        self.step_width, self.ratio, self.tolerance = step, ratio, tolerance
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
        self.start()

    # ── the curve ────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def limit(self) -> int:
        """The last state (the paper's uplimit)."""
        return max(0, round((self.end_rate - self.start_rate) / self.step_width))

    @property
    def evaluations(self) -> int:
        """Number of models that were pruned and fine-tuned so far."""
        return len(self._seen)

    def density(self, state: int) -> float:
        """Return the density of a state."""
        return self._density(self._rate(state))

    def growth(self, state: int) -> float:
        """Return D(p)/D(p_0) at a state."""
        start = self._at(self.start_rate)
        return self._at(self._rate(state)) / start if start > 0 else 1.0

    def is_end(self, state: int) -> bool:
        """Whether a state is in the window around the ratio."""
        return abs(self.growth(state) - self.ratio) < self.tolerance

    def is_below(self, state: int) -> bool:
        """Whether a state lies below that window: the search continues upwards."""
        return self.growth(state) - self.ratio <= -self.tolerance

    @property
    def looks_monotone(self) -> bool:
        """Whether the sampled distances never fall from the best rate on."""
        curve = [d for rate, d in self.samples.items() if rate >= self.start_rate]
        return all(a <= b for a, b in pairwise(curve))

    # ── the episode ──────────────────────────────────────────────────────────────────────────────────────

    def start(self, stride: int = 1) -> int:
        """Begin an episode at state 0, and return that state.

        Args:
            stride: states that an action moves by; 1 is the paper's step.
        """
        self.state, self._stride, self._steps = 0, stride, 0
        self.outcome: Outcome | None = None
        return self.state

    def step(self, action: int) -> tuple[int, float, bool]:
        """Move by an action of ACTIONS.

        Returns:
            The state (beyond the range if the action has left it), the reward of eq. 5 (−1 out of the range,
            1 at an end, and elsewhere 0.5 for a step up, −0.5 for a step down), and whether the episode is
            over. It also ends after `step_limit` steps: an agent that has jumped over the window may
            otherwise walk up and down for ever.
        """
        up = MOVES[ACTIONS[action]]
        self.state += up * self._stride
        self._steps += 1
        if not 0 <= self.state <= self.limit:
            self.outcome = "above" if self.state > self.limit else "below"
            return self.state, -1.0, True
        if self.is_end(self.state):
            self.outcome = "end"
            return self.state, 1.0, True
        if self._steps >= self.step_limit:
            self.outcome = "step limit"
        return self.state, 0.5 * up, self.is_done

    @property
    def step_limit(self) -> int:
        """Steps after which an episode ends: twice as many as lead through the range."""
        return max(1, 2 * -(-self.limit // self._stride))

    @property
    def is_done(self) -> bool:
        """Whether the episode is over."""
        return self.outcome is not None

    @property
    def settled(self) -> int:
        """The episode's answer: its end state, state 0 if it left below, or else the last state.

        A line search that finds no end settles on the last state, too.
        """
        if self.outcome == "end":
            return self.state
        return 0 if self.outcome == "below" else self.limit

    def observation(self, state: int) -> NDArray[np.float32]:
        """Return the agent's observation of a state: the share of the range below it, in [0, 1].

        It says nothing of the model or its data, so that one agent serves all.

        Returns:
            Shape (FEATURES,).
        """
        share = state / self.limit if self.limit else 0.0
        return np.array([min(1.0, max(0.0, share))], dtype=np.float32)

    # ── distances, each once ─────────────────────────────────────────────────────────────────────────────

    def _rate(self, state: int) -> float:
        return self.end_rate if state >= self.limit else self.start_rate + state * self.step_width

    def _density(self, rate: float) -> float:
        # rounded, so that one rate reached by two sums is one candidate; 1 − (1 − now) may lie beside `now`
        return min(self.now, max(self.stop, 1 - round(rate, 9)))

    def _at(self, rate: float) -> float:
        density = self._density(rate)
        if density not in self._seen:
            self._seen[density] = as_loss(self._distance(density))
        return self._seen[density]
