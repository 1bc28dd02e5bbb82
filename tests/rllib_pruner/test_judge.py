"""The judgement of the stage agent, with numbers worked out by hand."""

import numpy as np
import pytest

from fedray.errors import ConfigError
from rllib_pruner import judge
from rllib_pruner.judge import Judged, at_accuracy, at_bytes, front, interquartile_mean, interval, tuned
from tests.experiment.rundirs import write_run


def judged(label: str, kind: str, moved: list[float], accuracy: list[float]) -> Judged:
    return Judged(label, kind, np.array(moved), np.array(accuracy), np.array(accuracy[::-1]))


SMALL = judged("small", "constant", [10.0, 10.0], [0.5, 0.7])
LARGE = judged("large", "schedule", [1000.0, 1000.0], [0.8, 0.8])
WASTE = judged("waste", "schedule", [100.0, 100.0], [0.55, 0.6])  # more bytes than SMALL, less accurate


def test_the_front_leaves_out_who_is_beaten_with_fewer_bytes() -> None:
    assert front([LARGE, WASTE, SMALL]) == [SMALL, LARGE]


def test_between_two_settings_the_front_is_a_line_over_the_logarithm() -> None:
    best = [SMALL, LARGE]
    assert at_bytes(best, 100.0) == pytest.approx([0.65, 0.75])  # halfway from 10 to 1000
    assert at_bytes(best, 1.0) == pytest.approx([0.5, 0.7])  # its ends go on
    assert at_accuracy(best, 0.7) == pytest.approx(100.0)  # halfway from 0.6 to 0.8
    assert np.isnan(at_accuracy(best, 0.81))


def test_the_interquartile_mean_by_hand() -> None:
    assert interquartile_mean(np.array([100.0, 2.0, 4.0, -50.0])) == 3.0
    # of five, the middle 2.5: all of the third, three quarters of its neighbours
    assert interquartile_mean(np.array([0.0, 1.0, 2.0, 5.0, 9.0])) == pytest.approx((0.75 + 2 + 3.75) / 2.5)
    assert interquartile_mean(np.array([7.0])) == 7.0


def test_whoever_tunes_pays_for_all_trials() -> None:
    first = judged("first", "constant", [10.0, 20.0], [0.5, 0.7])  # validation 0.7, 0.5
    second = judged("second", "constant", [1.0, 2.0], [0.6, 0.65])  # validation 0.65, 0.6
    best = tuned([first, second])
    assert best.accuracy.tolist() == [0.5, 0.65]  # chosen by validation, not by the test set
    assert best.bytes.tolist() == [11.0, 22.0]


def test_an_interval_holds_the_mean_and_shrinks_to_a_point() -> None:
    low, high = interval(np.array([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert low < 0.3 < high
    assert interval(np.array([0.3, 0.3, 0.3])) == pytest.approx((0.3, 0.3))


def test_the_table_says_points_and_bytes() -> None:
    agent = judged("agent", "agent", [100.0, 100.0], [0.7, 0.8])
    (table,) = judge.tables([SMALL, LARGE, WASTE, agent])
    rows = {row[0]: row for row in table.rows}
    assert rows["agent"][4].startswith("+5.0")
    assert rows["agent"][5] == f"{100 / 10**2.5:.2f}×"  # 0.75 is three quarters of the way to 0.8
    assert rows["small"][4] == rows["large"][5] == "on it"
    assert rows["waste"][5] == "10.00×"


def test_runs_are_read_by_what_they_are(tmp_path) -> None:
    for seed in (0, 1):
        shared = {"seed": seed}
        staged = {"name": "staged", "lr": 0.1, "policy": "schedule"}
        write_run(tmp_path / f"a{seed}", shared | {"method": staged}, test=0.8, up=1e6)
        write_run(tmp_path / f"b{seed}", shared | {"method": staged | {"policy": "agent"}}, test=0.7, up=2e6)
        write_run(tmp_path / f"c{seed}", shared | {"method": {"name": "prunefl", "lr": 0.1}}, test=0.6)
    found = judge.read(tmp_path)
    assert [one.kind for one in found] == ["schedule", "agent", "other"]
    assert found[0].bytes.tolist() == [6e6, 6e6]  # two rounds, a million up and two down
    assert found[1].accuracy.tolist() == [0.7, 0.7]


def test_a_sweep_with_a_seed_missing_is_refused(tmp_path) -> None:
    write_run(tmp_path / "a", {"seed": 0})
    write_run(tmp_path / "b", {"seed": 1})
    write_run(tmp_path / "c", {"seed": 0, "method": {"name": "prunefl", "lr": 0.1}})
    with pytest.raises(ConfigError, match="different seeds"):
        judge.read(tmp_path)
    with pytest.raises(ConfigError, match="no schedule and no constant"):
        judge.tables([judged("agent", "agent", [1.0], [0.5])])
