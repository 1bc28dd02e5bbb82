"""What a real store has of runs that did not end by themselves: stopped, interrupted, killed, left behind."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from fedray.experiment.run import resume
from fedray.overview.stopping import stop
from fedray.overview.summary import summary
from fedray.sweeps.space import Sweep
from fedray.sweeps.sweep import sweep
from fedray.sweeps.sync import sync
from fedray.tracking.store import prepare_store
from tests.experiment import tiny


@pytest.fixture(scope="module", params=["sqlite", "server"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real store: a file, and MLflow's own server."""
    folder = tmp_path_factory.mktemp("store")
    if request.param == "sqlite":
        uri = f"sqlite:///{folder}/mlflow.db"
        assert prepare_store(uri, "fedray").problem is None
        yield uri
        return
    from tests.tracking.servers import mlflow_server

    with mlflow_server(folder) as uri:
        yield uri


def in_store(uri: str, run_id: str) -> tuple[str, list[tuple[str, int, float]]]:
    """Return how a run ended, and all its points."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    run = client.get_run(run_id)
    points = [
        (key, point.step, point.value)
        for key in run.data.metrics
        for point in client.get_metric_history(run_id, key)
    ]
    return run.info.status, sorted(points)


def in_files(path: Path) -> list[tuple[str, int, float]]:
    """Return the points that a run's own files have."""
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    return sorted(
        (name, line["round"], float(value))
        for line in lines
        for name, value in line["metrics"].items()
        if value is not None
    )


def run_id(path: Path) -> str:
    return str(json.loads((path / "mlflow.json").read_text())["run_id"])


def begun(folder: Path, uri: str) -> subprocess.Popen[bytes]:
    """Start a long run in another process; return it once it is well under way."""
    (folder / "x.yaml").write_text(yaml_text.dump(override_tree(tiny.TREE, {"tracking.uri": uri})))
    words = ["run", "x.yaml", "rounds=100000", "eval_every=10", "--out", "r"]
    process = subprocess.Popen([sys.executable, "-m", "fedray.cli", *words], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while (summary(folder / "r").round or 0) < 30:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    return process


ENDS: dict[str, Callable[[Path, subprocess.Popen[bytes]], object]] = {
    "fedray stop": lambda path, process: stop(path),
    "fedray stop --now": lambda path, process: stop(path, now=True),
    "SIGTERM": lambda path, process: process.send_signal(signal.SIGTERM),
    "SIGKILL": lambda path, process: process.send_signal(signal.SIGKILL),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_a_store_has_the_rounds_of_a_run_that_was_ended_and_how_it_ended(
    store: str, in_tmp: Path, how: str
) -> None:
    process = begun(in_tmp, store)
    ENDS[how](in_tmp / "r", process)
    process.wait(timeout=120)
    if how == "SIGKILL":
        status, points = in_store(store, run_id(in_tmp / "r"))
        assert status == "RUNNING" and set(points) <= set(in_files(in_tmp / "r"))
        (done,) = sync("r")
        assert done.status == "KILLED"
    status, points = in_store(store, run_id(in_tmp / "r"))
    assert status == "KILLED" and points == in_files(in_tmp / "r")
    assert len({step for _, step, _ in points}) > 30
    rounds = (summary(in_tmp / "r").round or 0) + 10
    resume(in_tmp / "r", [f"rounds={rounds}"])
    status, after = in_store(store, run_id(in_tmp / "r"))
    assert status == "FINISHED" and set(in_files(in_tmp / "r")) <= set(after)
    assert len({(name, step) for name, step, _ in after}) == len(after)


@pytest.mark.slow
def test_a_store_has_the_rounds_of_trials_that_a_scheduler_stopped(
    store: str, in_tmp: Path, ray_local: None
) -> None:
    base = override_tree(tiny.TREE, {"rounds": 6, "tracking.uri": store})
    tune: dict[str, Any] = {"scheduler": {"name": "median", "grace_rounds": 2, "min_trials": 1}}
    tree = {"base": base, "space": {"method.lr": {"grid": [0.1, 1e-7, 0.2, 1e-6]}}}
    tree["tune"] = tune | {"metric": "val/loss", "concurrent": 1}
    made = sweep(Sweep.read(tree, "x.yaml", "x", {}), out=in_tmp / "s")
    ends = {trial.status for trial in made.trials}
    assert ends == {"finished", "stopped"}
    for trial in made.trials:
        status, points = in_store(store, run_id(trial.path))
        assert status == ("FINISHED" if trial.status == "finished" else "KILLED")
        assert set(in_files(trial.path)) <= set(points)
        assert len({(name, step) for name, step, _ in points}) == len(points)
    assert in_store(store, run_id(made.path))[0] == "FINISHED"
