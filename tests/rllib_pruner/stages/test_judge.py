"""The judgement of the stage agent, with numbers worked out by hand."""

from math import nan

import numpy as np
import pytest

from fedray.errors import ConfigError
from rllib_pruner.stages import judge
from rllib_pruner.stages.judge import Judged, at_accuracy, at_bytes, front, tuned
from tests.report.rundirs import write_run


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
    assert at_bytes(best, 1e5) == pytest.approx([0.8, 0.8])  # whoever has more bytes need not use them
    assert np.isnan(at_bytes(best, 9.9)).all()  # no setting on it takes so few
    assert at_accuracy(best, 0.7) == pytest.approx(100.0)  # halfway from 0.6 to 0.8
    assert at_accuracy(best, 0.6) == pytest.approx(10.0)
    assert at_accuracy(best, 0.8) == pytest.approx(1000.0)
    assert np.isnan(at_accuracy(best, 0.81)) and np.isnan(at_accuracy(best, 0.59))


def test_whoever_tunes_pays_for_all_trials() -> None:
    first = judged("first", "constant", [10.0, 20.0], [0.5, 0.7])  # validation 0.7, 0.5
    second = judged("second", "constant", [1.0, 2.0], [0.6, 0.65])  # validation 0.65, 0.6
    best = tuned([first, second])
    assert best is not None and best.accuracy.tolist() == [0.5, 0.65]  # by validation, not by the test set
    assert best.bytes.tolist() == [11.0, 22.0]


def test_nan_is_never_the_best() -> None:
    good = judged("good", "constant", [10.0, 10.0], [0.5, 0.7])
    broken = judged("broken", "constant", [5.0, 5.0], [nan, 0.9])  # validation 0.9, NaN
    for order in ([good, broken], [broken, good]):
        assert front([*order, LARGE]) == [good, LARGE]
        best = tuned(order)
        assert best is not None and best.validation.tolist() == [0.9, 0.5]
    assert tuned([broken, broken]) is None
    (table,) = judge.tables([good, broken, LARGE])
    rows = {row[0]: row for row in table.rows}
    assert rows["broken"][2:] == ["—", rows["broken"][3], "—", "—"]
    with pytest.raises(ConfigError, match="no schedule and no constant density has a test accuracy"):
        judge.tables([broken])


def test_the_table_says_points_and_bytes() -> None:
    agent = judged("agent", "agent", [100.0, 100.0], [0.7, 0.8])
    (table,) = judge.tables([SMALL, LARGE, WASTE, agent])
    rows = {row[0]: row for row in table.rows}
    assert rows["agent"][4].startswith("+5.0")
    assert rows["agent"][5] == f"{100 / 10**2.5:.2f}×"  # 0.75 is three quarters of the way to 0.8
    assert rows["small"][4] == rows["large"][5] == "on it"
    assert rows["waste"][5] == "—", "less accurate than anything on the front"
    far = judged("far", "agent", [100.0, 100.0], [0.3, 0.3])  # 30 points below the front's worst point
    near = judged("near", "agent", [100.0, 100.0], [0.6, 0.6])
    best = judged("best", "agent", [1.0, 1.0], [0.9, 0.9])
    rows = {row[0]: row for row in judge.tables([SMALL, LARGE, far, near, best])[0].rows}
    assert rows["far"][5] == "—" and rows["near"][5] == "10.00×" and rows["best"][4:] == ["—", "—"]


def test_intervals_are_those_of_a_report() -> None:
    agent = judged("agent", "agent", [100.0] * 5, [0.60, 0.70, 0.65, 0.80, 0.75])
    constant = judged("constant", "constant", [100.0] * 5, [0.5] * 5)
    row = {row[0]: row for row in judge.tables([agent, constant])[0].rows}["agent"]
    assert row[2] == "0.700 ±0.098" and row[4] == "+20.0 ±9.8"  # 2.776 · 0.0791 / √5
    (alone,) = (r for r in judge.tables([judged("a", "constant", [1.0], [0.5])])[0].rows)
    assert alone[2] == "0.500", "one seed has no interval"


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
