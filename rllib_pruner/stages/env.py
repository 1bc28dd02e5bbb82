"""`StageEnv`: an episode is a federated run, a step is a stage of rounds.

A stage goes through the very calls of a run with `method.name=staged method.policy=agent`:
`Decider.situation`, an action, `Decider.act`. The environment chooses the action where a run asks the agent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from fedray.data.datasets import Examples
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.method import ServerContext
from fedray.federation.server import OpenRound, Server
from fedray.methods.staged import Staged, StagedMemory
from fedray.policies import stages
from fedray.policies.decider import Decider
from fedray.policies.history import History
from fedray.policies.observation import FEATURES, observe
from fedray.policies.situation import Situation
from fedray.policies.stages import ACTIONS, HOLD, PREFERENCES
from fedray.randomness import borrowed
from fedray.types import ServerState, Task
from rllib_pruner.stages.federations import Federations, server_of


@dataclass
class Episode:
    """One federated run that stops at each stage, between AGGREGATE and PRUNE.

    Args:
        server: its method is `method`.
        method: with a policy.

    Attributes:
        opened: the round of the stage, or the last round of the run.
        now: the situation in it.
        history: with the reward of the last action.
    """

    server: Server
    method: Staged
    opened: OpenRound = field(init=False)
    now: Situation = field(init=False)
    history: History = field(init=False)

    def begin(self) -> None:
        """Set up and go to the first stage."""
        self.server.setup()
        self.advance()

    def advance(self) -> None:
        """Make rounds up to the next stage, or to the last round of the run."""
        while True:
            self.opened = self.server.open_round()
            state, cohort, memory = self.opened.state, self.opened.cohort, self.opened.state.memory
            if self.is_last or (memory.due(state.round) and cohort.folded):
                break
            self.server.close_round(self.opened, self.method.prune)
        history = memory.history.spend(state, cohort, self.opened.ctx)
        left = 1 - memory.progress(state.round)
        with self.server.at_work():
            self.now, self.history = self.decider.situation(state, cohort, self.opened.ctx, history, left)
        if self.is_last:
            self.server.close_round(self.opened, lambda state, *_: state)

    def act(self, action: int) -> None:
        """Carry out an action in the round of the stage, and finish the round."""

        def prune(
            state: ServerState[StagedMemory], cohort: CohortUpdate, ctx: ServerContext
        ) -> ServerState[StagedMemory]:
            state, history = self.decider.act(state, ctx, self.now, self.history, action)
            return replace(state, memory=replace(state.memory, done=state.round, history=history))

        self.server.close_round(self.opened, prune)

    @property
    def decider(self) -> Decider:
        """The method's policy, with the limits on actions."""
        assert self.method.decider is not None, "a schedule decides nothing"
        return self.method.decider

    @property
    def is_last(self) -> bool:
        """Whether the open round is the run's last."""
        return self.opened.state.round >= self.server.schedule.rounds

    def jury_accuracy(self) -> float:
        """Return the open round's accuracy on examples that neither clients nor decisions use."""
        place, state, rows = self.server.place, self.opened.state, self.server.side.rows
        jury = Examples(place.dataset.train.x[rows], place.dataset.train.y[rows])
        params = place.model.forward_params(state.params, state.mask)
        task = Task(params.masked(state.mask), place.model.norms.global_mask(state.mask))
        with borrowed(place.seed):
            return self.server.pool.evaluate(task, jury).accuracy


class StageEnv(gym.Env[NDArray[np.float32], np.int64]):
    """Gymnasium's view of the stage process.

    Observation: `observe`, float32 (26,) in [−1, 1]. Actions: `stages.ACTIONS`. Reward: `stages.reward`
    between two stages, with accuracies on the jury: training examples that no client has, more of them than
    there are validation examples.

    Args:
        config: `federations` (options of `Federations`), `preference` (λ; None: drawn for each episode),
            `seed` (of the first federation), `flops_weight`, and `steepest` as in `staged` (0: every action
            is allowed).
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
        self._jury_accuracy = 0.0

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
        preference = float(options.get("preference", self.preference or drawn))
        method = {"policy": "bandit", "steepest": self.steepest, "preference": preference}
        config = self.federations.draw(number, {"name": "staged", **method})
        staged = config.method.options
        assert isinstance(staged, Staged)
        self._episode = Episode(server_of(config), staged)
        self._episode.begin()
        self._jury_accuracy = self._episode.jury_accuracy()
        return self._observation(), self._info()

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], SupportsFloat, bool, bool, dict[str, Any]]:
        """Carry out an action, train to the next stage, and return the action's reward."""
        episode = self.episode
        before = replace(episode.now, accuracy=self._jury_accuracy)
        episode.act(int(action))
        episode.advance()
        self._jury_accuracy = episode.jury_accuracy()
        now = replace(episode.now, accuracy=self._jury_accuracy)
        reward = stages.reward(before, now, episode.history.preference, self.flops_weight)
        return self._observation(), reward, episode.is_last, False, self._info()

    @property
    def episode(self) -> Episode:
        """The episode that the last `reset` began."""
        assert self._episode is not None, "call reset first"
        return self._episode

    def asked_by_bandit(self) -> int:
        """Return the action that the bandit of a run would ask for at this stage."""
        return self.episode.decider.choose(self.episode.now, self.episode.history)

    def _observation(self) -> NDArray[np.float32]:
        return observe(self.episode.now, self.episode.history)

    def _info(self) -> dict[str, Any]:
        now, history = self.episode.now, self.episode.history
        return {
            "accuracy": self._jury_accuracy,
            "spent_bytes": now.spent_bytes,
            "spent_flops": now.spent_flops,
            "density": now.density,
            "executed": history.last.action if history.last else HOLD,
            "preference": history.preference,
        }
