"""An environment that replays logged runs, a thousand times faster than the micro-federations themselves.

A step finds the logged stages with the same action and the most similar situations, draws one, and moves
to the stage that followed it. Nothing is fitted: every state is one of a real federation. Rewards take
accuracies from the states, so that they add up to the final accuracy even if the path changes between
episodes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from fedray.policies.observation import FEATURES
from fedray.policies.stages import ACTIONS, PREFERENCES
from rllib_pruner.stages import logs

WEIGHTS = {
    "density": 2.0,
    "log density": 4.0,
    "accuracy": 3.0,
    "loss": 3.0,
    "progress": 2.0,
    "stages left": 2.0,
    "probe 0.75": 2.0,
    "probe 0.5": 2.0,
    "probe 0.3": 2.0,
    "probe 0.1": 2.0,
    "spread of losses": 0.3,
    "participation": 0.1,
    "on the wire": 0.1,
}
"""Weight of a feature in the distance of two situations, on top of its spread in the log; default 1."""


STAGES_APART = 1
"""Largest difference in stages between two situations that are compared."""


class Log:
    """Logged episodes as arrays.

    Args:
        folder: of the shards.
    """

    def __init__(self, folder: Path) -> None:
        table = logs.load(folder)
        self.x = table[[f"x{i}" for i in range(len(FEATURES) - 1)]].to_numpy(np.float32)
        self.stage, self.action = table["stage"].to_numpy(), table["action"].to_numpy()
        self.accuracy = table["accuracy"].to_numpy()
        self.bytes, self.flops = table["spent_bytes"].to_numpy(), table["spent_flops"].to_numpy()
        weight = np.array([WEIGHTS.get(name, 1.0) for name in FEATURES[:-1]])
        self.scaled = (self.x * (weight / (self.x.std(0) + 1e-3))).astype(np.float32)
        self.starts = np.flatnonzero(self.stage == 0)
        self._where: dict[tuple[int, int | None], NDArray[np.int64]] = {}

    def ended(self, row: int) -> bool:
        """Whether a row is the end of its run."""
        return bool(self.action[row] < 0)

    def similar(self, row: int, action: int | None, count: int) -> NDArray[np.int64]:
        """Return the rows most similar to a row among those of about the same stage; maybe none.

        Args:
            row: any but the end of a run.
            action: of the rows; None: any.
            count: at most this many rows are returned.
        """
        key = (int(self.stage[row]), action)
        if key not in self._where:
            matches = self.action >= 0 if action is None else self.action == action
            self._where[key] = np.flatnonzero((abs(self.stage - key[0]) <= STAGES_APART) & matches)
        rows = self._where[key]
        if len(rows) <= count:
            return rows
        distances = ((self.scaled[rows] - self.scaled[row]) ** 2).sum(1)
        return rows[np.argpartition(distances, count)[:count]]


class ReplayEnv(gym.Env[NDArray[np.float32], np.int64]):
    """The stage process on logged runs; observation, actions and reward as in `StageEnv`.

    Args:
        config: `log` (folder of the shards), `neighbours` (similar stages; one is drawn), `flops_weight`,
            `seed` and `preference` (λ; None: drawn for each episode).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.log = Log(Path(config["log"]))
        self.neighbours = int(config.get("neighbours", 4))
        self.flops_weight = float(config.get("flops_weight", 0.25))
        self.preference: float | None = config.get("preference")
        self.observation_space = gym.spaces.Box(-1.0, 1.0, (len(FEATURES),), np.float32)
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        self._rng = np.random.default_rng(int(config.get("seed", 0)))
        self._row, self._lambda = 0, 0.1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start at the first stage of a random logged run."""
        super().reset(seed=seed)
        if seed is not None:
            self._rng = np.random.default_rng(seed)
        self._lambda = self.preference or float(np.exp(self._rng.uniform(*np.log(PREFERENCES))))
        self._row = int(self._rng.choice(self.log.starts))
        return self._observation(), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], SupportsFloat, bool, bool, dict[str, Any]]:
        """Move to the successor of a similar stage with this action; of any similar stage, if none has it."""
        log, now = self.log, self._row
        rows = log.similar(now, int(action), self.neighbours)
        if not len(rows):
            rows = log.similar(now, None, self.neighbours)
        drawn = int(self._rng.choice(rows))
        self._row = following = drawn + 1
        spent = log.bytes[following] - log.bytes[drawn]
        spent += self.flops_weight * (log.flops[following] - log.flops[drawn])
        reward = log.accuracy[following] - log.accuracy[now] - self._lambda * spent
        return self._observation(), float(reward), log.ended(following), False, {}

    def _observation(self) -> NDArray[np.float32]:
        preference = np.float32(np.clip(1 + np.log10(self._lambda) / 2, -1, 1))
        return np.append(self.log.x[self._row], preference).astype(np.float32)
