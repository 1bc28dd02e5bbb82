"""Chaos: schedules follow from seed and number, results are kept, and ten schedules end as they should."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import chaos, chaos_judge
from benchmarks.chaos_faults import DRAWING, FAULTS, MISBEHAVIOUR, ON_ACTORS, drawn
from benchmarks.chaos_run import PLUGIN, RUNS, VARIABLE, Play, Schedule

ROOT = Path(__file__).parents[2]
ROW: dict[str, Any] = {
    "seed": 0,
    "among": [0],
    "drawing": DRAWING,
    "commit": "abc",
    "actors": 0,
    "end": "equal",
    "processes": 2,
    "seconds": 3.0,
    "faults": ["interrupt"],
}


def test_a_schedule_follows_from_seed_and_number() -> None:
    first, second = ([drawn(seed, k, (0, 1))[0] for k in range(200)] for seed in (0, 1))
    assert first == [drawn(0, k, (0, 1))[0] for k in range(200)] != second
    assert {fault for schedule in first for fault in schedule.faults} == set(FAULTS)
    assert {kind for schedule in first for kind in schedule.clients.values()} >= set(ON_ACTORS)
    assert {schedule.run for schedule in first} == set(RUNS)
    for schedule in first:
        assert schedule.actors or not {"kill actor", "hang actor"} & set(schedule.faults)
        assert schedule.actors or not set(ON_ACTORS) & set(schedule.clients.values())
        assert ("outage" in schedule.faults) == (schedule.store == "server")


def test_the_file_of_the_clients_is_not_imported_by_name() -> None:
    assert "benchmarks.chaos_clients" not in sys.modules
    text = PLUGIN.read_text()
    kinds = {*MISBEHAVIOUR, *ON_ACTORS, *chaos_judge.EARLY, "fails first", "silent"}
    assert all(f'"{kind}": ' in text for kind in kinds) and f'VARIABLE = "{VARIABLE}"' in text


def commanded(monkeypatch: pytest.MonkeyPatch, out: Path, *more: str) -> int:
    monkeypatch.setattr(sys, "argv", ["chaos", "--actors", "0", "--out", str(out), *more])
    return chaos.main()


def add(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(ROW | row) + "\n" for row in rows))


def test_results_that_are_there_are_counted_and_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "chaos.jsonl"
    add(out, *({"number": k} for k in range(3)))
    assert commanded(monkeypatch, out, "--schedules", "3") == 0
    shown = capsys.readouterr().out
    assert "3 of 3 schedules ended as they should: 3 equal" in shown
    assert "interrupt: 3 times; alone: 3.0 s in process (3) in the median" in shown
    assert "played at abc (3)" in shown
    add(out, {"number": 3, "end": "WRONG: other weights"})
    assert commanded(monkeypatch, out, "--schedules", "4") == 1
    assert "3 of 4 schedules ended as they should: 3 equal, 1 WRONG" in capsys.readouterr().out
    add(out, {"number": 3, "commit": "def"})  # the last result counts
    assert commanded(monkeypatch, out, "--schedules", "4") == 0
    assert "played at abc (3), def (1)" in capsys.readouterr().out


def test_results_of_another_drawing_or_seed_are_not_counted_and_further_files_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, also = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    add(out, {"number": 0}, {"number": 1, "drawing": DRAWING - 1}, {"number": 1, "seed": 1})
    add(also, {"number": 1})
    options = Namespace(schedules=4, part="1/2", again=[0, 1])
    results = chaos.Results(out, {"seed": 0, "among": [0], "drawing": DRAWING})
    assert set(results.rows) == {0} and chaos.numbers(options, results.rows) == [1, 3]
    assert commanded(monkeypatch, out, "--also", str(also), "--schedules", "2") == 0
    assert "2 of 2 schedules ended as they should" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "happened", "damaged", "said", "end"),
    [
        (130, ["interrupt"], [], "interrupted", None),
        (143, ["outage", "interrupt"], [], "interrupted", None),
        (-9, ["kill driver"], [], "", None),
        (0, ["damage"], ["flip result.json", "new"], "", None),
        (1, ["damage"], ["flip result.json"], "failed: result.json: no", "refused"),
        (
            1,
            ["full disk"],
            [],
            "/x/run/a: cannot be written: File too large; free space, then `fedray resume",
            None,
        ),
        (1, ["full disk"], [], "failed: no idea", "WRONG: it names no file"),
        (1, ["kill actor"], [], "failed: the actors are gone", "WRONG: status 1"),
        (1, [], [], "failed", "WRONG: status 1"),
        (-11, ["interrupt"], [], "", "WRONG: status -11"),
        (130, [], [], "", "WRONG: status 130"),
        (1, [], ["flip config.yaml"], "failed: /x/run/con\nfig.yaml: no", "refused"),
        (1, ["interrupt"], ["cut clients.parquet/part-1"], "failed: clients.parquet: no", "refused"),
        (1, [], ["flip config.yaml"], "failed: it cannot be read", "WRONG: it names no damaged file"),
        (1, [], ["cut checkpoints/a"], "checkpoints", "WRONG: it names no damaged file"),
        (1, [], ["remove checkpoints/a"], "run/checkpoints is empty, but rounds.jsonl has rounds", "refused"),
        (3, [], ["flip config.yaml"], "config.yaml", "WRONG: status 3"),
        (0, [], [], "Traceback (most recent call last)", "WRONG: a traceback"),
    ],
)
def test_how_a_process_may_end(
    status: int, happened: list[str], damaged: list[str], said: str, end: str | None, tmp_path: Path
) -> None:
    play = Play(tmp_path, np.random.default_rng(0), Schedule(0, "topk", 0, "none", {}, ()), damaged=damaged)
    play.seen = len(damaged) - ("new" in damaged)
    (tmp_path / "output.txt").write_text(said)
    play.run.mkdir()
    found = chaos_judge.ended(play, status, happened, chaos_judge.References(tmp_path))
    assert found is None if end is None else found is not None and found.startswith(end)


def test_a_refusal_may_change_nothing(tmp_path: Path) -> None:
    play = Play(tmp_path, np.random.default_rng(0), Schedule(0, "topk", 0, "none", {}, ()))
    play.damaged.append("flip config.yaml")
    (tmp_path / "output.txt").write_text("config.yaml: damaged")
    play.run.mkdir()
    (play.run / "rounds.jsonl").write_text("1")
    play.found = play.content()
    assert list(chaos_judge.wrong_refusal(play)) == []
    (play.run / "rounds.jsonl").write_text("2")
    (play.run / "new").touch()
    assert list(chaos_judge.wrong_refusal(play)) == ["it changed new, rounds.jsonl"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ten_schedules_end_as_they_should(tmp_path: Path) -> None:
    out = str(tmp_path / "c.jsonl")
    command = [sys.executable, "-m", "benchmarks.chaos", "--schedules", "10", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 schedules ended as they should" in done.stdout
