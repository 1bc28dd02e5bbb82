"""Chaos: schedules follow from seed and number, results are kept, and ten schedules end as they should."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import chaos
from benchmarks.chaos_run import RUNS

ROOT = Path(__file__).parents[2]


def test_a_schedule_follows_from_seed_and_number() -> None:
    first, second = ([chaos.drawn(seed, k, (0, 1))[0] for k in range(100)] for seed in (0, 1))
    assert first == [chaos.drawn(0, k, (0, 1))[0] for k in range(100)] != second
    assert {fault for schedule in first for fault in schedule.faults} == set(chaos.FAULTS)
    assert {schedule.run for schedule in first} == set(RUNS)
    for schedule in first:
        assert schedule.actors or "kill actor" not in schedule.faults
        assert schedule.actors or "dies" not in schedule.clients.values()


def test_results_that_are_there_are_counted_and_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"seed": 0, "among": [0], "end": "equal", "processes": 2, "seconds": 3.0, "faults": ["interrupt"]}
    out = tmp_path / "chaos.jsonl"
    out.write_text("".join(json.dumps(row | {"number": k}) + "\n" for k in range(3)))
    monkeypatch.setattr(sys, "argv", ["chaos", "--schedules", "3", "--actors", "0", "--out", str(out)])
    assert chaos.main() == 0
    shown = capsys.readouterr().out
    assert "3 of 3 schedules ended as they should: 3 equal" in shown
    assert "interrupt: 3 times, 3.0 s in the median where it was alone" in shown
    with out.open("a") as file:
        file.write(json.dumps(row | {"number": 3, "end": "WRONG: other weights"}) + "\n")
    monkeypatch.setattr(sys, "argv", ["chaos", "--schedules", "4", "--actors", "0", "--out", str(out)])
    assert chaos.main() == 1
    assert "3 of 4 schedules ended as they should: 3 equal, 1 WRONG" in capsys.readouterr().out


@pytest.mark.slow
def test_ten_schedules_end_as_they_should(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.chaos",
        "--schedules",
        "10",
        "--out",
        str(tmp_path / "c.jsonl"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 of 10 schedules ended as they should" in done.stdout
