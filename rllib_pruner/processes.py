"""The decision processes that an agent can be trained for.

A process says what RLlib trains in, and judges a greedy policy on problems that training never sees. Its
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
        """Make what training needs and what is not there yet, e.g. logs; go on with what was begun.

        Args:
            say: takes a line for whoever waits.
        """
        ...

    def environment(self) -> tuple[type[gymnasium.Env[Any, Any]], dict[str, Any]]:
        """Return an environment's class, and the config that RLlib gives it."""
        ...

    def judge(self, acts: Acts) -> dict[str, float]:
        """Return measures of a greedy policy on held-out problems; `score` is the one to be large."""
        ...

    def good_enough(self, measures: Mapping[str, float]) -> bool:
        """Tell from what `judge` returned whether training may stop."""
        ...


@dataclass(frozen=True, kw_only=True)
class RateSearchProcess:
    """FRLP's rate search, on made-up curves.

    Args:
        states: of the range in training; 100 is what a walk of FRLP's default `stride` sees.
        families: weight of each family of curves in training.
        problems: held-out curves of each family that a policy is judged on.
        enough: share of them on which the policy must settle where the line search does.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    interface: ClassVar[PolicyInterface] = rate_search.INTERFACE

    states: Annotated[int, Field(ge=2)] = 100
    families: dict[Family, NonNegativeFloat] = field(default_factory=lambda: dict.fromkeys(FAMILIES, 1.0))
    problems: PositiveInt = 100
    enough: Annotated[float, Field(gt=0, le=1)] = 1.0

    def prepare(self, say: Callable[[str], None]) -> None:
        """Nothing: curves are made as they are needed."""

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
            wanted = np.array([search.density(scan(search)) for search in searches])
            measures[f"agreement/{family}"] = float(np.mean(found == wanted))
            measures[f"gap/{family}"] = float(np.mean(np.abs(found - wanted)))
        measures["score"] = float(np.mean([measures[f"agreement/{family}"] for family in FAMILIES]))
        return measures

    def good_enough(self, measures: Mapping[str, float]) -> bool:
        """Whether the policy is the line search on as many curves as asked."""
        return measures["score"] >= self.enough


def walk_together(searches: Sequence[RateSearch], acts: Acts, stride: int = 10) -> None:
    """Walk many searches to their ends, asking for all actions of a step at once."""
    for search in searches:
        search.start(stride)
    going = [search for search in searches if not search.is_done]
    while going:
        actions = acts(np.stack([search.observation(search.state) for search in going]))
        for search, action in zip(going, actions, strict=True):
            search.step(int(action))
        going = [search for search in going if not search.is_done]


PROCESSES: dict[str, type[Any]] = {kind.interface.process: kind for kind in (RateSearchProcess, StageProcess)}
