"""Solvers of FRLP's decision process: they choose the pruning rate.

`solve` walks a `RateSearch` with a solver, by its name: the line searches `scan` and `bisect`, or `dqn`, a
trained agent.

Source: Nie et al., "Distributed model pruning by federated reinforcement learning", CSA 33(5), 2024, section
    on RGP. The line searches are ours: without noise the optimal agent does the same.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedray.errors import ConfigError, unknown
from fedray.policies.rate_search import INTERFACE, RateSearch
from fedray.policies.trained import TrainedPolicy

LineSearch = Literal["scan", "bisect"]
Solver = Literal["dqn", LineSearch]
"""Names of what can solve the process."""

SOLVERS: tuple[Solver, ...] = get_args(Solver)

Agent = Callable[[NDArray[np.float32]], int]
"""Observation (FEATURES,) → index of an action."""


def scan(search: RateSearch, stride: int = 10) -> int:
    """Return the first end state, walking up from state 0 by `stride` states; the last state if there is
    none.

    Without noise this is the optimal policy of the paper's process: "always increase".
    """
    walk = range(0, search.limit, stride)
    return next((state for state in walk if search.is_end(state)), search.limit)


def bisect(search: RateSearch, stride: int = 10) -> int:
    """Return the first end state where the distance never falls, in ⌈log2 limit⌉ evaluations.

    That is the state of `scan` with stride 1. Where the distance falls between two samples, it is an end
    state, but not always the first. Falls back to `scan` where the samples fall, or where the curve jumps
    over the window.
    """
    if not search.looks_monotone:
        return scan(search, stride)
    if search.is_below(search.limit):
        return search.limit
    below, above = -1, search.limit  # state −1 means "below"; its distance is never computed
    while above - below > 1:
        middle = (below + above) // 2
        if search.is_below(middle):
            below = middle
        else:
            above = middle
    return above if search.is_end(above) else scan(search, stride)


def walk(search: RateSearch, agent: Agent, stride: int = 10) -> int:
    """Return the state on which an agent settles, moving `stride` states at a time from state 0.

    An agent that always increases visits the states of `scan` with this stride, and settles on the same one.
    """
    state = search.start(stride)
    if search.limit == 0 or search.is_end(state):
        return state
    while not search.is_done:
        state, _, _ = search.step(agent(search.observation(state)))
    return search.settled


LINE_SEARCHES: dict[str, Callable[[RateSearch, int], int]] = {"scan": scan, "bisect": bisect}


def solve(search: RateSearch, solver: str, stride: int = 10, policy: Path | None = None) -> float:
    """Return the density that a solver settles on.

    Args:
        search: the process.
        solver: a name of SOLVERS.
        stride: states that `scan` and `dqn` advance at a time.
        policy: folder of the agent for `dqn`; None: the shipped agent.

    Raises:
        ConfigError: if the solver is unknown, or the policy cannot be used.
    """
    if solver == "dqn":
        agent = TrainedPolicy.load(policy, INTERFACE)
        return search.density(walk(search, agent.act, stride))
    if solver not in LINE_SEARCHES:
        raise ConfigError(f"method.solver: {unknown('solver', solver, SOLVERS)}")
    return search.density(LINE_SEARCHES[solver](search, stride))
