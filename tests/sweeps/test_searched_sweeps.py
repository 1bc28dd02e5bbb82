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
from fedray.storage.run_files import RunFiles
from fedray.sweeps.space import Sweep
from fedray.sweeps.suggesting import POINTS
from fedray.sweeps.sweep import resume_sweep, sweep
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


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / POINTS).read_text().splitlines()]


@pytest.mark.slow
def test_a_search_survives_sigkill_of_its_driver_as_if_undisturbed(tmp_path):
    file = write(tmp_path, SEARCH, rounds=20)
    whole = sweep(Sweep.load(file), out=tmp_path / "whole")
    path = tmp_path / "killed"
    code = f"import fedray; fedray.sweep(fedray.Sweep.load({str(file)!r}), out={str(path)!r})"
    with (tmp_path / "log.txt").open("w") as log:
        command = [sys.executable, "-c", code]
        driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 120
    while len(list(path.glob("trials/02-*/rounds.jsonl"))) == 0 and time.monotonic() < until:
        assert driver.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert len(lines(path)) < len(lines(tmp_path / "whole"))
    made = resume_sweep(path)
    assert lines(path) == lines(tmp_path / "whole")
    digests = [RunFiles(trial.path).read_json("result.json") for trial in [*made.trials, *whole.trials]]
    found = [digest["weights_sha256"] for digest in digests if digest]
    assert found[:4] == found[4:] and len(found) == 8


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
