"""Sweeps that search under a real Tune: a killed driver, a scheduler, and what the sweep ends with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from fedray.durable import scan_lines
from fedray.experiment.forking import lineage
from fedray.storage.run_files import RunFiles
from fedray.sweeps.outcome import SweepResult
from fedray.sweeps.space import Sweep
from fedray.sweeps.stopping import Budget
from fedray.sweeps.suggesting import POINTS
from fedray.sweeps.sweep import load_sweep, resume_sweep, sweep
from tests.experiment.tiny import TREE

SEARCH = {"search": {"name": "optuna", "n_startup_trials": 2}, "num_samples": 4, "concurrent": 1}


def write(folder: Path, tune: dict[str, Any], **base: Any) -> Path:
    changes = {"clients.actors": 0, "rounds": 4, "checkpoint_every": 1} | base
    tree = {
        "base": override_tree(TREE, changes),
        "space": {"method.lr": {"loguniform": [0.001, 0.5]}},
        "tune": tune,
    }
    (folder / "some.yaml").write_text(yaml_text.dump(tree))
    return folder / "some.yaml"


def lines(path: Path, name: str = POINTS) -> list[dict[str, Any]]:
    return scan_lines(path / name)[0] if (path / name).exists() else []


def of_trials(made: SweepResult) -> list[tuple[str, Any, Any]]:
    """Return of each trial its points, its weights, and whom it continued from."""
    found = []
    for trial in made.trials:
        result = RunFiles(trial.path).read_json("result.json") or {}
        forks = [(entry["round"], entry["from"], entry["changes"]) for entry in lineage(trial.path)]
        found.append((trial.point.name, result["weights_sha256"], forks))
    return found


NSGA2: dict[str, Any] = {
    "search": {"name": "optuna", "population_size": 2},
    "objectives": {"val/accuracy": "max", "train/loss": "min"},
    "num_samples": 6,
    "concurrent": 1,
}
HYPEROPT = SEARCH | {"search": {"name": "hyperopt", "n_initial_points": 2}}
PBT: dict[str, Any] = {
    "num_samples": 4,
    "metric": "val/loss",
    "concurrent": 2,
    "scheduler": {
        "name": "pbt",
        "perturb_every": 4,
        "quantile": 0.5,
        "mutations": {"method.lr": {"loguniform": [0.001, 0.5]}},
    },
}
KILLED: dict[str, tuple[dict[str, Any], str]] = {
    "tpe": (SEARCH, "trials/02-*/rounds.jsonl"),
    "nsga2": (NSGA2, "trials/04-*/rounds.jsonl"),
    "hyperopt": (HYPEROPT, "trials/02-*/rounds.jsonl"),
    "pbt as it forks": (PBT, "perturbed.jsonl"),
    "pbt after a fork": (PBT, "trials/*/lineage.jsonl"),
    "pbt before a fork": (PBT, "trials/03-*/rounds.jsonl"),
}
"""Of each sweep: the file that appears right before its driver is killed."""


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_a_sweep_survives_sigkill_of_its_driver_as_if_undisturbed(tmp_path, case):
    tune, appears = KILLED[case]
    if "search" in tune:
        pytest.importorskip(tune["search"]["name"])
    file = write(tmp_path, tune, rounds=20)
    whole = sweep(Sweep.load(file), out=tmp_path / "whole")
    path = tmp_path / "killed"
    code = f"import fedray; fedray.sweep(fedray.Sweep.load({str(file)!r}), out={str(path)!r})"
    with (tmp_path / "log.txt").open("w") as log:
        command = [sys.executable, "-c", code]
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 120
    while not any(path.glob(appears)) and time.monotonic() < until:
        assert driver.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    for name in (POINTS, "perturbed.jsonl"):
        before, after = lines(path, name), lines(tmp_path / "whole", name)
        assert before == after[: len(before)]
    ended = [trial for trial in whole.trials if (path / "trials" / trial.point.name / "result.json").exists()]
    assert len(ended) < len(whole.trials)
    made = resume_sweep(path)
    for name in (POINTS, "perturbed.jsonl"):
        assert lines(path, name) == lines(tmp_path / "whole", name)
    assert of_trials(made) == of_trials(whole)
    assert (path / "best.yaml").read_text() == (tmp_path / "whole" / "best.yaml").read_text()


@pytest.mark.slow
def test_a_scheduler_and_a_searcher_work_together(tmp_path):
    tune = SEARCH | {"scheduler": {"name": "asha", "grace_rounds": 1, "reduction": 2}, "num_samples": 5}
    made = sweep(Sweep.load(write(tmp_path, tune)), out=tmp_path / "made")
    statuses = [trial.status for trial in made.trials]
    assert len(statuses) == 5 and "stopped" in statuses and set(statuses) <= {"stopped", "finished"}
    stopped = [line for line in lines(tmp_path / "made") if "stopped" in line]
    assert len(stopped) == statuses.count("stopped")
    before = lines(tmp_path / "made")
    resume_sweep(tmp_path / "made")
    assert lines(tmp_path / "made") == before


@pytest.mark.slow
def test_several_objectives_and_seeds_end_with_a_pareto_set(tmp_path):
    tune = {
        "search": {"name": "optuna", "population_size": 2},
        "objectives": {"val/accuracy": "max", "train/loss": "min"},
        "repeat": [0, 1],
        "num_samples": 3,
    }
    made = sweep(Sweep.load(write(tmp_path, tune)), out=tmp_path / "made")
    assert len(made.trials) == 6 and made.pareto
    written = json.loads((tmp_path / "made" / "pareto.json").read_text())
    assert [len(point["trials"]) for point in written["points"]] == [2] * len(made.pareto)
    assert (tmp_path / "made" / "best.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optuna", "hyperopt"])
def test_a_target_and_a_budget_work_with_a_searcher(tmp_path, monkeypatch, name):
    """Trials end at their target, as finished; the budget cuts the search, and a resume continues it."""
    pytest.importorskip(name)
    spent: list[int] = []
    # a second is a report, however slow the machine
    monkeypatch.setattr(Budget, "spent_s", property(lambda budget: budget.before_s + len(spent)))
    tune = {"search": name, "num_samples": 6, "concurrent": 1, "stop": {"round": 2}, "time_budget_s": 7}
    made = sweep(
        Sweep.load(write(tmp_path, tune)), out=tmp_path / "made", on_round=lambda *what: spent.append(1)
    )
    assert made.ended == "the time budget of 7 s is spent" and not made.failed
    finished = [trial for trial in made.trials if trial.status == "finished"]
    assert 1 <= len(finished) < 6
    for trial in finished:
        result = RunFiles(trial.path).result() or {}
        assert result["ended"] == "round 2 ≥ 2" and result["rounds"] == 2 and "test/accuracy" in result
    told = [line for line in lines(made.path) if "told" in line]
    assert len(told) == len(finished) and all("failed" not in line for line in told)
    before = lines(made.path)
    spent.clear()
    more = load_sweep(made.path, overrides=["tune.time_budget_s=1000"])
    again = resume_sweep(made.path, more, on_round=lambda *what: spent.append(1))
    assert again.ended is None and [trial.status for trial in again.trials] == ["finished"] * 6
    assert lines(made.path)[: len(before)] == before and again.best is not None
