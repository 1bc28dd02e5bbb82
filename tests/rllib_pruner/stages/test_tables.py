"""The table of the stage agent: who plays, how returns are computed; configs that name no folders."""

import json
from pathlib import Path

import numpy as np
import pytest

from fedray.policies.observation import FEATURES, INTERFACE
from fedray.policies.stages import ACTIONS
from fedray.policies.trained import TrainedPolicy, policy_problem, shipped
from rllib_pruner.config import Plan
from rllib_pruner.stages.process import StageProcess
from rllib_pruner.stages.tables import Ends, comparison, in_order, process_of

CONFIG = Path(__file__).parents[3] / "tune_configs" / "rl_stages.yaml"


def test_returns_by_hand() -> None:
    ends = Ends(np.array([0.9, 0.8]), np.array([0.5, 0.2]), np.array([0.4, 0.8]))
    assert ends.returned(0.1, 0.25).tolist() == pytest.approx([0.9 - 0.06, 0.8 - 0.04])


def test_who_acts_in_order_holds_from_then_on() -> None:
    choose, nothing = in_order("×0.3", "×0.75"), np.zeros(len(FEATURES), dtype=np.float32)
    assert [choose(stage, nothing) for stage in range(4)] == [4, 2, 0, 0]


def test_a_config_without_folders_is_the_same_training() -> None:
    here, there = (
        next(
            iter(
                Plan.load(
                    CONFIG, [f"process.federations.root={root}", f"process.log={root}/log"]
                ).trials.values()
            )
        )
        for root in ("/a", "/b")
    )
    assert here != there and here.digest == there.digest
    assert here.portable() == there.portable()
    assert "/a" not in json.dumps(here.portable())


def test_the_log_is_found_from_where_a_trial_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for config in Plan.load(CONFIG, []).trials.values():
        options = config.process.options
        assert isinstance(options, StageProcess)
        assert options.log == tmp_path / "runs" / "stage_log"


def test_the_policy_that_ships_fits_the_process_and_names_no_folder() -> None:
    assert policy_problem(None, INTERFACE) is None
    text = (shipped("stages") / "policy.json").read_text(encoding="utf-8")
    about = json.loads(text)
    assert tuple(about["actions"]) == ACTIONS and "root" not in text and '"log"' not in text


def test_the_process_of_a_policy_takes_its_data_from_where_it_is_told() -> None:
    trained = TrainedPolicy.load(None, INTERFACE)
    assert process_of(trained, Path("/data")).federations.root == Path("/data")


@pytest.mark.slow
def test_the_shipped_policy_is_tabled_beside_all_others() -> None:
    trained = TrainedPolicy.load(None, INTERFACE)
    table = comparison(trained, StageProcess(), 1)  # digits need no download
    assert {row[0].split(", ", 1)[1] for row in table.rows} >= {"agent", "bandit", "dense"}
    assert len(table.rows) == 30
