"""Each scheduler under a real Tune: which trials end when, and after a resume."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from fedray.durable import scan_lines
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
