"""How a sweep ends, in MLflow and on disk: by itself, with failed trials, by a signal, or broken.

Its trials are made in process, one after the other; that Tune ends them is tried in test_sweep.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.errors import FedrayError
from fedray.experiment.run import run
from fedray.sweeps import sweep as sweeps
from fedray.sweeps.nodes import Disk
from fedray.sweeps.outcome import SweepResult
from fedray.sweeps.space import Point, Sweep
from fedray.sweeps.sweep import resume_sweep, sweep
from fedray.tracking.mlflow_run import MLflowTracker
from fedray.tracking.store import prepare_store
from fedray.tracking.tracked import Tracking
from tests.experiment import tiny

Fit = Callable[[Sequence[Point], Path, Tracking], dict[str, str]]


@pytest.fixture
def uri(in_tmp: Path) -> str:
    uri = f"sqlite:///{in_tmp}/mlflow.db"
    assert prepare_store(uri, "fedray").problem is None
    return uri


@pytest.fixture
def fitting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Fit], None]]:
    """Set what Tune does with the points that wait."""
    monkeypatch.setattr(sweeps, "start_ray", lambda *_: None)
    monkeypatch.setattr(sweeps, "_check_rooms", lambda plan: None)

    def set_it(fit: Fit) -> None:
        def fitted(plan: Any, points: Any, disk: Disk, tracking: Tracking, *_: Any) -> Any:
            return fit(points, disk.path, tracking)

        monkeypatch.setattr(sweeps, "_fit", fitted)

    yield set_it


def plan(folder: Path, uri: str) -> Sweep:
    file = folder / "some.yaml"
    base = tiny.TREE | {"tracking": {"uri": uri}}
    file.write_text(yaml_text.dump({"base": base, "space": {"seed": {"grid": [0, 1, 2]}}}))
    return Sweep.load(file)


def trial(point: Point, path: Path, tracking: Tracking, error: type[BaseException] | None = None) -> None:
    """Make a trial, or let it end after round 1."""
    own = Tracking(store=tracking.store, parent=tracking.parent, name=point.name)
    on_round = None if error is None else tiny.ending(1, error)
    with suppress(FedrayError):
        run(point.config, out=path / "trials" / point.name, on_round=on_round, tracking=own)


def cut(point: Point, path: Path, tracking: Tracking) -> None:
    """Make a trial whose process is ended from outside: MLflow is not told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLflowTracker, "finish", lambda self, *_: self.close())
        trial(point, path, tracking, FedrayError)


def all_well(points: Sequence[Point], path: Path, tracking: Tracking) -> dict[str, str]:
    from fedray.experiment.run import resume

    for point in points:
        place = path / "trials" / point.name
        own = Tracking(store=tracking.store, parent=tracking.parent, name=point.name)
        resume(place, tracking=own) if place.exists() else trial(point, path, tracking)
    return {}


def told(uri: str) -> tuple[Any, list[str]]:
    """Return the sweep's run in MLflow, and the statuses of its trials by name."""
    from mlflow import MlflowClient

    runs = MlflowClient(uri).search_runs(["1"])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} <= {parent.info.run_id}
    return parent, [run.info.status for run in sorted(trials, key=lambda run: str(run.info.run_name))]


def counts(parent: Any) -> dict[str, str]:
    return {key: value for key, value in parent.data.tags.items() if key.startswith("trials_")}


def test_a_sweep_with_a_failed_trial_ends_failed_and_says_how_many(
    uri: str, in_tmp: Path, fitting: Callable[[Fit], None]
) -> None:
    def fit(points: Sequence[Point], path: Path, tracking: Tracking) -> dict[str, str]:
        trial(points[0], path, tracking)
        trial(points[1], path, tracking, FedrayError)
        cut(points[2], path, tracking)  # its process died
        return {points[1].name: "broke"}

    fitting(fit)
    made = sweep(plan(in_tmp, uri), out="s")
    assert [trial.status for trial in made.trials] == ["finished", "failed", "failed"]
    parent, statuses = told(uri)
    assert (parent.info.status, statuses) == ("FAILED", ["FINISHED", "FAILED", "FAILED"])
    assert counts(parent) == {
        "trials_finished": "1",
        "trials_stopped": "0",
        "trials_failed": "2",
        "trials_missing": "0",
    }
    fitting(all_well)
    resume_sweep("s")
    parent, statuses = told(uri)
    assert (parent.info.status, statuses) == ("FINISHED", ["FINISHED"] * 3)
    assert counts(parent)["trials_finished"] == "3"


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_ends_the_sweep_and_the_trials_that_were_cut_as_killed(
    number: int,
    error: type[BaseException],
    uri: str,
    in_tmp: Path,
    fitting: Callable[[Fit], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fit(points: Sequence[Point], path: Path, tracking: Tracking) -> dict[str, str]:
        trial(points[0], path, tracking)
        cut(points[1], path, tracking)
        os.kill(os.getpid(), number)
        return {}

    fitting(fit)
    with pytest.raises(error) as ended:
        sweep(plan(in_tmp, uri), out="s")
    assert getattr(ended.value, "code", 128 + number) == 128 + number
    assert caplog.messages[-1].startswith("interrupted; `fedray resume s`")
    parent, statuses = told(uri)
    assert (parent.info.status, statuses) == ("KILLED", ["FINISHED", "KILLED"])
    assert counts(parent)["trials_missing"] == "1"
    fitting(all_well)
    resume_sweep("s")
    parent, statuses = told(uri)
    assert (parent.info.status, statuses) == ("FINISHED", ["FINISHED"] * 3)


def test_a_sweep_that_breaks_ends_failed(uri: str, in_tmp: Path, fitting: Callable[[Fit], None]) -> None:
    def fit(points: Sequence[Point], path: Path, tracking: Tracking) -> dict[str, str]:
        cut(points[0], path, tracking)
        raise RuntimeError("Ray is gone")

    fitting(fit)
    with pytest.raises(RuntimeError, match="Ray is gone"):
        sweep(plan(in_tmp, uri), out="s")
    parent, statuses = told(uri)
    assert (parent.info.status, statuses) == ("FAILED", ["FAILED"])


def test_a_sweep_that_was_killed_when_all_was_done_is_ended_by_resume(
    uri: str, in_tmp: Path, fitting: Callable[[Fit], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting(all_well)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(sweeps, "_record_outcomes", lambda *_: 1 / 0)
        sweep(plan(in_tmp, uri), out="s")
    assert told(uri)[0].info.status == "RUNNING"
    fitting(lambda *_: pytest.fail("nothing was left to try"))
    made: SweepResult = resume_sweep("s")
    assert not made.failed and told(uri)[0].info.status == "FINISHED"
    monkeypatch.setattr(sweeps, "prepare_store", lambda *_: pytest.fail("MLflow had been told"))
    resume_sweep("s")
