"""Runs that reach a target, and the time that a sweep has spent."""

import time
from math import inf

import pytest

import fedray
from fedray.config.stop_rules import Targets
from fedray.experiment.run import resume, run
from fedray.report.reading import load_run
from fedray.storage.run_files import RunFiles
from fedray.sweeps.outcome import status_of
from fedray.sweeps.stopping import SPENT, Budget, lacks_note
from tests.experiment.tiny import config, ending, figures


def test_a_run_that_reaches_its_target_is_finished_and_tested(tmp_path):
    made = run(config(rounds=6), out=tmp_path / "run", until=Targets({"round": 4}))
    assert made.result["ended"] == "round 4 ≥ 4"
    assert made.result["status"] == status_of(made.path) == load_run(made.path).status == "finished"
    assert made.result["rounds"] == made.rounds[-1]["round"] == 4
    shorter = run(config(rounds=4), out=tmp_path / "shorter")
    assert made.weights_sha256 == shorter.weights_sha256
    assert made.result["test/accuracy"] == shorter.result["test/accuracy"]


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_a_run_that_was_cut_ends_at_the_same_round(tmp_path, cut):
    """Also when it died right after the round that ends it, and when its checkpoint is older."""
    whole = run(config(rounds=6), out=tmp_path / "whole", until=Targets({"round": 4}))
    with pytest.raises(KeyboardInterrupt):
        changed = config(rounds=6, checkpoint_every=100)
        stop = ending(cut, KeyboardInterrupt)
        run(changed, out=tmp_path / "cut", on_round=stop, until=Targets({"round": 4}))
    again = resume(tmp_path / "cut", until=Targets({"round": 4}))
    assert again.rounds[-1]["round"] == 4
    assert again.weights_sha256 == whole.weights_sha256
    assert figures(tmp_path / "cut")["clients"] == figures(tmp_path / "whole")["clients"]


def test_a_run_that_has_ended_can_be_given_its_other_rounds(tmp_path):
    run(config(rounds=6), out=tmp_path / "run", until=Targets({"round": 4}))
    more = fedray.resume(tmp_path / "run")
    assert "ended" not in more.result
    assert more.weights_sha256 == run(config(rounds=6), out=tmp_path / "whole").weights_sha256
    assert RunFiles(tmp_path / "run" / "ended-000004").read_json("result.json")["ended"]  # type: ignore[index]


def test_a_target_at_the_last_round_ends_nothing(tmp_path):
    assert "ended" not in run(config(), out=tmp_path / "run", until=Targets({"round": 3})).result


def test_the_time_of_all_sessions_counts(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first = Budget(tmp_path, 60.0)
    now[0] += 100  # Ray starts
    assert not first.check(0) and first.left_s == 60
    first.check(1)
    now[0] += 40
    assert not first.check(2)  # and it is noted
    now[0] += 3  # lost, if the driver is killed here
    second = Budget(tmp_path, 60.0)
    assert second.spent_s == 40
    second.check(1)
    now[0] += 20
    assert second.check(1) and second.is_over
    assert Budget(tmp_path, 120.0).left_s == 60
    assert Budget(tmp_path, None).left_s == inf


def test_without_a_budget_nothing_is_written(tmp_path):
    budget = Budget(tmp_path, None)
    assert not budget.check(1)
    budget.note()
    assert not (tmp_path / SPENT).exists()


def test_a_missing_note_of_the_time_spent_is_noticed_once_a_trial_has_made_rounds(tmp_path):
    assert not lacks_note(tmp_path, 10.0)
    trial = tmp_path / "trials" / "00"
    trial.mkdir(parents=True)
    (trial / "rounds.jsonl").touch()
    assert lacks_note(tmp_path, 10.0) and not lacks_note(tmp_path, None)
    Budget(tmp_path, 10.0).note()
    assert not lacks_note(tmp_path, 10.0)
