"""The environment steps FRLP's own process, and is one of gymnasium's."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from fedray.policies.rate_search import ACTIONS
from rllib_pruner.rate_search.curves import EDGE
from rllib_pruner.rate_search.env import RateSearchEnv

UP, DOWN = (np.int64(ACTIONS.index(name)) for name in ("increase", "decrease"))


@pytest.mark.parametrize("states", [2, 20, 100])
def test_gymnasium_takes_it(states):
    check_env(RateSearchEnv({"states": states}), skip_render_check=True)


def test_an_episode_gives_the_rewards_of_the_paper():
    env = RateSearchEnv({"states": 50, "families": {"monotone": 1.0}})
    for seed in range(30):
        observation, _ = env.reset(seed=seed)
        assert observation == pytest.approx(0)
        rewards, is_over = [], False
        while not is_over:
            observation, reward, ended, truncated, _ = env.step(UP)
            rewards.append(reward)
            is_over = ended or truncated
        assert not truncated and set(rewards[:-1]) <= {0.5}
        search = env.search
        if search.outcome == "end":
            assert rewards[-1] == 1 and len(rewards) == search.settled
            assert abs(search.growth(search.settled) - 1 - EDGE - 0.015) < 0.015
            assert observation[0] == pytest.approx(search.settled / search.limit)
        else:
            assert rewards[-1] == -1 and search.settled == search.limit == len(rewards) - 1


def test_leaving_below_ends_and_the_step_limit_truncates():
    env = RateSearchEnv({"states": 50, "families": {"overshooting": 1.0}})
    env.reset(seed=1)
    assert env.step(DOWN)[1:4] == (-1.0, True, False)
    env.reset(seed=2)
    steps = 0
    while True:
        _, _, ended, truncated, _ = env.step(UP if steps % 2 == 0 else DOWN)
        steps += 1
        assert not ended
        if truncated:
            break
    assert steps == env.search.step_limit == 2 * env.search.limit


def test_the_same_seed_gives_the_same_episodes():
    def returns(seed: int) -> list[float]:
        env, found = RateSearchEnv(), []
        env.reset(seed=seed)
        for _ in range(20):
            total, is_over = 0.0, False
            while not is_over:
                _, reward, ended, truncated, _ = env.step(UP)
                total, is_over = total + reward, ended or truncated
            found.append(total)
            env.reset()
        return found

    assert returns(3) == returns(3) != returns(4)


def test_families_are_drawn_by_their_weights():
    env = RateSearchEnv({"families": {"noisy": 0.0, "overshooting": 1.0}})
    for seed in range(10):
        env.reset(seed=seed)
        assert not any(env.search.is_end(state) for state in range(env.search.limit + 1))
