"""`StageEnv`: an episode is a federated run, a step is a stage of rounds.

It steps the very hooks that a run with `method.name=staged method.policy=agent` goes through: a stage's
situation and what an action does are `Staged.look` and `Staged.act`. Only who chooses differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from fedray.data.datasets import Examples
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.method import ServerContext
from fedray.federation.server import Server
from fedray.methods.staged import Staged, StagedMemory, made
from fedray.policies import observation, stages
from fedray.policies.observation import FEATURES, PREFERENCES, Situation
from fedray.policies.situation import look, travelled
from fedray.policies.stages import ACTIONS
from fedray.types import ServerState
from rllib_pruner.stages.federations import Federations, server_of


@dataclass(frozen=True)
class Paused(StagedMemory):
    """What `Staged` remembers, and what its decision after the last round would have seen."""

    cohort: CohortUpdate | None = None
    ctx: ServerContext | None = None


@dataclass(frozen=True, kw_only=True)
class PausedStaged(Staged):
    """`Staged` that leaves its decisions to whoever steps the environment."""

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        """Move nothing; keep what a decision would see."""
        journey = travelled(state.memory.journey, state, cohort, ctx)
        return replace(state, memory=Paused(state.memory.stages, journey, state.memory.done, cohort, ctx))


@dataclass
class Episode:
    """One federated run, from decision to decision.

    Args:
        server: of a federation whose method is `PausedStaged`.
    """

    server: Server

    def begin(self) -> Situation:
        """Set up and go to the first stage."""
        self.server.setup()
        return self.advance()

    def advance(self) -> Situation:
        """Make rounds up to the next stage, or to the end of the run; return what there is to see."""
        while True:
            self.server.step()
            memory = self.server.state.memory
            done = self.server.state.round - 1
            counted = memory.cohort is not None and memory.cohort.folded
            if done == self.server.schedule.rounds or (memory.due(done) and counted):
                left = 1 - made(memory.stages, done)
                return look(self._state(), memory.cohort, self._ctx(), memory.journey, left)

    def jury_accuracy(self) -> float:
        """Return the model's accuracy now on examples that nobody trains on and no decision sees."""
        rows, train = self.server.side.rows, self.server.place.dataset.train
        return self.server.evaluate(Examples(train.x[rows], train.y[rows])).accuracy

    @property
    def ended(self) -> bool:
        """Whether all rounds are made."""
        return self.server.state.round > self.server.schedule.rounds

    def act(self, now: Situation, action: int) -> None:
        """Carry out an action as `Staged` would have in the round that was just made."""
        state, decider = self._state(), self.server.method.decider  # type: ignore[attr-defined]
        state, journey = decider.act(state, self._ctx(), state.memory.journey, now, action)
        memory = replace(state.memory, journey=journey, done=state.round)
        self.server.checkpoint.state = replace(state, round=state.round + 1, memory=memory)

    def asked_by_bandit(self, now: Situation, preference: float) -> int:
        """Return what the bandit of a run would ask for, from what was asked for and carried out so far."""
        server = self.server
        memory, decider = server.state.memory, server.method.decider  # type: ignore[attr-defined]
        journey = stages.told(memory.journey, now, preference)
        server.checkpoint.state = replace(server.state, memory=replace(memory, journey=journey))
        return int(decider.choose(journey, now))

    def _state(self) -> ServerState:
        return replace(self.server.state, round=self.server.state.round - 1)

    def _ctx(self) -> ServerContext:
        ctx = self.server.state.memory.ctx
        assert isinstance(ctx, ServerContext)
        return ctx


class StageEnv(gym.Env[NDArray[np.float32], np.int64]):
    """Gymnasium's view of the stage process.

    Observation: `observation.observe`, float32 (26,) in [−1, 1]. Actions: `stages.ACTIONS`. Reward:
    `stages.reward` of what lies between two stages, with accuracies on a jury: training examples that no
    client has, and more of them than the validation data that are observed.

    Args:
        config: `federations` (options of `Federations`), `preference` (λ; None: drawn for each episode),
            `seed` (of the first federation), `flops_weight`, and `steepest` as in `staged` (0: whatever is
            asked for may be done).
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = dict(config or {})
        self.federations = Federations(**config.get("federations", {}))
        self.preference: float | None = config.get("preference")
        self.flops_weight = float(config.get("flops_weight", 0.25))
        self.steepest = float(config.get("steepest", 0.0))
        self._seed = int(config.get("seed", 0)) + 10_007 * int(getattr(config, "worker_index", 0))
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (len(FEATURES),), np.float32)
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        self._rng = np.random.default_rng(self._seed)
        self._episode: Episode | None = None
        self._now: Situation | None = None
        self._jury_accuracy = 0.0
        self._lambda = 0.1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw a federation and go to its first stage.

        Args:
            seed: of the federations from here on.
            options: `federation` (its seed) and `preference` of this episode.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        options = options or {}
        number = int(options.get("federation", self._rng.integers(2**31)))
        drawn = float(np.exp(self._rng.uniform(*np.log(PREFERENCES))))
        self._lambda = float(options.get("preference", self.preference or drawn))
        method = {"name": "staged", "policy": "bandit", "steepest": self.steepest}
        config = self.federations.draw(number, method)
        self._episode = Episode(server_of(config, PausedStaged(**vars(config.method.options))))
        self._now = self._episode.begin()
        self._jury_accuracy = self._episode.jury_accuracy()
        return self._observation(), self._info()

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], SupportsFloat, bool, bool, dict[str, Any]]:
        """Carry out an action, train to the next stage, and say what it brought."""
        assert self._episode is not None and self._now is not None, "reset comes first"
        before = replace(self._now, accuracy=self._jury_accuracy)
        self._episode.act(self._now, int(action))
        self._now, self._jury_accuracy = self._episode.advance(), self._episode.jury_accuracy()
        now = replace(self._now, accuracy=self._jury_accuracy)
        brought = stages.reward(before, now, self._lambda, self.flops_weight)
        return self._observation(), brought, self._episode.ended, False, self._info()

    def asked_by_bandit(self) -> int:
        """Return what the bandit would ask for at this stage; call it once a stage."""
        assert self._episode is not None and self._now is not None, "reset comes first"
        return self._episode.asked_by_bandit(self._now, self._lambda)

    def _observation(self) -> NDArray[np.float32]:
        assert self._episode is not None and self._now is not None
        return observation.observe(self._now, self._episode.server.state.memory.journey, self._lambda)

    def _info(self) -> dict[str, Any]:
        assert self._now is not None and self._episode is not None
        journey = self._episode.server.state.memory.journey
        return {
            "accuracy": self._jury_accuracy,
            "spent_bytes": self._now.spent_bytes,
            "spent_flops": self._now.spent_flops,
            "density": self._now.density,
            "executed": journey.action,
            "preference": self._lambda,
        }
