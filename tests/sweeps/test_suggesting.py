"""Sweeps that search, without Tune: what is suggested, refused, written down, and known after a resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from fedray.durable import read_lines
from fedray.errors import ConfigError, RunError
from fedray.sweeps.outcome import STOPPED, SweepResult, Trial, status_of
from fedray.sweeps.pareto import front, hypervolume
from fedray.sweeps.searchers import Told, proposer
from fedray.sweeps.space import Point, Sweep
from fedray.sweeps.suggesting import MOST_IN_VAIN, POINTS, Suggestions, drawn, search_ended
from tests.experiment.tiny import TREE

LR = {"method.lr": {"loguniform": [0.01, 0.3]}}
TPE = {"search": {"name": "optuna", "n_startup_trials": 2}, "num_samples": 6}
TWO = {
    "search": {"name": "optuna", "population_size": 3},
    "objectives": {"val/accuracy": "max", "total/bytes/up": None},
    "num_samples": 8,
}


@pytest.fixture
def plan(tmp_path: Path):
    def load(tune: dict[str, Any], space: dict[str, Any] = LR, **base: Any) -> Sweep:
        file = tmp_path / "some.yaml"
        tree = {"base": override_tree(TREE, base), "space": space, "tune": tune}
        file.write_text(yaml_text.dump(tree))
        return Sweep.load(file)

    return load


def finish(path: Path, point: Point, **more: Any) -> None:
    """Write what a run leaves behind: accuracy and bytes depend on the learning rate and the seed."""
    place = path / "trials" / point.name
    place.mkdir(parents=True, exist_ok=True)
    lr = point.config.method.options.lr
    result = {
        "status": "finished",
        "val/accuracy": 1 - abs(lr - 0.1) + 0.01 * point.config.seed,
        "total/bytes/up": 1e5 * lr,
        "density/global": 1.0,
    }
    (place / "config.yaml").write_text("x: 1\n")
    (place / "result.json").write_text(json.dumps(result | more))


def opened(plan: Sweep, path: Path, check: Any = lambda point: None) -> Suggestions:
    return Suggestions(plan, path, proposer(plan.tune, plan.tree["space"]), check)


def lines(path: Path) -> list[dict[str, Any]]:
    return read_lines(path / POINTS)


def all_of(suggestions: Suggestions, path: Path, most: int = 100, *, accuracy: Any = "own") -> list[str]:
    """Run trials one after the other; return their names."""
    names: list[str] = []
    while len(names) < most and (point := suggestions.next()) is not None:
        finish(path, point, **({} if accuracy == "own" else {"val/accuracy": accuracy}))
        suggestions.ended(point.name)
        names.append(point.name)
    return names


MIXED = {
    "method": {"grid": [{"name": "fedavg"}, {"name": "snip", "density": 0.2}]},
    "method.lr": {"loguniform": [0.01, 0.3]},
    "method.batch_size": {"qrandint": [4, 12, 4]},
}


@pytest.mark.parametrize(
    ("tune", "space"),
    [
        (TPE, MIXED),
        (TWO, MIXED),
        (TPE | {"search": {"name": "hyperopt", "n_initial_points": 2}}, MIXED),
        (TPE | {"repeat": [0, 3]}, LR),
        (TPE | {"points_to_evaluate": [{"method.lr": 0.05}]}, LR),
        (TPE | {"constraints": {"total/bytes/up": "<= 9000"}}, LR),
    ],
    ids=["tpe", "nsga2", "hyperopt", "repeat", "first points", "constraints"],
)
@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_resumed_search_suggests_what_an_undisturbed_one_does(plan, tmp_path, tune, space, killed_after):
    made = plan(tune, space)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = all_of(opened(made, tmp_path / "whole"), tmp_path / "whole")
    path = tmp_path / "killed"
    first = opened(made, path)
    all_of(first, path, killed_after)
    point = first.next()  # it finishes, but the driver is killed before the searcher is told
    assert point is not None
    finish(path, point)
    all_of(opened(made, path), path)
    assert lines(path) == lines(tmp_path / "whole")
    assert len(whole) == tune["num_samples"] * len(tune.get("repeat", [0]))
    assert len(set(whole)) == len(whole)


def test_an_interrupted_trial_comes_first_after_a_resume(plan, tmp_path):
    made = plan(TPE)
    first = opened(made, tmp_path)
    all_of(first, tmp_path, 2)
    begun = first.next()
    again = opened(made, tmp_path).next()
    assert begun is not None and again is not None
    assert begun.name == again.name and begun.config == again.config


def test_a_torn_last_line_was_never_written(plan, tmp_path):
    made = plan(TPE)
    all_of(opened(made, tmp_path), tmp_path, 2)
    whole = (tmp_path / POINTS).read_bytes()
    (tmp_path / POINTS).write_bytes(whole + b'{"suggested": 2, "chan')
    opened(made, tmp_path)
    assert (tmp_path / POINTS).read_bytes() == whole


def test_another_searcher_than_the_files_is_refused(plan, tmp_path):
    made = plan(TPE)
    all_of(opened(made, tmp_path), tmp_path, 3)
    other = replace(made, tune=made.tune.model_copy(update={"seed": 5}))
    with pytest.raises(RunError, match=r"cannot continue as if undisturbed.*written with optuna \d"):
        opened(other, tmp_path)


def test_a_point_that_cannot_run_costs_no_trial_and_is_kept_with_its_reason(plan, tmp_path):
    made = plan(TPE)

    def check(point: Point) -> None:
        if point.config.method.options.lr > 0.1:
            raise ConfigError("method.lr: too fast")

    names = all_of(opened(made, tmp_path, check), tmp_path)
    refused = [line for line in lines(tmp_path) if "problem" in line]
    assert len(names) == 6 and refused
    assert all(line["problem"] == "method.lr: too fast" and "trials" not in line for line in refused)
    assert [point.name for point in drawn(made, tmp_path)] == names
    before = lines(tmp_path)
    assert opened(made, tmp_path, check).next() is None
    assert lines(tmp_path) == before


def test_a_search_that_finds_no_point_ends_with_the_reason(plan, tmp_path):
    def check(point: Point) -> None:
        raise ConfigError("method.lr: never")

    made = plan(TPE)
    assert opened(made, tmp_path, check).next() is None
    assert f"{MOST_IN_VAIN} points in a row" in (search_ended(tmp_path) or "")
    assert (search_ended(tmp_path) or "").endswith("method.lr: never")
    assert opened(made, tmp_path).next() is None  # also after a resume


def test_a_known_point_is_not_run_again(plan, tmp_path):
    made = plan(TPE, {"method.lr": {"choice": [0.1, 0.2, 0.05]}})
    names = all_of(opened(made, tmp_path), tmp_path)
    assert len(names) == 3
    assert any("same_as" in line for line in lines(tmp_path))
    assert "space has no others" in (search_ended(tmp_path) or "")


def test_a_point_is_judged_by_the_mean_over_its_seeds(plan, tmp_path):
    made = plan(TPE | {"repeat": [0, 4], "num_samples": 1})
    suggestions = opened(made, tmp_path)
    first = suggestions.next()
    assert first is not None
    finish(tmp_path, first)
    suggestions.ended(first.name)
    assert not any("told" in line for line in lines(tmp_path))
    all_of(suggestions, tmp_path)
    told = lines(tmp_path)[-1]
    lr = first.config.method.options.lr
    assert told["values"]["val/accuracy"] == pytest.approx(1 - abs(lr - 0.1) + 0.02)


def test_a_trial_that_failed_for_good_tells_the_searcher_so(plan, tmp_path):
    made = plan(TPE | {"num_samples": 2})
    suggestions = opened(made, tmp_path)
    first = suggestions.next()
    assert first is not None
    suggestions.ended(first.name)  # interrupted: no result
    assert not any("told" in line for line in lines(tmp_path))
    suggestions.ended(first.name, error=True)
    assert lines(tmp_path)[-1] == {"told": 0, "failed": True}
    assert suggestions.next() is not None


def test_a_stopped_trial_is_told_where_it_was_stopped_and_pruned_in_optuna(plan, tmp_path):
    made = plan(TPE | {"scheduler": "asha"})
    suggestions = opened(made, tmp_path)
    point = suggestions.next()
    assert point is not None
    place = tmp_path / "trials" / point.name
    place.mkdir(parents=True)
    (place / "config.yaml").write_text("x: 1\n")
    (place / STOPPED).write_text(json.dumps({"round": 2}))
    rows = [{"round": n, "metrics": {"val/accuracy": n / 10}} for n in range(4)]
    (place / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suggestions.ended(point.name)
    assert lines(tmp_path)[-1] == {"told": 0, "values": {"val/accuracy": 0.2}, "stopped": 2}
    (trial,) = suggestions.searcher.inner._ot_study.trials  # type: ignore[attr-defined]
    assert trial.state.name == "PRUNED" and trial.intermediate_values == {2: 0.2}


@pytest.mark.parametrize("name", ["optuna", "hyperopt"])
def test_a_diverged_run_is_the_worst_and_no_fault(plan, tmp_path, name):
    made = plan(TPE | {"search": name})
    names = all_of(opened(made, tmp_path), tmp_path, accuracy=None)
    assert len(names) == 6


def test_limits_reach_optuna(plan):
    made = plan(TPE | {"constraints": {"density/global": "<= 0.1"}})
    searcher: Any = proposer(made.tune, made.tree["space"])
    searcher.propose()
    searcher.tell(0, Told({"val/accuracy": 0.5, "density/global": 0.3}))
    (trial,) = searcher.inner._ot_study.trials
    assert list(trial.constraints.values()) == [pytest.approx(0.2)]


def outcome(plan: Sweep, path: Path) -> SweepResult:
    trials = []
    for point in plan.points:
        place = path / "trials" / point.name
        trials.append(Trial(point, place, status_of(place)))
    tune = plan.tune
    return SweepResult(path, tuple(trials), tune.metric, tune.direction, None, tune.directions, tune.limits)


def test_the_pareto_set_and_the_best_point_keep_the_limits(plan, tmp_path):
    tune = {
        "objectives": {"val/accuracy": "max", "total/bytes/up": "min"},
        "constraints": {"total/bytes/up": "<= 9000"},
    }
    made = plan(tune, {"method.lr": {"grid": [0.02, 0.05, 0.1, 0.2]}})
    for point in made.points:
        finish(tmp_path, point)
    found = outcome(made, tmp_path)
    rates = [best.trials[0].point.config.method.options.lr for best in found.pareto]
    assert rates == [0.05, 0.02]  # 0.1 is beyond the limit, 0.2 is worse than 0.1 in both
    assert found.best is not None
    assert found.best.trials[0].point.config.method.options.lr == 0.05


def test_front_and_hypervolume_by_hand():
    values = [(0.9, 10.0), (0.8, 5.0), (0.8, 6.0), (0.7, 1.0), (float("nan"), 0.0)]
    assert front(values, ["max", "min"]) == [0, 1, 3]
    area = hypervolume(values[:4], ("max", "min"), (0.5, 20.0))
    assert area == pytest.approx(0.4 * 10 + 0.3 * 5 + 0.2 * 4)


def test_random_points_and_first_points_and_seeds_are_drawn_before_the_start(plan):
    tune = {
        "search": "random",
        "num_samples": 3,
        "points_to_evaluate": [{"method.lr": 0.07}],
        "repeat": [1, 2],
    }
    made = plan(tune)
    assert len(made.points) == 8
    assert [point.changes["seed"] for point in made.points[:4]] == [1, 2, 1, 2]
    assert made.points[0].changes["method.lr"] == made.points[1].changes["method.lr"] == 0.07


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"search": "optina"}, LR, "unknown search 'optina'; did you mean 'optuna'?"),
    ({"search": "optuna"}, LR, "tune.num_samples .*: missing; how many points optuna tries"),
    ({"search": "random"}, LR, "tune.num_samples .*: missing"),
    (
        TPE | {"search": {"name": "optuna", "gamma": 0.2}},
        LR,
        "optuna has no such option; hyperopt can have it",
    ),
    (TPE | {"search": {"name": "optuna", "population_size": 5}}, LR, "tpe has no such option"),
    (TPE | {"objectives": {"val/accuracy": "max"}}, LR, "got only val/accuracy; give two or more"),
    (
        TWO | {"objectives": {"val/accuracy": "min", "total/bytes/up": None}},
        LR,
        "more of val/accuracy is better",
    ),
    (TWO | {"objectives": {"val/acuracy": "max", "total/bytes/up": None}}, LR, "did you mean 'val/accuracy'"),
    (TWO | {"objectives": {"val/accuracy": "max", "method/x": None}}, LR, "method/x has no direction"),
    (TWO | {"objectives": {"val/accuracy": "max", "method/x": "max"}}, LR, "'method/x' is not among what"),
    (TWO | {"scheduler": "asha"}, LR, "a stopped trial has not paid all its costs"),
    (TWO | {"search": "hyperopt"}, LR, "hyperopt searches for one metric"),
    (TPE | {"scheduler": "hyperband"}, LR, "hyperband needs all trials from the start"),
    (TPE | {"constraints": {"density/global": "0.1"}}, LR, "write a limit, e.g. '<= 0.1'"),
    (TPE, {"method.lr": {"randn": [0.1, 0.01]}}, "optuna cannot draw randn; it draws choice, grid, "),
    (TPE, {"method.lr": {"qloguniform": [0.1, 0.2, 0.1]}}, "optuna cannot draw qloguniform"),
    (TPE, {"method.rl": {"uniform": [0.1, 0.2]}}, "method.rl .*: .*did you mean 'lr'"),
    (TPE, {"method.lr": {"uniform": [-1.0, 0.2]}}, "must be greater than"),
    (TPE, {}, "space has no key that it could change"),
    (TPE | {"repeat": [0, 1]}, LR | {"seed": {"grid": [0, 1]}}, "space.seed has seeds too"),
    (TPE | {"repeat": [1, 1]}, LR, "each seed once"),
    (TPE | {"points_to_evaluate": [{"method.lr": 0.9}]}, LR, "method.lr=0.9 is outside {loguniform:"),
    (
        TPE | {"points_to_evaluate": [{"method.l": 0.1}]},
        LR,
        "space has no 'method.l'; did you mean 'method.lr'",
    ),
    ({"points_to_evaluate": [{}]}, LR, "lacks method.lr; a point gives every key"),
]


@pytest.mark.parametrize(("tune", "space", "message"), BAD, ids=[case[2][:50] for case in BAD])
def test_bad_input_is_refused_before_anything_begins(plan, tune, space, message):
    with pytest.raises(ConfigError, match=message):
        plan(tune, space)


def test_a_missing_package_is_named_with_the_command_that_brings_it(plan, monkeypatch):
    monkeypatch.setattr("fedray.config.searches.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"optuna needs the package optuna: pip install 'fedray\[optuna\]'"):
        plan(TPE)


def test_a_sweep_that_ends_says_that_there_are_no_more_points() -> None:
    from ray.tune.search import Searcher

    from fedray.sweeps.suggester import Suggester

    suggester = Suggester(None, lambda: True)  # type: ignore[arg-type]  # it asks for no point
    assert suggester.suggest("1") == Searcher.FINISHED  # Tune waits for ever for a searcher that has none now
