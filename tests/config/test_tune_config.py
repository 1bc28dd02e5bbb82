"""What a sweep compares: each metric in its own direction, and only where every trial knows it."""

from math import inf, nan

import pytest

from fedray.comparing import worth
from fedray.config.tune_config import COMPARABLE, TuneConfig, first_rung, tune_config
from fedray.errors import ConfigError
from fedray.sweeps.space import Sweep
from fedray.types import FINAL_METRICS, METRICS, direction_of

NEITHER = {"clients/selected"}


def load(folder, text: str, *overrides: str) -> Sweep:
    (folder / "x.yaml").write_text(text, encoding="utf-8")
    return Sweep.load("x.yaml", overrides, trust=True)


def refused(folder, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


# ── better and worse
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_every_metric_has_a_direction_or_none_can_be_told():
    assert {name for name, direction in METRICS.items() if direction is None} == NEITHER & set(METRICS)
    assert not set(METRICS) & set(FINAL_METRICS)
    assert [direction_of(name) for name in FINAL_METRICS] == ["max", "min", "max"]


@pytest.mark.parametrize("metric", COMPARABLE)
def test_more_of_an_accuracy_is_better_and_less_of_all_else(metric):
    expected = None if metric in NEITHER else "max" if "accuracy" in metric else "min"
    assert direction_of(metric) == expected
    if expected is not None:
        assert tune_config({"metric": metric}, "x").direction == expected


@pytest.mark.parametrize(
    "direction, ascending", [("max", [nan, 0.1, 0.2]), ("min", [inf, 0.2, 0.1]), ("min", [None, 7.0, -7.0])]
)
def test_what_is_not_a_number_is_worth_least(direction, ascending):
    worths = [worth(value, direction) for value in ascending]
    assert worths == sorted(worths)
    assert worths[0] == -inf < worths[1] < worths[2]


@pytest.mark.parametrize(
    "tune, expected",
    [
        (
            "{metric: val/loss, mode: max}",
            "tune.mode (x.yaml): got 'max', but less of val/loss is better; leave tune.mode out, and each "
            "metric has its own direction",
        ),
        ("{mode: min}", "tune.mode (x.yaml): got 'min', but more of val/accuracy is better; …"),
        (
            "{metric: total/bytes/up, mode: max}",
            "tune.mode (x.yaml): got 'max', but less of total/bytes/up …",
        ),
        (
            "{metric: clients/selected}",
            "tune.mode (x.yaml): missing; clients/selected has no direction that …",
        ),
    ],
)
def test_a_mode_against_the_direction_of_the_metric_is_refused(in_tmp, tune, expected):
    message = refused(in_tmp, f"tune: {tune}")
    assert message == expected or (expected[-1] == "…" and message.startswith(expected[:-1].rstrip()))


def test_of_a_method_s_own_metric_the_mode_is_asked_for(in_tmp):
    base = "base: {method: {name: staged, policy: bandit}}\n"
    for scheduler in ("fifo", "asha"):
        tune = f"tune: {{metric: method/factor, scheduler: {scheduler}"
        assert refused(in_tmp, f"{base}{tune}}}").startswith("tune.mode (x.yaml): missing; method/factor has")
        assert load(in_tmp, f"{base}{tune}, mode: min}}").tune.direction == "min"


# ── which metrics there are
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "base, tune, expected",
    [
        (
            "{data: {validation_fraction: 0}}",
            "{metric: val/accuracy}",
            "tune.metric (x.yaml): val/accuracy, but data.validation_fraction=0 leaves no examples to "
            "measure it on; set it, e.g. data.validation_fraction=0.1, or compare by another metric, e.g. "
            "train/loss",
        ),
        (
            "{data: {validation_fraction: 0}}",
            "{metric: val/loss}",
            "tune.metric (x.yaml): val/loss, but data.…",
        ),
        (
            "{data: {validation_fraction: 0}}",
            "{scheduler: asha}",
            "tune.metric (x.yaml): val/accuracy, but …",
        ),
        (
            "{}",
            "{metric: train/los, mode: min}",
            "tune.metric (x.yaml): 'train/los' is not among what fedavg reports with these options; did you "
            "mean 'train/loss'? It reports train/loss",
        ),
        (
            "{method: {name: prunefl}}",
            "{metric: method/importance, mode: max}",
            "tune.metric (x.yaml): 'method/importance' is not among what prunefl reports with these options. "
            "It reports no method/…",
        ),
        (
            "{method: {name: staged, policy: bandit}}",
            "{metric: method/acton, mode: max}",
            "tune.metric (x.yaml): 'method/acton' is not among what staged reports with these options; did "
            "you mean 'method/action'? It reports method/action, method/asked, method/factor, "
            "method/preference, train/moved",
        ),
        (
            "{method: {name: staged}}",
            "{metric: method/action, mode: max}",
            "tune.metric (x.yaml): 'method/act…",
        ),
    ],
)
def test_a_metric_that_some_trial_never_has_is_refused(in_tmp, base, tune, expected):
    message = refused(in_tmp, f"base: {base}\ntune: {tune}")
    assert message == expected or (expected[-1] == "…" and message.startswith(expected[:-1].rstrip()))


def test_a_metric_must_be_known_in_every_point(in_tmp):
    space = "space: {method: {grid: [{name: fedavg}, {name: staged, policy: bandit}]}}\n"
    message = refused(in_tmp, f"{space}tune: {{metric: method/action, mode: max}}")
    assert "not among what fedavg reports" in message


def test_nothing_is_asked_of_a_metric_that_decides_nothing(in_tmp):
    assert load(in_tmp, "base: {data: {validation_fraction: 0}}").tune.metric == "val/accuracy"


MINE = """
from dataclasses import dataclass
from fedray.federation.method import Method
from fedray.methods import METHODS

@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    def measures(self, state):
        return {"mine": 1.0}

@dataclass(frozen=True, kw_only=True)
class Told(Mine):
    @property
    def metric_names(self):
        return ("method/mine",)

METHODS |= {"mine": Mine, "told": Told}
"""


def test_a_method_of_a_user_s_own_may_say_what_it_measures(in_tmp):
    (in_tmp / "mine.py").write_text(MINE)
    for name in ("mine", "told"):
        base = f"base: {{imports: [mine.py], method: {{name: {name}}}}}\n"
        assert load(in_tmp, f"{base}tune: {{metric: method/mine, mode: max}}")
        misspelt = f"{base}tune: {{metric: method/mein, mode: max}}"
        if name == "mine":  # shows in the run
            assert load(in_tmp, misspelt)
        else:
            assert "did you mean 'method/mine'?" in refused(in_tmp, misspelt)


# ── rungs
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "base, tune, expected",
    [
        ("{rounds: 100}", "{}", 25),
        ("{rounds: 2}", "{}", 1),
        ("{rounds: 100, eval_every: 10}", "{}", 30),
        ("{rounds: 100, eval_every: 10}", "{metric: train/loss}", 25),
        ("{rounds: 5, eval_every: 10}", "{}", 5),
        ("{rounds: 100, eval_every: 10}", "{grace_rounds: 40}", 40),
        ("{rounds: 100, eval_every: 10}", "{grace_rounds: 100}", 100),
    ],
)
def test_the_first_rung_is_at_an_evaluated_round(in_tmp, base, tune, expected):
    sweep = load(in_tmp, f"base: {base}\ntune: {tune}", "tune.scheduler=asha")
    assert first_rung(sweep.tune, [point.config for point in sweep.points]) == expected


def test_the_first_rung_is_one_of_all_points(in_tmp):
    text = "base: {rounds: 100}\nspace: {eval_every: {grid: [4, 6]}}\ntune: {scheduler: asha}"
    sweep = load(in_tmp, text)
    assert first_rung(sweep.tune, [point.config for point in sweep.points]) == 36


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "base: {rounds: 10}\ntune: {scheduler: asha, grace_rounds: 11}",
            "tune.grace_rounds (x.yaml): 11 is more than the 10 rounds of the longest trial, so that asha "
            "would stop none; lower it, or set tune.scheduler=fifo",
        ),
        (
            "base: {rounds: 100, eval_every: 10}\ntune: {scheduler: asha, grace_rounds: 25}",
            "tune.grace_rounds (x.yaml): got 25, but val/accuracy is only known every 10 rounds "
            "(eval_every); 20 or 30 would do",
        ),
        (
            "tune: {grace_rounds: 5}",
            "tune.grace_rounds (x.yaml): only asha and median have it; set tune.scheduler=asha, …",
        ),
        (
            "tune: {reduction: 4}",
            "tune.reduction (x.yaml): only asha and hyperband have it; set tune.scheduler=asha, …",
        ),
        (
            "tune: {scheduler: hyperband, grace_rounds: 4}",
            "tune.grace_rounds (x.yaml): hyperband has no such option; asha and median have it; leave it out",
        ),
        (
            "tune: {scheduler: {name: asha, reduction: 4}, reduction: 4}",
            "tune.reduction (x.yaml): given twice: leave it out here, or in tune.scheduler (asha)",
        ),
        (
            "tune: {scheduler: {name: median, reduction: 4}}",
            "tune.scheduler.reduction (x.yaml): median has no such option; asha, hyperband can have it. …",
        ),
        (
            "base: {rounds: 10}\ntune: {scheduler: {name: median, grace_rounds: 11}}",
            "tune.scheduler.grace_rounds (x.yaml): 11 is more than the 10 rounds of the longest trial, so "
            "that median would stop none; …",
        ),
        ("tune: {scheduler: 3}", "tune.scheduler (x.yaml): got 3; must be one of fifo, asha, …"),
        (
            "space: {seed: {grid: [1, 2]}}\ntune: {num_samples: 3}",
            "tune.num_samples (x.yaml): 3, but space draws nothing at random, so that all samples would be "
            "alike; leave it out, draw a key, e.g. {loguniform: [0.01, 0.3]}, or make a grid of seeds",
        ),
        (
            "space: {method.lr: {grid: [0.1]}}\ntune: {seed: 3}",
            "tune.seed (x.yaml): 3, but space draws nothing at random; the seed of the runs is the key seed "
            "in base",
        ),
        (
            "space: {tracking.experiment: {grid: [a, b]}}",
            "space.tracking.experiment (x.yaml): all trials are tracked in one store, as children of one "
            "run: set tracking.experiment in base",
        ),
        (
            "space: {tracking: {grid: [{uri: none}]}}",
            "space.tracking (x.yaml): all trials are tracked in one …",
        ),
        ("space: {imports: {grid: [[a.py]]}}", "space.imports (x.yaml): all trials choose from the same …"),
    ],
)
def test_a_setting_without_effect_is_refused(in_tmp, text, expected):
    message = refused(in_tmp, text)
    assert message == expected or (expected[-1] == "…" and message.startswith(expected[:-1].rstrip()))


def test_an_override_that_fixes_what_was_drawn_leaves_one_sample(in_tmp):
    text = "space: {method.lr: {uniform: [0.1, 0.2]}}\ntune: {num_samples: 3, seed: 1}"
    assert len(load(in_tmp, text).points) == 3
    assert len(load(in_tmp, text, "method.lr=0.1").points) == 1


def test_the_default_compares_nothing_but_names_the_best():
    assert not TuneConfig().compares
    assert TuneConfig().direction == "max"


# ── paths
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_paths_of_base_and_points_hold_from_anywhere(in_tmp):
    (in_tmp / "mine.py").write_text(MINE)
    base = "base: {imports: [mine.py], data: {root: there}}\n"
    sweep = load(in_tmp, f"{base}space: {{data.root: {{grid: [a, b/c]}}}}")
    assert [point.changes for point in sweep.points] == [
        {"data.root": f"{in_tmp}/a"},
        {"data.root": f"{in_tmp}/b/c"},
    ]
    assert sweep.tree["base"] == {"imports": [f"{in_tmp}/mine.py"], "data": {"root": f"{in_tmp}/there"}}
    assert [point.name for point in sweep.points] == ["00-root=a", "01-root=c"]
    again = Sweep.of("x", sweep.tree, sweep.tune, [point.changes for point in sweep.points], "sweep.yaml")
    assert again == sweep
