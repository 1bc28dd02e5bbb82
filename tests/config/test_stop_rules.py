"""Targets and budgets of a sweep: when a trial ends, and which are refused."""

from math import inf, nan

import pytest

from fedray.config.stop_rules import Targets
from fedray.config.tune_config import tune_config
from fedray.errors import ConfigError
from fedray.sweeps.space import Sweep


@pytest.mark.parametrize(
    "metric, target, goes_on, ends",
    [
        ("val/accuracy", 0.9, 0.89, 0.9),
        ("val/loss", 0.5, 0.51, 0.5),
        ("density/global", 0.1, 0.2, 0.1),
        ("total/bytes/up", 1e6, 999_999.0, 1e6),
    ],
)
def test_a_target_has_the_direction_of_its_metric(metric, target, goes_on, ends):
    assert Targets({metric: target})(1, {metric: goes_on}) is None
    for nothing in ({}, {metric: None}, {metric: nan}, {metric: inf}):
        assert Targets({metric: target})(1, nothing) is None
    assert (Targets({metric: target})(1, {metric: ends}) or "").startswith(metric)


def test_any_of_several_targets_ends_a_trial():
    targets = Targets({"val/accuracy": 0.9, "round": 3})
    assert [targets(round, {"val/accuracy": 0.1}) for round in range(5)][:3] == [None] * 3
    assert targets(3, {}) == "round 3 ≥ 3"


def test_the_set_up_ends_no_trial():
    assert Targets({"val/loss": 3.0})(0, {"val/loss": 2.0}) is None


def test_a_trial_ends_where_it_is_evaluated():
    targets = Targets({"total/bytes/up": 10.0}, every=4)
    found = [targets(round, {"total/bytes/up": 5.0 * round}) for round in range(5)]
    assert found == [None, None, None, None, "total/bytes/up 10 ≥ 10"]


def test_the_mode_is_the_direction_of_a_method_s_own_metric():
    tune = tune_config({"metric": "method/factor", "mode": "max", "stop": {"method/factor": 2.0}}, "x")
    targets = Targets(tune.stop, tune.direction_of)
    assert targets(1, {"method/factor": 1.0}) is None
    assert targets(2, {"method/factor": 2.0}) is not None


@pytest.mark.parametrize(
    "tune, message",
    [
        (
            "{stop: {val/acuracy: 0.9}}",
            "tune.stop.val/acuracy (x.yaml): unknown metric 'val/acuracy'; did you ",
        ),
        (
            "{stop: {val/accuracy: 90}}",
            "tune.stop.val/accuracy (x.yaml): got 90; val/accuracy is a share between",
        ),
        ("{stop: {val/accuracy: .nan}}", "tune.stop.val/accuracy (x.yaml): got nan; must be a finite number"),
        ("{stop: {test/accuracy: 0.9}}", "tune.stop.test/accuracy (x.yaml): unknown metric 'test/accuracy'"),
        (
            "{stop: {clients/selected: 3}}",
            "tune.stop.clients/selected (x.yaml): clients/selected has no direction",
        ),
        (
            "{stop: {method/factor: 3}}",
            "tune.stop.method/factor (x.yaml): method/factor has no direction that",
        ),
        (
            "{stop: {train/distance: 3}}",
            "tune.stop.train/distance (x.yaml): train/distance has no direction that",
        ),
        ("{stop: {round: 0}}", "tune.stop.round (x.yaml): got 0; must be a whole number of at least 1"),
        ("{stop: {round: 2.5}}", "tune.stop.round (x.yaml): got 2.5; must be a whole number"),
        (
            "{stop: {round: 13}}",
            "tune.stop.round (x.yaml): 13 is more than the 12 rounds of the longest trial",
        ),
        (
            "{stop: {round: 3}}",
            "tune.stop.round (x.yaml): got 3, but rounds are evaluated every 2 (eval_every); ",
        ),
        ("{stop: 0.9}", "tune.stop (x.yaml): got 0.9; must be a mapping of keys to values"),
        ("{stop: {val/accuracy: high}}", "tune.stop.val/accuracy (x.yaml): got 'high'; must be a number"),
        ("{time_budget_s: 0}", "tune.time_budget_s (x.yaml): got 0; must be greater than 0"),
        ("{time_budget_s: -5}", "tune.time_budget_s (x.yaml): got -5; must be greater than 0"),
        ("{time_budget_s: .inf}", "tune.time_budget_s (x.yaml): got inf; must be a finite number"),
        ("{time_budget_s: 1h}", "tune.time_budget_s (x.yaml): got '1h'; must be a number"),
    ],
)
def test_what_ends_nothing_is_one_message(in_tmp, tune, message):
    (in_tmp / "x.yaml").write_text(f"base: {{rounds: 12, eval_every: 2}}\ntune: {tune}")
    with pytest.raises(ConfigError) as caught:
        Sweep.load("x.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_target_needs_the_data_that_measure_it(in_tmp):
    (in_tmp / "x.yaml").write_text("base: {data: {validation_fraction: 0}}\ntune: {stop: {val/loss: 0.1}}")
    with pytest.raises(ConfigError, match=r"tune\.stop\.val/loss .*validation_fraction=0 leaves no examples"):
        Sweep.load("x.yaml")


def test_an_override_gives_a_target(in_tmp):
    (in_tmp / "x.yaml").write_text("tune: {stop: {val/accuracy: 0.9}}")
    sweep = Sweep.load("x.yaml", ["tune.stop.round=5", "tune.stop.val/accuracy=0.8", "tune.time_budget_s=60"])
    assert dict(sweep.tune.stop) == {"val/accuracy": 0.8, "round": 5}
    assert sweep.tune.time_budget_s == 60
