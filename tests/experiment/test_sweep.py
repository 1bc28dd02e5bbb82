"""Sweeps on a real Ray with a real MLflow.

Trials side by side, parents and children, stopping, failing, going on.
"""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fedray.experiment import yaml
from fedray.experiment.space import Sweep
from fedray.experiment.sweep import resume_sweep, sweep

BASE = {
    "rounds": 4,
    "checkpoint_every": 1,
    "model": "mlp",
    "data": {"name": "digits", "partition": {"kind": "dirichlet", "alpha": 1.0}},
    "clients": {"population": 12, "cohort": 5, "devices": {"laptop": 1.0}, "actors": 1},
    "method": {"name": "fedavg", "lr": 0.1},
}


def plan(folder: Path, space, tune=None, uri=None, **base) -> Sweep:
    tree = {"base": BASE | base, "space": space, "tune": tune or {}}
    tree["base"]["tracking"] = {"uri": uri or "none", "experiment": "tests"}
    path = folder / "some_sweep.yaml"
    path.write_text(yaml.dump(tree))
    return Sweep.load(path)


def results(path: Path) -> dict[str, dict[str, Any]]:
    return {p.parent.name: json.loads(p.read_text()) for p in sorted(path.glob("trials/*/result.json"))}


def test_two_trials_at_once_on_two_cores_finish_and_stand_in_mlflow(ray_local, in_tmp):
    from mlflow import MlflowClient

    uri = f"sqlite:///{in_tmp}/mlflow.db"
    space = {"method": {"grid": [{"name": "fedavg"}, {"name": "staged", "density": 0.3}]}}
    seen: list[tuple[str, int]] = []
    made = sweep(
        plan(in_tmp, space, {"concurrent": 2}, uri),
        out=in_tmp / "sweep",
        on_round=lambda trial, metrics: seen.append((trial, metrics["round"])),
    )
    assert [trial.status for trial in made.trials] == ["finished", "finished"]
    assert {trial for trial, _ in seen} == {"00-fedavg", "01-staged,density=0.3"}
    assert results(made.path)["01-staged,density=0.3"]["density/global"] == pytest.approx(0.3, abs=1e-3)

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert {child.info.status for child in [*children, parent]} == {"FINISHED"}
    staged = next(child for child in children if child.data.tags["method"] == "staged")
    assert staged.data.params["method.density"] == "0.3"
    assert staged.data.params["data.partition.alpha"] == "1.0"
    history = client.get_metric_history(staged.info.run_id, "val/accuracy")
    assert [metric.step for metric in history] == [0, 1, 2, 3, 4]
    files = {file.path for file in client.list_artifacts(staged.info.run_id)}
    assert {"config.yaml", "rounds.jsonl", "result.json", "model.safetensors", "model"} <= files


def test_a_sweep_gives_the_bits_of_a_run_in_process(ray_local, in_tmp):
    import fedray

    planned = plan(in_tmp, {"seed": {"grid": [3]}})
    made = sweep(planned, out=in_tmp / "sweep")
    alone = fedray.run(planned.points[0].config.override({"clients.actors": 0}), out=in_tmp / "alone")
    (result,) = results(made.path).values()
    assert result["weights_sha256"] == alone.weights_sha256


@pytest.mark.slow
def test_asha_ends_the_worse_trials_early_and_says_so(ray_local, in_tmp):
    space = {"method.lr": {"grid": [0.1, 1e-7, 1e-6, 1e-5]}}
    tune = {"scheduler": "asha", "grace_rounds": 2, "reduction": 4, "concurrent": 1}
    made = sweep(plan(in_tmp, space, tune, rounds=8), out=in_tmp / "sweep")
    statuses = {trial.point.name: trial.status for trial in made.trials}
    assert statuses["00-lr=0.1"] == "finished"
    assert "stopped" in statuses.values()
    for name, result in results(made.path).items():
        assert result["status"] == statuses[name]
        assert ("test/accuracy" in result) == (result["status"] == "finished")
    again = resume_sweep(made.path)  # what was stopped on purpose stays stopped
    assert [trial.status for trial in again.trials] == list(statuses.values())


FLAKY = '''
"""A method that breaks in round 3 as long as a file is missing."""
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from fedray.federation.method import Method
from fedray.methods import METHODS

@dataclass(frozen=True, kw_only=True)
class Flaky(Method):
    needs: str = ""

    def aggregate(self, state, cohort):
        if state.round == 3 and not Path(self.needs).exists():
            raise OSError("the disk is on fire")
        return super().aggregate(state, cohort)

METHODS["flaky"] = Flaky
'''


@pytest.mark.slow
def test_a_failed_trial_is_reported_and_a_sweep_goes_on_with_what_is_missing(ray_local, in_tmp):
    import fedray

    (in_tmp / "flaky.py").write_text(FLAKY)
    space = {"method": {"grid": [{"name": "fedavg"}, {"name": "flaky", "needs": str(in_tmp / "hose")}]}}
    planned = plan(in_tmp, space, {"max_failures": 0}, imports=[str(in_tmp / "flaky.py")])
    made = sweep(planned, out=in_tmp / "sweep")
    assert [trial.status for trial in made.trials] == ["finished", "failed"]
    assert "the disk is on fire" in (made.failed[0].error or "")
    finished = made.trials[0].path / "result.json"
    before = finished.stat().st_mtime_ns

    (in_tmp / "hose").touch()
    again = resume_sweep(made.path)
    assert [trial.status for trial in again.trials] == ["finished", "finished"]
    assert finished.stat().st_mtime_ns == before
    whole = fedray.run(planned.points[1].config, out=in_tmp / "whole")
    assert (
        json.loads((again.trials[1].path / "result.json").read_text())["weights_sha256"]
        == whole.weights_sha256
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "scheduler"),
    [(signal.SIGKILL, "fifo"), (signal.SIGTERM, "fifo"), (signal.SIGINT, "fifo"), (signal.SIGTERM, "asha")],
)
def test_a_killed_sweep_can_be_gone_on_from(in_tmp, how, scheduler):
    grace = {} if scheduler == "fifo" else {"grace_rounds": 400}  # it stops nobody
    tune = {"concurrent": 2, "scheduler": scheduler, "metric": "val/accuracy", **grace}
    planned = plan(in_tmp, {"seed": {"grid": [0, 1]}}, tune, rounds=400)
    assert len(planned.points) == 2
    command = [sys.executable, "-m", "fedray.cli", "sweep", "some_sweep.yaml", "--out", "sweep"]
    process = subprocess.Popen(command, cwd=in_tmp, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        logs = [in_tmp / "sweep" / "trials" / point.name / "rounds.jsonl" for point in planned.points]
        wait_until(lambda: all(log.exists() and log.read_text().count("\n") > 5 for log in logs), process)
        if how != signal.SIGKILL:  # Tune catches these, and ends the trials in its own way
            process.send_signal(how)
            process.wait(timeout=180)  # two cores may have other work
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not list(in_tmp.glob("sweep/trials/*/result.json"))
    done = subprocess.run(
        [sys.executable, "-m", "fedray.cli", "resume", "sweep"],
        cwd=in_tmp,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {result["status"] for result in results(in_tmp / "sweep").values()} == {"finished"}


def wait_until(condition, process, seconds=120):
    import time

    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the sweep ended by itself"
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)
