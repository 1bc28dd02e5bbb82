"""The decision processes that an agent can be trained for.

A process gives RLlib an environment and judges a greedy policy on problems that training never sees. Its
dataclass fields are its options in a config: `process: {name: rate_search, states: 100}`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Protocol

import gymnasium
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from fedray.policies import rate_search
from fedray.policies.line_search import scan
from fedray.policies.rate_search import RateSearch
from fedray.policies.trained import PolicyInterface
from fedray.types import NonNegativeFloat, PositiveInt
from rllib_pruner.rate_search.curves import FAMILIES, SPAN, Family, held_out
from rllib_pruner.rate_search.env import RateSearchEnv
from rllib_pruner.stages.process import StageProcess

Acts = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""Observations (n, features) → greedy actions (n,)."""


class Process(Protocol):
    """A decision process that an agent can be trained for.

    Attributes:
        interface: name, observations and actions; written to `policy.json`.
    """

    interface: ClassVar[PolicyInterface]

    def prepare(self, say: Callable[[str], None]) -> None:
        """Make missing inputs of the training, e.g. logs; continue what an earlier call began.

        Args:
            say: called with a line of progress.
        """
        ...

    def environment(self) -> tuple[type[gymnasium.Env[Any, Any]], dict[str, Any]]:
        """Return the environment's class and its config."""
        ...

    def judge(self, acts: Acts) -> dict[str, float]:
        """Return measures of a greedy policy on held-out problems; a larger `score` is better."""
        ...

    def good_enough(self, measures: Mapping[str, float]) -> bool:
        """Whether training may stop, given the result of `judge`."""
        ...


@dataclass(frozen=True, kw_only=True)
class RateSearchProcess:
    """FRLP's rate search, on synthetic curves.

    Args:
        states: of the range in training; a walk with FRLP's default `stride` has 100.
        families: weight of each family of curves in training.
        problems: held-out curves of each family for the evaluation.
        enough: share of them on which the policy must settle on the rate of the line search.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    interface: ClassVar[PolicyInterface] = rate_search.INTERFACE

    states: Annotated[int, Field(ge=2)] = 100
    families: dict[Family, NonNegativeFloat] = field(default_factory=lambda: dict.fromkeys(FAMILIES, 1.0))
    problems: PositiveInt = 100
    enough: Annotated[float, Field(gt=0, le=1)] = 1.0

    def prepare(self, say: Callable[[str], None]) -> None:
        """Do nothing: the environment draws its curves."""

    def environment(self) -> tuple[type[gymnasium.Env[Any, Any]], dict[str, Any]]:
        """Return RateSearchEnv and its config."""
        return RateSearchEnv, {"states": self.states, "families": dict(self.families)}

    def judge(self, acts: Acts) -> dict[str, float]:
        """Compare with `scan` at the paper's step and FRLP's default stride.

        Returns:
            For each family `agreement/<family>`, the share of curves on which both settle on one rate, and
            `gap/<family>`, the mean difference of the rates; `score` is the mean agreement.
        """
        measures: dict[str, float] = {}
        for family in FAMILIES:
            curves = held_out(family, self.problems)
            walked = [RateSearch(1.0, 1 - SPAN, curve) for curve in curves]
            walk_together(walked, acts)
            found = np.array([search.density(search.settled) for search in walked])
            searches = [RateSearch(1.0, 1 - SPAN, curve) for curve in curves]
            optimal = np.array([search.density(scan(search)) for search in searches])
            measures[f"agreement/{family}"] = float(np.mean(found == optimal))
            measures[f"gap/{family}"] = float(np.mean(np.abs(found - optimal)))
        measures["score"] = float(np.mean([measures[f"agreement/{family}"] for family in FAMILIES]))
        return measures

    def good_enough(self, measures: Mapping[str, float]) -> bool:
        """Whether the policy settles where the line search does on the share `enough` of curves."""
        return measures["score"] >= self.enough


def walk_together(searches: Sequence[RateSearch], acts: Acts, stride: int = 10) -> None:
    """Walk many searches to their ends, with one call of the policy for all actions of a step."""
    for search in searches:
        search.start(stride)
    active = [search for search in searches if not search.is_done]
    while active:
        actions = acts(np.stack([search.observation(search.state) for search in active]))
        for search, action in zip(active, actions, strict=True):
            search.step(int(action))
        active = [search for search in active if not search.is_done]


PROCESSES: dict[str, type[Any]] = {kind.interface.process: kind for kind in (RateSearchProcess, StageProcess)}
