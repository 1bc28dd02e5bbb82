"""Training the stage agent in earnest, if for a moment: log, replay, policy, and a run that it decides."""

import json
from pathlib import Path

import pytest

from fedray.methods.staged import Staged
from fedray.policies.observation import INTERFACE
from fedray.policies.trained import policy_problem
from rllib_pruner.config import Plan
from rllib_pruner.stages import logs
from rllib_pruner.stages.federations import Federations, server_of
from rllib_pruner.training import train

CONFIG = Path(__file__).parents[3] / "tune_configs" / "rl_stages.yaml"
SMALL = {"process.federations.cases": "[[digits, mlp]]", "process.federations.rounds": "[20, 20]"}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_a_policy_is_trained_in_replay_and_decides(algorithm: str, ray_local: None, tmp_path: Path) -> None:
    options = SMALL | {
        "process.episodes": 25,
        "process.problems": 1,
        "process.preferences": "[0.1]",
        "process.log": tmp_path / "log",
        "algorithm": f"{{name: {algorithm}}}",
        "budget.env_steps": 256,
        "budget.evaluate_every": 256,
        "tracking.uri": "none",
    }
    plan = Plan.load(CONFIG, [f"{key}={value}" for key, value in options.items()])
    (config,) = plan.trials.values()
    said: list[str] = []
    config.process.options.prepare(said.append)
    assert len(logs.load(tmp_path / "log").groupby("episode")) == 25
    assert said[-1].startswith("25 of 25")
    (row,) = train(config, tmp_path / "t")
    assert {"score", "accuracy/0.1", "bytes/0.1"} <= row.keys()

    policy = tmp_path / "t" / "policy"
    assert policy_problem(policy, INTERFACE) is None
    assert str(tmp_path) not in (policy / "policy.json").read_text(encoding="utf-8")
    assert json.loads((policy / "policy.json").read_text(encoding="utf-8"))["algorithm"] == algorithm
    drawn = Federations(rounds=(20, 20)).draw(5, {"name": "staged"})
    finals = []
    for _ in range(2):
        server = server_of(drawn, Staged(policy="agent", agent=policy))
        server.setup()
        while server.state.round <= drawn.rounds:
            server.step()
        finals.append(server.model.sha256)
    assert finals[0] == finals[1] and server.state.memory.history.last is not None
