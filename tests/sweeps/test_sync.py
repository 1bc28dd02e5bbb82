"""MLflow is brought up to the files: after a busy, absent or emptied store, and without doubles."""

import json
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.cli import app
from fedray.config import sealed
from fedray.durable import append_lines
from fedray.errors import ConfigError, RunError
from fedray.storage.directory import Lock
from fedray.sweeps.suggesting import POINTS
from fedray.sweeps.sync import missing_trials, sweep_status, sync
from fedray.tracking import store as stores
from fedray.tracking.store import prepare_store
from fedray.types import RoundReport
from tests.experiment import tiny

ROUNDS = 4


@pytest.fixture
def uri(in_tmp: Path) -> str:
    """A store that is there already; the working directory is empty but for it."""
    uri = f"sqlite:///{in_tmp}/mlflow/mlflow.db"
    assert prepare_store(uri, "fedray").problem is None
    return uri


def config(uri: str) -> Any:
    return tiny.config({"rounds": ROUNDS, "tracking.uri": uri})


def runs(uri: str, view: int = 1) -> list[Any]:
    from mlflow import MlflowClient

    return list(MlflowClient(uri).search_runs(["1"], run_view_type=view))


def the_run(uri: str) -> Any:
    (run,) = runs(uri)
    return run


def points(uri: str, run: Any) -> list[tuple[str, int, float]]:
    """Return every point of a run, sorted."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return sorted(
        (key, point.step, point.value)
        for key in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, key)
    )


def complete(uri: str, path: Path) -> None:
    """Assert that the one run of a store is all that a run's directory is."""
    from mlflow import MlflowClient

    run = the_run(uri)
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    result = json.loads((path / "result.json").read_text())
    expected = [
        (name, line["round"], value)
        for line in lines
        for name, value in line["metrics"].items()
        if value is not None
    ]
    final = {name: value for name, value in result.items() if name.startswith(("test/", "clients/"))}
    expected += [(name, ROUNDS, value) for name, value in final.items()]
    assert points(uri, run) == sorted(set(expected))
    assert run.info.status == "FINISHED" and run.data.params["rounds"] == str(ROUNDS)
    assert run.data.tags["method"] == "fedavg"
    files = {file.path for file in MlflowClient(uri).list_artifacts(run.info.run_id)}
    assert {"config.yaml", "rounds.jsonl", "result.json", "model.safetensors", "data.json"} <= files


def busy_from(round: int, uri: str, connection: sqlite3.Connection) -> Callable[[RoundReport], None]:
    """Return an `on_round` after which another connection has the store for itself."""

    def on_round(report: RoundReport) -> None:
        if report.round == round:
            import time

            time.sleep(0.5)  # what was handed over is written by then
            connection.execute("BEGIN EXCLUSIVE")

    return on_round


@pytest.fixture
def lost(uri: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run whose store was busy from round 2 on, as in the issue."""
    monkeypatch.setattr(stores, "ANSWER_S", 0.5)
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as other:
        fedray.run(config(uri), out="r", on_round=busy_from(2, uri, other))
    run = the_run(uri)
    assert run.info.status == "RUNNING" and "test/accuracy" not in run.data.metrics
    return in_tmp / "r"


def test_a_busy_store_is_brought_up_to_the_files(
    lost: Path, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert "what it lacks is sent when it answers again" in (lost / "warnings.txt").read_text()
    said = [record.getMessage() for record in caplog.get_records("setup")]
    assert said[-1] == "`fedray sync r` brings MLflow up to this run's files"
    before = tiny.figures(lost)
    (done,) = sync("r")
    complete(uri, lost)
    assert (done.status, done.run_id) == ("FINISHED", the_run(uri).info.run_id) and done.points > 0
    (again,) = sync("r")
    assert again.points == 0 and again.run_id == done.run_id
    complete(uri, lost)
    assert tiny.figures(lost) == before


def test_resume_of_the_finished_run_brings_it_up_too_and_then_only_reads(
    lost: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fedray.resume("r")
    complete(uri, lost)
    monkeypatch.setattr("fedray.sweeps.sync.sync_run", lambda *_: pytest.fail("it was complete"))
    fedray.resume("r")


def test_a_run_resumed_in_the_middle_has_the_rounds_that_were_lost(
    uri: str, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as other:
        patch.setattr(stores, "ANSWER_S", 0.5)
        busy = busy_from(1, uri, other)

        def on_round(report: RoundReport) -> None:
            busy(report)
            tiny.ending(3, RuntimeError)(report)

        with pytest.raises(RuntimeError):
            fedray.run(config(uri), out="r", on_round=on_round)
    fedray.resume("r")
    complete(uri, in_tmp / "r")


def test_a_run_that_was_not_tracked_and_one_whose_run_was_deleted(uri: str, in_tmp: Path) -> None:
    from mlflow import MlflowClient

    fedray.run(config("none"), out="r")
    with pytest.raises(ConfigError, match=r"tracking\.uri is none: name the store"):
        sync("r")
    sync("r", "sqlite:///mlflow/mlflow.db")
    complete(uri, in_tmp / "r")
    MlflowClient(uri).delete_run(the_run(uri).info.run_id)
    assert runs(uri) == []
    sync("r", uri)  # restored
    complete(uri, in_tmp / "r")
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as database:
        for table in ("latest_metrics", "metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {table}")
        database.commit()
    sync("r", uri)  # gone for good: made anew
    complete(uri, in_tmp / "r")
    other = f"sqlite:///{in_tmp}/other.db"
    sync("r", other)
    complete(other, in_tmp / "r")


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (fedray.FedrayError, "FAILED")])
def test_a_run_that_ended_early(error: type[BaseException], status: str, uri: str, in_tmp: Path) -> None:
    with pytest.raises(error):
        fedray.run(config("none"), out="r", on_round=tiny.ending(2, error))
    (done,) = sync("r", uri)
    assert done.status == the_run(uri).info.status == status
    assert {step for _, step, _ in points(uri, the_run(uri))} == {0, 1, 2}


def test_a_killed_process_leaves_a_run_that_is_ended(uri: str, in_tmp: Path) -> None:
    child = os.fork()
    if child == 0:
        fedray.run(config("none"), out="r", on_round=lambda _: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(child, 0)
    assert sync("r", uri)[0].status == "KILLED"


def test_what_cannot_be_synced_is_told(uri: str, in_tmp: Path) -> None:
    with pytest.raises(ConfigError, match="is not the directory of a run"):
        sync("nothing")
    fedray.run(config("none"), out="r")
    with Lock(in_tmp / "r"), pytest.raises(RunError, match="still running"):
        sync("r", uri)
    with pytest.raises(RunError, match="MLflow"):
        sync("r", "http://127.0.0.1:1")
    assert runs(uri) == []


def test_a_sweep_its_parent_and_its_trials(uri: str, in_tmp: Path) -> None:
    """From its files alone: one trial finished, one failed, one never began since the sweep was cut."""
    place = in_tmp / "s"
    (place / "trials").mkdir(parents=True)
    points = [{"seed": seed} for seed in range(3)]
    sealed.write(place / "sweep.yaml", {"name": "some", "base": tiny.TREE, "points": points})
    fedray.run(config("none"), out=place / "trials" / "00-a")
    with pytest.raises(fedray.FedrayError):
        broken = tiny.ending(1, fedray.FedrayError)
        second = tiny.config({"rounds": ROUNDS, "seed": 1})
        fedray.run(second, out=place / "trials" / "01-b", on_round=broken)
    for added in (True, False):
        done = sync("s", uri)
        assert [synced.status for synced in done] == ["KILLED", "FINISHED", "FAILED"]
        assert [synced.points > 0 for synced in done[1:]] == [added, added]
    by_name = {run.info.run_name: run for run in runs(uri)}
    assert set(by_name) == {"s", "fedavg s0", "fedavg s1"}
    parent = by_name["s"].info.run_id
    assert {by_name[name].data.tags["mlflow.parentRunId"] for name in ("fedavg s0", "fedavg s1")} == {parent}
    assert by_name["s"].info.status == "KILLED"


TRIALS: dict[str, tuple[list[Any], int, bool, str]] = {
    "all ended": (["FINISHED", "FINISHED"], 0, False, "FINISHED"),
    "one failed": (["FINISHED", "FAILED"], 0, False, "FAILED"),
    "one never began": (["FINISHED"], 1, False, "KILLED"),
    "one was cut": (["FINISHED", "KILLED"], 0, False, "KILLED"),
    "cut after a failure": (["FAILED", "KILLED"], 1, False, "KILLED"),
    "the budget is spent": (["FINISHED", "KILLED"], 1, True, "KILLED"),
    "the budget is spent after a failure": (["FAILED", "KILLED"], 1, True, "FAILED"),
}


@pytest.mark.parametrize("case", TRIALS)
def test_the_status_of_a_sweep_is_what_the_sweep_itself_says(case: str) -> None:
    trials, missing, is_over, status = TRIALS[case]
    assert sweep_status(trials, missing, is_over) == status


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        ([], 7),
        (
            [
                {"suggested": 0, "changes": {}, "trials": ["00-a", "01-a"]},
                {"suggested": 1, "changes": {}, "problem": "no"},
            ],
            7,
        ),
        ([{"suggested": 0, "changes": {}, "trials": ["00-a", "01-a"]}, {"ended": "100 points in a row"}], 1),
        (
            [
                {"suggested": 0, "changes": {}, "trials": ["00-a", "01-a"]},
                {"suggested": 1, "changes": {}, "trials": ["02", "03"]},
            ],
            7,
        ),
    ],
)
def test_the_trials_that_an_interrupted_search_has_not_begun(
    in_tmp: Path, lines: list[dict[str, Any]], missing: int
) -> None:
    """Four points with two seeds each; one trial has begun."""
    tree = {"tune": {"search": "optuna", "num_samples": 4, "repeat": [0, 1]}, "points": []}
    append_lines(in_tmp / POINTS, [{"searcher": "optuna"}, *lines])
    assert missing_trials(in_tmp, tree, 1) == missing
    assert missing_trials(in_tmp, {"points": [{}, {}, {}]}, 1) == 2


def test_a_stopped_trial_does_not_make_a_sweep_a_killed_one(uri: str, in_tmp: Path) -> None:
    place = in_tmp / "s"
    (place / "trials").mkdir(parents=True)
    sealed.write(place / "sweep.yaml", {"name": "some", "base": tiny.TREE, "points": [{}]})
    with pytest.raises(KeyboardInterrupt):
        fedray.run(config("none"), out=place / "trials" / "0", on_round=tiny.ending(1, KeyboardInterrupt))
    assert [synced.status for synced in sync("s", uri)] == ["KILLED", "KILLED"]
    (place / "trials" / "0" / "stopped.json").write_text('{"round": 1}')
    assert [synced.status for synced in sync("s", uri)] == ["FINISHED", "KILLED"]


def test_the_command(lost: Path, uri: str) -> None:
    from typer.testing import CliRunner

    shown = CliRunner().invoke(app, ["sync", "r"])
    assert shown.exit_code == 0, shown.output
    assert "FINISHED" in shown.output and "points added" in shown.output
    complete(uri, lost)
