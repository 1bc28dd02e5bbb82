"""What the evaluation of FRLP's agent compares, on few curves; tables, and a table that learns."""

import re

import numpy as np
import pytest

from fedray.errors import ConfigError
from fedray.policies.line_search import scan, walk
from fedray.policies.rate_search import ACTIONS, INTERFACE, RateSearch
from fedray.policies.trained import TrainedPolicy
from rllib_pruner.evaluate import evaluate
from rllib_pruner.rate_search.curves import FAMILIES, SPAN, held_out
from rllib_pruner.rate_search.server_cost import FineTune
from rllib_pruner.rate_search.tables import decision_seconds, outcome
from rllib_pruner.rate_search.tabular import TabularQ
from rllib_pruner.tables import Table


@pytest.fixture(scope="module")
def agent() -> TrainedPolicy:
    return TrainedPolicy.load(None, INTERFACE)


@pytest.mark.parametrize("stride", [1, 10])
def test_the_agent_that_ships_is_a_scan_on_monotone_curves(agent, stride):
    for curve in held_out("monotone", 20 if stride == 10 else 3, seed=2):
        walked, scanned = (RateSearch(1.0, 1 - SPAN, curve) for _ in range(2))
        assert walk(walked, agent.act, stride) == scan(scanned, stride)


def test_where_it_jumps_over_the_window_it_drifts_to_the_limit(agent):
    for curve in held_out("overshooting", 10, seed=2):
        search = RateSearch(1.0, 1 - SPAN, curve)
        assert walk(search, agent.act) == search.limit
        assert search.outcome in ("above", "step limit")


def test_single_decisions_and_batches_are_the_same(agent):
    observations = np.linspace(0, 1, 101, dtype=np.float32)[:, None]
    assert [agent.act(observation) for observation in observations] == agent.acts(observations).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_walking_many_curves_together_is_walking_each(agent, family):
    found = outcome(family, 10, 8, {"dqn": agent.acts, "tabular": agent.acts})
    for index, curve in enumerate(held_out(family, 8, seed=1)):
        search = RateSearch(1.0, 1 - SPAN, curve)
        rate = 1 - search.density(walk(search, agent.act))
        assert found.solved["dqn"][0][index] == rate
        assert found.solved["dqn"][1][index] == search.evaluations
    row = found.row("scan")
    assert row[:3] == [f"{family}, scan", "10", "100.0%"]


def test_a_table_learns_to_increase():
    table = TabularQ(states=20)
    assert table.learn(300, seed=1) > 300
    shares = np.linspace(0, 0.9, 19, dtype=np.float32)[:, None]
    assert set(table.acts(shares).tolist()) == {ACTIONS.index("increase")}
    again = TabularQ(states=20)
    again.learn(300, seed=1)
    np.testing.assert_array_equal(table.values, again.values)


def test_a_fine_tune_is_measured_on_the_servers_own_training():
    tune = FineTune("lenet5", "fashion_mnist", examples=50)
    assert tune.steps() == 3
    wall_s, cpu_s = tune.measure(steps=2)
    assert cpu_s > 0 and 0 < wall_s < 5


def test_a_table_in_markdown():
    table = Table("Title", ("a", "b"), [["x", "1"], ["y", "2"]], "Note.")
    assert table.markdown() == "**Title**\n\n| a | b |\n| --- | ---: |\n| x | 1 |\n| y | 2 |\n\nNote.\n"


def test_an_unknown_process_is_refused():
    with pytest.raises(ConfigError, match="unknown process 'stage'"):
        evaluate(process="stage")


@pytest.mark.slow
def test_the_whole_command_on_few_curves(tmp_path, capsys):
    evaluate("rate_search", policy=None, problems=3, cost=False, out_file=tmp_path / "tables.md")
    text = (tmp_path / "tables.md").read_text()
    assert text.count("| monotone, dqn |") == 2 and "100.0%" in text
    assert re.search(r"\| dqn \| \d+\.\d \| \d+\.\d\d \| \d+\.\d\d \|", text)
    assert "Where the solvers settle" in capsys.readouterr().out


@pytest.mark.slow
def test_a_decision_takes_less_than_five_milliseconds():
    load_s, median_s, _ = decision_seconds(None, INTERFACE)
    assert load_s > 0 and median_s < 0.005
