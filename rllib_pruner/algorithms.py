"""Learning algorithms: RLlib's DQN and PPO on its new API stack, each as a dataclass of its options.

Everything runs in one process, without separate env runners and learners: the networks are so small that
sending weights would cost more than it saves.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import gymnasium
from pydantic import ConfigDict, Field

from fedray.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Layers = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
Environment = tuple[type[gymnasium.Env[Any, Any]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class DQN:
    """Deep Q-learning with replay and a target network.

    Args:
        lr: learning rate of Adam.
        gamma: discount.
        hidden: units of each hidden layer.
        batch: transitions in an update.
        envs: environments that are stepped together.
        fragment: steps of each between two updates.
        epsilon: share of random actions at the start, and in the end.
        epsilon_steps: environment steps over which it falls.
        replay: capacity of the replay buffer, in environment steps.
        warm_up: environment steps before the first update.
        n_step: rewards that are summed before the network's estimate counts.
        target_every: environment steps between copies to the target network.
        double_q: let the network choose the action that the target network values.
        dueling: separate heads for value and advantage.
        grad_clip: largest norm of a gradient.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    lr: PositiveFloat = 1e-3
    gamma: Fraction = 0.95
    hidden: Layers = (64, 64)
    batch: PositiveInt = 256
    envs: PositiveInt = 8
    fragment: PositiveInt = 4
    epsilon: tuple[Fraction, Fraction] = (1.0, 0.05)
    epsilon_steps: PositiveInt = 10_000
    replay: PositiveInt = 20_000
    warm_up: NonNegativeInt = 1000
    n_step: PositiveInt = 1
    target_every: PositiveInt = 500
    double_q: bool = True
    dueling: bool = False
    grad_clip: PositiveFloat = 10.0

    def rllib(self, environment: Environment, seed: int, steps: int) -> Any:
        """Return RLlib's config; `steps` are the environment steps of an iteration."""
        from ray.rllib.algorithms.dqn import DQNConfig

        first, last = self.epsilon
        config = _in_process(DQNConfig(), environment, seed, self.hidden, self.envs, self.fragment)
        config.training(
            lr=self.lr,
            gamma=self.gamma,
            train_batch_size=self.batch,
            grad_clip=self.grad_clip,
            grad_clip_by="global_norm",
            num_steps_sampled_before_learning_starts=self.warm_up,
            target_network_update_freq=self.target_every,
            n_step=self.n_step,
            double_q=self.double_q,
            dueling=self.dueling,
            epsilon=[(0, first), (self.epsilon_steps, last)],
            replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": self.replay},
        )
        return config.reporting(min_sample_timesteps_per_iteration=steps, min_time_s_per_iteration=0)


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Proximal policy optimisation.

    Args:
        lr: learning rate of Adam.
        gamma: discount.
        lambda_: decay of the generalised advantage.
        hidden: units of each hidden layer.
        batch: environment steps between two rounds of updates.
        minibatch: steps in an update.
        epochs: passes over a batch.
        envs: environments that are stepped at a time.
        clip: how far the policy may move in an update, as a ratio of probabilities.
        entropy: weight of the policy's entropy, which keeps it exploring.
        value_weight: weight of the value's loss.
        value_clip: largest squared error of a value that counts.
        grad_clip: largest norm of a gradient.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    lr: PositiveFloat = 1e-3
    gamma: Fraction = 0.95
    lambda_: Fraction = 0.95
    hidden: Layers = (64, 64)
    batch: PositiveInt = 2000
    minibatch: PositiveInt = 256
    epochs: PositiveInt = 8
    envs: PositiveInt = 8
    clip: PositiveFloat = 0.2
    entropy: NonNegativeFloat = 0.01
    value_weight: NonNegativeFloat = 0.5
    value_clip: PositiveFloat = 100.0
    grad_clip: PositiveFloat = 0.5

    def rllib(self, environment: Environment, seed: int, steps: int) -> Any:
        """Return RLlib's config; `steps` are the environment steps of an iteration."""
        from ray.rllib.algorithms.ppo import PPOConfig

        config = _in_process(PPOConfig(), environment, seed, self.hidden, self.envs, "auto")
        config.training(
            lr=self.lr,
            gamma=self.gamma,
            lambda_=self.lambda_,
            train_batch_size_per_learner=self.batch,
            minibatch_size=self.minibatch,
            num_epochs=self.epochs,
            clip_param=self.clip,
            entropy_coeff=self.entropy,
            vf_loss_coeff=self.value_weight,
            vf_clip_param=self.value_clip,
            grad_clip=self.grad_clip,
            grad_clip_by="global_norm",
        )
        return config.reporting(min_sample_timesteps_per_iteration=steps, min_time_s_per_iteration=0)


def _in_process(
    config: Any,
    environment: Environment,
    seed: int,
    hidden: Layers,
    envs: int,
    fragment: int | Literal["auto"],
) -> Any:
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    env, options = environment
    return (
        config.environment(env, env_config=options)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=envs, rollout_fragment_length=fragment)
        .learners(num_learners=0)
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=list(hidden), fcnet_activation="relu"))
        .debugging(seed=seed, log_level="ERROR")
    )


ALGORITHMS: dict[str, type[DQN] | type[PPO]] = {"dqn": DQN, "ppo": PPO}
