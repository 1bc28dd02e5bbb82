"""The config of a training, read from one YAML file like a run's.

base:
  process: {name: rate_search}
  algorithm: {name: dqn, lr: 1e-3}
  budget: {env_steps: 40000}
space:                                  # optional: trials, drawn by the verbs of a sweep
  algorithm.lr: {grid: [3e-4, 1e-3]}
tune: {concurrent: 2}
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from fedray.config import yaml_text
from fedray.config.choice import Choice, Chooser
from fedray.config.messages import Where, explain, line
from fedray.config.overrides import base_of, origin, override_tree, parse_overrides, plain_copy
from fedray.config.run_config import Config, Section, TrackingConfig
from fedray.config.trees import Tree
from fedray.config.tune_config import TuneConfig
from fedray.errors import ConfigError
from fedray.sweeps.drawing import expand
from fedray.sweeps.space import check_samples, opened, refuse_shared
from fedray.types import PositiveInt, Seed
from rllib_pruner.algorithms import ALGORITHMS, DQN, PPO
from rllib_pruner.processes import PROCESSES, Process

PROCESS: Chooser[Process] = Chooser("process", "name", PROCESSES, "rate_search")
ALGORITHM: Chooser[DQN | PPO] = Chooser("algorithm", "name", ALGORITHMS, "dqn")


class Budget(Section):
    """`budget:` when training ends, unless the process finds the policy good enough earlier.

    Args:
        env_steps: steps of the environment, at most.
        evaluate_every: steps between two evaluations; each also leaves a checkpoint.
        stop_score: a score that is good enough, too; None: only the process decides.
        in_a_row: consecutive evaluations that must be good enough before training ends.
    """

    env_steps: PositiveInt = 40_000
    evaluate_every: PositiveInt = 2_000
    stop_score: float | None = None
    in_a_row: PositiveInt = 3


class TrainTracking(TrackingConfig):
    """`tracking:` like a run's, with another default experiment."""

    experiment: str = "rllib_pruner"


class TrainConfig(Config):
    """All of one training.

    Args:
        process: the decision process, with its options.
        algorithm: the learning algorithm, with its options.
        seed: of the environments, the network and the exploration.
        budget: when training ends.
        tracking: MLflow's store and experiment.
    """

    process: Annotated[Choice[Process], PROCESS] = Field(default_factory=PROCESS.default)
    algorithm: Annotated[Choice[DQN | PPO], ALGORITHM] = Field(default_factory=ALGORITHM.default)
    seed: Seed = 0
    budget: Budget = Field(default_factory=Budget)
    tracking: TrainTracking = Field(default_factory=TrainTracking)

    def portable(self) -> Tree:
        """Return the config without folders and tracking."""
        tree = self.to_tree()
        del tree["tracking"]
        _drop_paths(tree["process"], asdict(self.process.options))  # type: ignore[call-overload]
        return tree

    @cached_property
    def digest(self) -> str:
        """Twelve hex digits of all that determines the policy."""
        tree = self.portable()
        return sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def _drop_paths(tree: Tree, values: Mapping[str, Any]) -> None:
    """Remove the keys whose values are paths."""
    for key, value in values.items():
        if isinstance(value, Path):
            del tree[key]
        elif isinstance(value, Mapping):
            _drop_paths(tree[key], value)


@dataclass(frozen=True)
class Plan:
    """The trainings of a file, all validated; one, unless the file has a `space`.

    Args:
        name: of the file.
        trials: name of each and its config; without a space, a single one without a name.
        concurrent: trials that train together; None: one per CPU.
        max_failures: times that a failed trial is resumed from its checkpoint.
    """

    name: str
    trials: Mapping[str, TrainConfig]
    concurrent: int | None = None
    max_failures: int = 1

    @property
    def has_space(self) -> bool:
        """Whether there are trials."""
        return "" not in self.trials

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Plan":
        """Read a YAML file and apply `key=value` overrides.

        An override of a key of `space` fixes that key; `space.…` and `tune.…` reach those sections.

        Raises:
            ConfigError: with every problem found.
        """
        tree, changes = yaml_text.load(path), parse_overrides(overrides)
        where = origin(path, changes)
        whole = {
            "base": base_of(tree, path),
            "space": tree.get("space") or {},
            "tune": tree.get("tune") or {},
        }
        given = dict(whole["space"])  # before an override fixes a key
        for key, value in changes.items():
            section, _, rest = key.partition(".")
            if section in ("space", "tune") and rest:
                change = {rest: value} if section == "space" else opened(whole[section], {rest: value})
                whole[section] = {**whole[section], **change}
            else:
                whole["space"] = {k: v for k, v in whole["space"].items() if k != key}
                whole["base"] = override_tree(whole["base"], {key: value})
        tune = _tune(whole["tune"], where)
        refuse_shared(whole["space"], where)
        check_samples(given | whole["space"], tune, where)
        points = expand(whole["space"], tune, where)
        configs = [TrainConfig.from_tree(override_tree(whole["base"], point), where) for point in points]
        if not whole["space"]:
            return cls(Path(path).stem, {"": configs[0]})
        names = [f"{number:02d}-{_label(point)}" for number, point in enumerate(points)]
        trials = dict(zip(names, configs, strict=True))
        return cls(Path(path).stem, trials, tune.concurrent, tune.max_failures)


SEARCHING = ("search", "objectives", "constraints", "points_to_evaluate", "repeat")
COMPARING = (
    *("metric", "mode", "scheduler", "grace_rounds", "reduction", "stop", "time_budget_s"),
    *SEARCHING,
)
"""Keys of `tune` that a training does not read."""


def _tune(options: Any, where: Where) -> TuneConfig:
    try:
        tune = TuneConfig.model_validate(plain_copy({"tune": options})["tune"], strict=True)
    except ValidationError as error:
        raise ConfigError(explain(error, TuneConfig, where, prefix=("tune",))) from None
    text = "a training runs every trial to the end and keeps the policy with the best score; leave it out"
    unread = [line(f"tune.{key}", text, where) for key in COMPARING if key in tune.model_fields_set]
    if unread:
        raise ConfigError("\n".join(unread))
    return tune


def _label(point: Mapping[str, Any]) -> str:
    """Name a trial by its changes; a section by the name that it chooses."""
    parts = []
    for key, value in point.items():
        if isinstance(value, Mapping) and "name" in value:
            parts.append(str(value["name"]))
        else:
            parts.append(f"{key.rpartition('.')[2]}={value}")
    return re.sub(r"[^A-Za-z0-9.,=_+-]+", "-", ",".join(parts))[:100]
