"""FRLP's decision process as an environment of gymnasium: a synthetic curve for each episode."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray

from fedray.policies.rate_search import ACTIONS, FEATURES, RateSearch
from rllib_pruner.rate_search.curves import FAMILIES, SPAN, draw


class RateSearchEnv(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Steps the server's `RateSearch` over curves of `rllib_pruner.rate_search.curves`.

    Args:
        config: `states` of the range (default 100), and `families`, a weight for each family of curves
            (default: equal weights).
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        config = config or {}
        self.observation_space = Box(0.0, 1.0, (FEATURES,), np.float32)
        self.action_space = Discrete(len(ACTIONS))
        self._states = int(config.get("states", 100))
        weights = config.get("families") or dict.fromkeys(FAMILIES, 1.0)
        self._families = list(weights)
        self._chances = np.array(list(weights.values())) / sum(weights.values())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw a curve and begin at state 0."""
        super().reset(seed=seed, options=options)
        family = self._families[int(self.np_random.choice(len(self._families), p=self._chances))]
        self.search = RateSearch(1.0, 1 - SPAN, draw(family, self.np_random), step=SPAN / self._states)
        return self.search.observation(self.search.start()), {}

    def step(self, action: np.int64) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move the rate; an episode that reaches the step limit is truncated, any other end terminates it."""
        state, reward, done = self.search.step(int(action))
        truncated = self.search.outcome == "step limit"
        return self.search.observation(state), reward, done and not truncated, truncated, {}
