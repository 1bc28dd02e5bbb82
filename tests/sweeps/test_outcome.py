"""The best point of a sweep: by the mean over its seeds, and as a config that `fedray run` takes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedray.config.run_config import RunConfig
from fedray.durable import read_mapping
from fedray.sweeps.outcome import BEST, Status, SweepResult, Trial, record_best
from fedray.sweeps.space import Point
from fedray.types import Direction
from tests.experiment import tiny

METRIC = "val/accuracy"


def trial(folder: Path, value: float | None, status: Status = "finished", **changes: Any) -> Trial:
    """Return a trial, with a result in its directory if it has finished."""
    name = ",".join(f"{key}={given}" for key, given in changes.items())
    path = folder / name
    path.mkdir(parents=True)
    if value is not None:
        (path / "result.json").write_text(json.dumps({METRIC: value, "status": status}))
    dotted = {key if key == "seed" else f"method.{key}": given for key, given in changes.items()}
    return Trial(Point(name, dotted, tiny.config(dotted)), path, status)


def result(folder: Path, *trials: Trial, direction: Direction = "max") -> SweepResult:
    return SweepResult(folder, trials, METRIC, direction)


def test_a_point_is_judged_by_the_mean_over_its_seeds(tmp_path: Path):
    lucky = [trial(tmp_path, v, lr=0.1, seed=s) for s, v in enumerate((0.9, 0.3, 0.3))]
    steady = [trial(tmp_path, v, lr=0.2, seed=s) for s, v in enumerate((0.6, 0.7, 0.8))]
    best = result(tmp_path, *lucky, *steady).best
    assert best is not None
    assert best.trials == tuple(steady)
    assert best.mean == pytest.approx(0.7)
    assert best.half == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)  # t of two degrees of freedom
    worst = result(tmp_path, *lucky, *steady, direction="min").best
    assert worst is not None
    assert worst.trials == tuple(lucky)


def test_a_point_that_lost_a_seed_does_not_win_by_the_others(tmp_path: Path):
    cut = [trial(tmp_path, 0.9, lr=0.1, seed=0), trial(tmp_path, 0.1, "stopped", lr=0.1, seed=1)]
    whole = [trial(tmp_path, 0.5, lr=0.2, seed=s) for s in (0, 1)]
    best = result(tmp_path, *cut, *whole).best
    assert best is not None
    assert best.trials == tuple(whole)
    alone = result(tmp_path, *cut).best
    assert alone is not None
    assert alone.trials == (cut[0],)
    assert math.isnan(alone.half)


@pytest.mark.parametrize("direction", ["max", "min"])
def test_nan_is_the_worst_value(tmp_path: Path, direction: Direction):
    broken, sound = trial(tmp_path, math.nan, lr=0.1), trial(tmp_path, 0.5, lr=0.2)
    best = result(tmp_path, broken, sound, direction=direction).best
    assert best is not None
    assert best.trials == (sound,)


def test_without_a_finished_trial_there_is_no_best(tmp_path: Path):
    assert result(tmp_path, trial(tmp_path, None, "failed", lr=0.1)).best is None
    assert result(tmp_path, trial(tmp_path, 0.5, "stopped", lr=0.2)).best is None
    assert result(tmp_path).best is None


def test_the_best_point_is_written_as_a_config_that_run_takes(tmp_path: Path):
    best = result(tmp_path, trial(tmp_path, 0.5, lr=0.125, seed=3)).best
    assert best is not None
    numbers = record_best(tmp_path, best, METRIC)
    assert numbers == read_mapping(tmp_path / "best.json")
    assert numbers == {
        "trials": ["lr=0.125,seed=3"],
        "metric": METRIC,
        "mean": 0.5,
        "half": None,
        "metrics": {METRIC: 0.5},
    }
    assert RunConfig.load(tmp_path / BEST) == best.trials[0].point.config
    assert RunConfig.load(tmp_path / BEST, ["rounds=7"]).rounds == 7
    assert (tmp_path / BEST).read_text().startswith("# fedray run best.yaml\n")


def test_its_metrics_are_the_means_of_numbers_that_all_its_trials_have(tmp_path: Path):
    some = [trial(tmp_path, v, lr=0.1, seed=s) for s, v in enumerate((0.25, 0.75))]
    for index, one in enumerate(some):
        known = json.loads((one.path / "result.json").read_text())
        known |= (
            {"total/bytes/up": 100 + index, "weights_sha256": "ab", "only": 1}
            if index
            else {"total/bytes/up": 100}
        )
        (one.path / "result.json").write_text(json.dumps(known))
    best = result(tmp_path, *some).best
    assert best is not None
    assert best.metrics() == {METRIC: 0.5, "total/bytes/up": 100.5}
