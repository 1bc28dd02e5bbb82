"""A training's config: read like a run's, and refused like one."""

import re
import shlex
from pathlib import Path

import pytest

from fedray.config import yaml_text
from fedray.errors import ConfigError
from rllib_pruner.algorithms import ALGORITHMS, DQN, PPO
from rllib_pruner.config import Plan, TrainConfig
from rllib_pruner.processes import PROCESSES, RateSearchProcess

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tune_configs").glob("rl_*.yaml"))
FILE = ROOT / "tune_configs" / "rl_rate_search.yaml"


def test_every_process_has_a_file_that_trains_it():
    assert {path.stem.removeprefix("rl_") for path in FILES} >= set(PROCESSES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_loads_and_its_commands_can_be_run(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# fedray agent train tune_configs/{path.name}")
    assert Plan.load(path).trials
    for command in re.findall(r"^# fedray agent train (.+)$", text, flags=re.MULTILINE):
        file, *overrides = [word for word in shlex.split(command) if not word.startswith("--")]
        assert file == f"tune_configs/{path.name}"
        assert Plan.load(ROOT / file, overrides).trials


def test_defaults_and_what_is_given():
    config = TrainConfig.from_tree({})
    assert config.process.name == "rate_search" and config.process.options == RateSearchProcess()
    assert config.algorithm.name == "dqn" and config.algorithm.options == DQN()
    config = TrainConfig.from_tree(
        {"algorithm": {"name": "ppo", "hidden": [8, 8]}, "process": {"name": "rate_search", "states": 20}}
    )
    assert config.algorithm.options == PPO(hidden=(8, 8))
    assert config.process.options.environment()[1]["states"] == 20


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_config_survives_yaml(name, tmp_path):
    config = TrainConfig.from_tree({"algorithm": {"name": name}, "seed": 3, "budget": {"stop_score": 0.9}})
    (tmp_path / "config.yaml").write_text(yaml_text.dump(config.to_tree()))
    again = TrainConfig.from_tree(yaml_text.load(tmp_path / "config.yaml"))
    assert again == config and again.digest == config.digest


def test_the_digest_names_what_determines_the_policy():
    config = TrainConfig.from_tree({})
    assert re.fullmatch("[0-9a-f]{12}", config.digest)
    assert TrainConfig.from_tree({"tracking": {"uri": "none"}}).digest == config.digest
    assert TrainConfig.from_tree({"seed": 1}).digest != config.digest
    assert TrainConfig.from_tree({"algorithm": {"lr": 0.1}}).digest != config.digest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.lrr=1", r"algorithm\.lrr \(override\): dqn has no such option; did you mean 'lr'\?"),
        ("algorithm.clip=0.1", r"algorithm\.clip .*: dqn has no such option; ppo can have it"),
        ("algorithm.lr=-1", r"algorithm\.lr \(override\): got -1; must be greater than 0"),
        ("algorithm.epsilon=[1, 2]", r"algorithm\.epsilon\.1 .*less than or equal to 1"),
        ("algorithm.name=dqm", r"unknown algorithm 'dqm'; did you mean 'dqn'\? Known: dqn, ppo"),
        ("process.name=rates", r"unknown process 'rates'; did you mean 'rate_search'"),
        ("process.states=1", r"process\.states .*: got 1; must be greater than or equal to 2"),
        ("process.families={noise: 1}", r"process\.families"),
        ("budget.env_step=3", r"budget\.env_step .*: unknown; did you mean 'env_steps'"),
        ("budget.env_steps=0", r"budget\.env_steps .*: got 0; must be greater than 0"),
        ("lr=1", r"lr \(override\): unknown; did you mean 'algorithm\.lr'"),
        ("tracking.uri=foo", r"tracking\.uri \(override\): 'foo': .* Allowed: none"),
        ("space.seed={grod: [1]}", r"space\.seed .*: unknown verb 'grod'"),
        ("seed", r"'seed' is not of the form key=value"),
    ],
)
def test_what_is_wrong_is_said(override, message):
    with pytest.raises(ConfigError, match=message):
        Plan.load(FILE, [override])


def test_a_space_makes_trials():
    plan = Plan.load(
        FILE, ["space.seed={grid: [0, 1]}", "space.algorithm.lr={grid: [0.1, 0.01]}", "tune.concurrent=1"]
    )
    assert plan.has_space and plan.concurrent == 1
    assert list(plan.trials) == [
        "00-seed=0,lr=0.1",
        "01-seed=0,lr=0.01",
        "02-seed=1,lr=0.1",
        "03-seed=1,lr=0.01",
    ]
    assert plan.trials["03-seed=1,lr=0.01"].algorithm.options.lr == 0.01
    assert not Plan.load(FILE).has_space


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "tune.metric=return",
            r"tune\.metric \(override\): a training runs every trial to the end and keeps",
        ),
        ("tune.scheduler=asha", r"tune\.scheduler \(override\): a training runs every trial to the end"),
        ("tune.grace_rounds=3", r"tune\.grace_rounds \(override\): a training runs every trial to the end"),
        ("tune.mode=min", r"tune\.mode \(override\): a training runs every trial to the end"),
        ("tune.num_samples=3", r"tune\.num_samples \(override\): 3, but space draws nothing at random"),
        ("tune.seed=3", r"tune\.seed \(override\): 3, but space draws nothing at random"),
        ("space.tracking.experiment={grid: [a, b]}", r"space\.tracking\.experiment .* tracked in one store"),
    ],
)
def test_what_a_training_would_not_read_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        Plan.load(FILE, ["space.seed={grid: [0, 1]}", override])


def test_how_often_a_trial_is_tried_again_is_read(tmp_path):
    plan = Plan.load(FILE, ["space.seed={grid: [0, 1]}", "tune.max_failures=4"])
    assert plan.max_failures == 4


def test_a_file_with_a_space(tmp_path):
    path = tmp_path / "rl.yaml"
    path.write_text(
        "base: {seed: 3}\nspace: {algorithm.gamma: {uniform: [0.9, 0.99]}}\ntune: {num_samples: 2}\n"
    )
    first, second = Plan.load(path).trials.values()
    assert first.seed == second.seed == 3
    assert 0.9 <= first.algorithm.options.gamma != second.algorithm.options.gamma <= 0.99
    (only,) = Plan.load(path, ["algorithm.gamma=0.5"]).trials.values()  # an override fixes a key of the space
    assert only.algorithm.options.gamma == 0.5
