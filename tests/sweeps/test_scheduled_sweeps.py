"""Each scheduler under a real Tune: which trials end when, and after a resume."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fedray.config import sealed, yaml_text
from fedray.config.overrides import override_tree
from fedray.durable import scan_lines
from fedray.errors import ConfigError
from fedray.experiment.forking import lineage
from fedray.storage.run_files import RunFiles
from fedray.sweeps.judging import JUDGED
from fedray.sweeps.outcome import SweepResult
from fedray.sweeps.space import Sweep
from fedray.sweeps.sweep import resume_sweep, sweep
from tests.experiment.tiny import TREE

RATES = [0.1, 1e-7, 0.05, 1e-6, 0.2, 1e-5]


def plan(folder: Path, tune: dict[str, Any], space: dict[str, Any] | None = None, **base: Any) -> Sweep:
    changes = {"clients.actors": 0, "rounds": 9, "checkpoint_every": 100} | base
    tree = {
        "base": override_tree(TREE, changes),
        "space": space or {"method.lr": {"grid": RATES}},
        "tune": {"concurrent": 1, **tune},
    }
    (folder / "some.yaml").write_text(yaml_text.dump(tree))
    return Sweep.load(folder / "some.yaml")


def ends(made: SweepResult) -> dict[str, tuple[str, int]]:
    """Return how each trial ended, and after which round."""
    return {
        trial.point.name: (trial.status, RunFiles(trial.path).rounds()[-1]["round"]) for trial in made.trials
    }


def judged(path: Path) -> list[dict[str, Any]]:
    """Return the journal of a sweep."""
    return scan_lines(path / JUDGED)[0]


def cut_after(reports: int):
    """Return an `on_round` that sends the driver a signal after some reports."""
    seen: list[int] = []

    def on_round(name: str, metrics: Any) -> None:
        seen.append(1)
        if len(seen) == reports:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_round


HYPERBAND = {"scheduler": {"name": "hyperband", "reduction": 3}, "metric": "val/loss"}
MEDIAN = {"scheduler": {"name": "median", "grace_rounds": 2, "min_trials": 1}, "metric": "val/loss"}


@pytest.mark.slow
@pytest.mark.parametrize("tune", [HYPERBAND, MEDIAN], ids=["hyperband", "median"])
def test_a_cut_sweep_stops_the_same_trials(ray_local, in_tmp, tune):
    planned = plan(in_tmp, tune)
    whole = ends(sweep(planned, out=in_tmp / "whole"))
    assert {status for status, _ in whole.values()} == {"finished", "stopped"}
    sums = [RunFiles(in_tmp / "whole" / "trials" / name).read_json("result.json") for name in whole]
    with pytest.raises(SystemExit):
        sweep(planned, out=in_tmp / "cut", on_round=cut_after(25))
    made = resume_sweep(in_tmp / "cut")
    assert ends(made) == whole
    again = [RunFiles(trial.path).read_json("result.json") for trial in made.trials]
    for one, other in zip(sums, again, strict=True):
        assert one and other and one.get("weights_sha256") == other.get("weights_sha256")
    assert len(judged(in_tmp / "cut")) == len(judged(in_tmp / "whole"))


@pytest.mark.slow
def test_trials_of_hyperband_wait_at_a_rung_and_go_on_from_their_checkpoints(ray_local, in_tmp):
    made = sweep(plan(in_tmp, HYPERBAND | {"concurrent": 2}), out=in_tmp / "sweep")
    assert [status for status, _ in ends(made).values()].count("finished") >= 4
    lines = judged(made.path)
    # a bracket of four runs to its end; the last two wait at round 3 for each other
    waited = [line["trial"] for line in lines if line.get("round") == 3]
    assert len(waited) == 6
    for trial in made.trials:
        rounds = [line["round"] for line in RunFiles(trial.path).rounds()]
        assert rounds == list(range(len(rounds)))


# ── targets and budgets
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("tune", [{}, MEDIAN], ids=["fifo", "median"])
def test_a_trial_ends_at_its_target_and_can_be_the_best(ray_local, in_tmp, tune):
    space = {"method.lr": {"grid": [1e-7, 0.2, 0.1]}}
    uri = f"sqlite:///{in_tmp}/mlflow.db"
    planned = plan(in_tmp, tune | {"stop": {"val/accuracy": 0.5}}, space, tracking={"uri": uri})
    made = sweep(planned, out=in_tmp / "sweep")
    results = [RunFiles(trial.path).read_json("result.json") or {} for trial in made.trials]
    assert [result["status"] for result in results] == [trial.status for trial in made.trials]
    assert made.trials[0].status == "finished" and "ended" not in results[0]
    assert results[1]["val/accuracy"] >= 0.5 and results[1]["ended"].startswith("val/accuracy 0.")
    assert results[1]["rounds"] < 9 and "test/accuracy" in results[1]
    assert not (made.trials[1].path / "stopped.json").exists()
    assert made.best is not None and made.best.trials[0] in made.trials[1:]
    from mlflow import MlflowClient

    runs = MlflowClient(uri).search_runs(["0", "1"])
    finished = {
        f"fedavg lr={trial.point.changes['method.lr']:g}"
        for trial in made.trials
        if trial.status == "finished"
    }
    assert finished | {"sweep"} == {run.info.run_name for run in runs if run.info.status == "FINISHED"}
    again = resume_sweep(made.path)
    assert [trial.status for trial in again.trials] == [trial.status for trial in made.trials]


@pytest.mark.slow
@pytest.mark.parametrize("tune", [{}, HYPERBAND], ids=["fifo", "hyperband"])
def test_a_sweep_ends_with_its_budget_and_resume_takes_another(ray_local, in_tmp, tune, capsys, monkeypatch):
    from fedray.cli.outcome import say_sweep
    from fedray.sweeps.stopping import Budget
    from fedray.sweeps.sweep import load_sweep

    seen: list[int] = []
    # a second is a report, however slow the machine
    monkeypatch.setattr(Budget, "spent_s", property(lambda budget: budget.before_s + len(seen)))
    planned = plan(in_tmp, tune | {"time_budget_s": 5}, rounds=1000)
    made = sweep(planned, out=in_tmp / "sweep", on_round=lambda *what: seen.append(1))
    assert made.ended == "the time budget of 5 s is spent"
    assert made.cut and not made.failed
    say_sweep(made)
    assert "The time budget of 5 s is spent: " in capsys.readouterr().out
    begun = next(trial for trial in made.cut if trial.status == "failed")
    files = RunFiles(begun.path)
    found = files.load()
    assert found is not None and found.done == files.rounds()[-1]["round"] > 0  # in good order
    seen.clear()
    with pytest.raises(ConfigError, match=r"tune\.time_budget_s: the trials of .* have run \d+ s of 5 s; "):
        resume_sweep(made.path)
    more = load_sweep(made.path, overrides=["tune.time_budget_s=50"])
    again = resume_sweep(made.path, more, on_round=lambda *what: seen.append(1))
    assert again.ended == "the time budget of 50 s is spent"
    assert files.rounds()[-1]["round"] > found.done
    assert load_sweep(made.path).tune.time_budget_s == 50


def test_a_resumed_sweep_changes_nothing_else(in_tmp):
    from fedray.sweeps.sweep import load_sweep

    for key in ("tune.metric=val/loss", "rounds=3", "time_budget_s=3", "tune={}"):
        with pytest.raises(
            ConfigError, match=r"whose points do not change: got .*; resume can change tune\."
        ):
            load_sweep(written(in_tmp / key.partition("=")[0]), overrides=[key])
    with pytest.raises(ConfigError, match=r"tune\.time_budget_s \(override\): got 0; must be greater than 0"):
        load_sweep(written(in_tmp / "zero"), overrides=["tune.time_budget_s=0"])


def written(path: Path) -> Path:
    """Write the directory of a sweep that has not begun."""
    path.mkdir()
    tree = {"name": "some", "base": TREE, "space": {}, "points": [{}], "tune": {}}
    sealed.write(path / "sweep.yaml", tree)
    return path


PBT = {
    "name": "pbt",
    "perturb_every": 3,
    "quantile": 0.5,
    "mutations": {"method.lr": {"loguniform": [0.001, 1.0]}},
}


@pytest.mark.slow
def test_a_population_perturbs_running_federations_and_a_cut_one_does_the_same(ray_local, in_tmp):
    space = {"method.lr": {"grid": [0.1, 0.001, 0.3]}}
    uri = f"sqlite:///{in_tmp}/mlflow.db"
    tune = {"scheduler": PBT, "metric": "val/loss"}
    planned = plan(in_tmp, tune, space, checkpoint_every=3, tracking={"uri": uri})
    whole = sweep(planned, out=in_tmp / "whole")
    assert {end for end in ends(whole).values()} == {("finished", 9)}
    drawn = scan_lines(whole.path / "perturbed.jsonl")[0]
    assert [line["round"] for line in drawn] == [3, 6]
    forked = {one["trial"] for line in drawn for one in line["exploits"]}
    assert forked and {trial.point.name for trial in whole.trials if lineage(trial.path)} == forked
    for trial in whole.trials:
        for entry in lineage(trial.path):
            parent = RunFiles(whole.path / "trials" / entry["from"])
            assert entry["spent"]["total/bytes/up"] > 0
            if len(lineage(trial.path)) == 1 and not lineage(parent.path):
                mine = RunFiles(trial.path).rounds()[: entry["round"] + 1]
                assert mine == parent.rounds()[: entry["round"] + 1]
    assert whole.best is not None and (whole.path / "best.yaml").is_file()
    with pytest.raises(SystemExit):
        sweep(planned, out=in_tmp / "cut", on_round=cut_after(15))
    again = resume_sweep(in_tmp / "cut")
    assert scan_lines(again.path / "perturbed.jsonl")[0] == drawn
    for one, other in zip(whole.trials, again.trials, strict=True):
        results = [RunFiles(trial.path).read_json("result.json") or {} for trial in (one, other)]
        assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
        forks = [[{**entry, "spent": None} for entry in lineage(trial.path)] for trial in (one, other)]
        assert forks[0] == forks[1]
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    for trial in whole.trials:  # the run of a fork has the rounds of its files
        known = RunFiles(trial.path).read_json("mlflow.json") or {}
        history = client.get_metric_history(known["run_id"], "val/loss")
        rounds = [line["metrics"]["val/loss"] for line in RunFiles(trial.path).rounds()]
        assert [metric.value for metric in history] == rounds
        assert client.get_run(known["run_id"]).info.status == "FINISHED"
