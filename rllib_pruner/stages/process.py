"""The stage process for training: in a replay of logged federations, or in real ones."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import gymnasium
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from fedray.policies.observation import INTERFACE
from fedray.policies.trained import PolicyInterface
from fedray.types import LocalPath, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from rllib_pruner.stages import logs
from rllib_pruner.stages.env import StageEnv
from rllib_pruner.stages.federations import Federations
from rllib_pruner.stages.replay import ReplayEnv

HELD_OUT = 900_000_000
"""Seed of the first held-out federation; logs have smaller seeds."""


@dataclass(frozen=True, kw_only=True)
class StageProcess:
    """Pruning at the stages of a federated run.

    Args:
        federations: distribution of the federations.
        replay: train in the replay of logged federations, not in real ones.
        log: folder of the logged episodes; missing ones are played before the training.
        episodes: of the log.
        first: seed of the first federation.
        neighbours: number of similar stages in the log; the replay follows one of them.
        flops_weight: price of the dense model's FLOPs, relative to its traffic.
        problems: held-out federations for the evaluation, at each of `preferences`.
        preferences: λ of the evaluation.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    interface: ClassVar[PolicyInterface] = INTERFACE

    federations: Federations = field(default_factory=Federations)
    replay: bool = True
    log: LocalPath = field(default_factory=lambda: Path("runs/stage_log").resolve())
    episodes: PositiveInt = 800
    first: NonNegativeInt = 0
    neighbours: PositiveInt = 4
    flops_weight: NonNegativeFloat = 0.25
    problems: PositiveInt = 8
    preferences: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.03, 0.1, 0.3)

    def prepare(self, say: Callable[[str], None]) -> None:
        """Play the episodes that the log lacks, where training is by replay."""
        if not self.replay:
            return
        for done in logs.collect(self.log, asdict(self.federations), self.episodes, self.first):
            say(f"{min(done, self.episodes):,} of {self.episodes:,} federations are logged in {self.log}")

    def environment(self) -> tuple[type[gymnasium.Env[Any, Any]], dict[str, Any]]:
        """Return ReplayEnv or StageEnv, and its config."""
        common = {"flops_weight": self.flops_weight}
        if not self.replay:
            return StageEnv, common | {"federations": asdict(self.federations)}
        return ReplayEnv, common | {"log": str(self.log.resolve()), "neighbours": self.neighbours}

    def judge(self, acts: Callable[[NDArray[np.float32]], NDArray[np.int64]]) -> dict[str, float]:
        """Play held-out federations.

        Returns:
            For each λ `accuracy/λ`, `bytes/λ` (share of the dense model's) and `return/λ`, means over the
            federations; `score` is the mean return: final accuracy − λ · (bytes + flops_weight · FLOPs).
        """

        def choose(_: int, seen: NDArray[np.float32]) -> int:
            return int(acts(seen[None])[0])

        return evaluate(self, choose)

    def good_enough(self, measures: Mapping[str, float]) -> bool:
        """Never: the best return is not known."""
        return False


def evaluate(process: StageProcess, choose: logs.Choose) -> dict[str, float]:
    """Evaluate a policy on the held-out federations; the result is that of `StageProcess.judge`."""
    env = StageEnv({"federations": asdict(process.federations), "flops_weight": process.flops_weight})
    measures: dict[str, float] = {}
    returns = []
    for preference in process.preferences:
        ends = [
            logs.play(env, HELD_OUT + number, choose, preference)[-1] for number in range(process.problems)
        ]
        costs = [end["spent_bytes"] + process.flops_weight * end["spent_flops"] for end in ends]
        at_this = [end["accuracy"] - preference * cost for end, cost in zip(ends, costs, strict=True)]
        measures[f"accuracy/{preference:g}"] = float(np.mean([end["accuracy"] for end in ends]))
        measures[f"bytes/{preference:g}"] = float(np.mean([end["spent_bytes"] for end in ends]))
        measures[f"return/{preference:g}"] = float(np.mean(at_this))
        returns += at_this
    return measures | {"score": float(np.mean(returns))}
