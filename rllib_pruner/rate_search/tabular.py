"""Q-learning with a table instead of a network: FRLP's process without deep learning.

Source: Watkins and Dayan, "Q-learning", Machine Learning 8, 1992.
"""

import numpy as np
from numpy.typing import NDArray

from rllib_pruner.rate_search.env import RateSearchEnv


class TabularQ:
    """A value for each of `states + 1` shares of the range and each action.

    Args:
        states: of the range in training.
    """

    def __init__(self, states: int = 100) -> None:
        self.states = states
        self.values = np.zeros((states + 1, 2))

    def acts(self, observations: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the greedy actions (n,) for observations (n, 1)."""
        return np.asarray(self.values[self._rows(observations[:, 0])].argmax(axis=1), dtype=np.int64)

    def learn(
        self,
        episodes: int,
        seed: int = 0,
        *,
        gamma: float = 0.95,
        rate: float = 0.1,
        epsilon: tuple[float, float] = (1.0, 0.05),
    ) -> int:
        """Learn from episodes of RateSearchEnv, with less exploration in each.

        Args:
            episodes: number of episodes.
            seed: of the curves and the exploration.
            gamma: discount.
            rate: learning rate.
            epsilon: share of random actions in the first episode, and in the last.

        Returns:
            The number of environment steps.
        """
        env, rng = RateSearchEnv({"states": self.states}), np.random.default_rng(seed)
        steps = 0
        for share in np.linspace(*epsilon, episodes):
            observation, _ = env.reset(seed=seed if steps == 0 else None)
            row, is_over = int(self._rows(observation[0])), False
            while not is_over:
                greedy = int(self.values[row].argmax())
                action = int(rng.integers(2)) if rng.random() < share else greedy
                observation, reward, ended, truncated, _ = env.step(np.int64(action))
                following, is_over = int(self._rows(observation[0])), ended or truncated
                target = reward if ended else reward + gamma * self.values[following].max()
                self.values[row, action] += rate * (target - self.values[row, action])
                row, steps = following, steps + 1
        return steps

    def _rows(self, shares: NDArray[np.float32] | np.float32) -> NDArray[np.int64]:
        return np.rint(np.asarray(shares) * self.states).astype(np.int64)
