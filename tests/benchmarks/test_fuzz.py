"""The fuzzer: a small share of its inputs, and that it finds what it looks for."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from benchmarks.fuzz import pieces
from benchmarks.fuzz.mutations import bytes_of, text_of, tree_of
from benchmarks.fuzz.pieces import Piece, in_child, run_piece
from benchmarks.fuzz.target import Read, Target
from benchmarks.fuzz.targets import TARGETS
from fedray.errors import WireError
from tests.test_readme import ROOT

FAST = {"payloads": 600, "masks": 200, "updates": 200, "checkpoints": 150, "sealed checkpoints": 80}
FAST |= {"journals": 100, "sealed YAML": 30, "YAML": 150, "arguments": 150, "configs": 20}


@pytest.mark.parametrize("name", FAST)
def test_a_share_of_the_inputs_has_no_fault(name: str) -> None:
    outcome = run_piece(Piece(name, 0, FAST[name]), seed=1)
    assert outcome.faults == () and 0 < outcome.read < FAST[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TARGETS) - set(FAST)))
def test_a_share_of_the_slow_ones_has_none(name: str) -> None:
    assert run_piece(Piece(name, 0, 60), seed=1).faults == ()


def test_the_shares_are_of_a_thousand() -> None:
    assert sum(target.share for target in TARGETS.values()) == 1000
    counts: dict[str, list[int]] = {}
    for piece in pieces.pieces(10_000, 500):
        counts.setdefault(piece.target, []).extend(range(piece.first, piece.end))
    for name, target in TARGETS.items():
        assert sorted(counts[name]) == list(range(10 * target.share))


def test_an_input_depends_on_seed_target_and_number_alone() -> None:
    seeds = [b"some bytes that are changed", b"others"]
    assert bytes_of(Random("0 a 1"), seeds) == bytes_of(Random("0 a 1"), seeds)
    many = {bytes_of(Random(f"0 a {number}"), seeds) for number in range(500)}
    assert len(many) > 300
    assert len({text_of(Random(f"0 a {number}"), ["a: {b: 1}\nc: 2\n"]) for number in range(200)}) > 100
    trees = [{"a": {"b": [1, 2]}, "c": None}]
    assert len({repr(tree_of(Random(f"0 a {number}"), trees)) for number in range(200)}) > 80
    assert trees == [{"a": {"b": [1, 2]}, "c": None}]


def faulty(random: Random) -> None:
    """Do what a reader must not, for some inputs."""
    number = random.randrange(100)
    if number < 10:
        raise KeyError("undeclared")
    if number < 50:
        raise WireError("declared")


def of(read: Read) -> Target:
    return Target(1, lambda folder: read, (WireError,))


def test_an_undeclared_error_is_a_fault() -> None:
    outcome = run_piece(Piece("x", 0, 300), 0, of(faulty))
    assert 10 < len(outcome.faults) <= pieces.MOST_FAULTS and 100 < outcome.read < 200
    number, text = outcome.faults[0]
    assert text == "KeyError: 'undeclared'"
    assert run_piece(Piece("x", number, 1), 0, of(faulty)).faults == ((number, text),)  # again, alone


def test_an_input_that_takes_too_long_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "INPUT_S", 0.2)

    def hangs(random: Random) -> None:
        while True:
            pass

    assert run_piece(Piece("x", 0, 1), 0, of(hangs)).faults == (
        (0, "TooSlow: took more than 0.2 s of CPU time"),
    )


def test_an_input_that_takes_much_memory_is_a_fault() -> None:
    def takes(random: Random) -> None:
        b"x" * (pieces._peak_bytes() + 2 * pieces.INPUT_BYTES)

    ((_, text),) = run_piece(Piece("x", 0, 1), 0, of(takes)).faults
    assert text.endswith("MiB of memory")


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_process_that_dies_or_stands_still_is_a_fault(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def dies(random: Random) -> None:
        if random.random() < 0.1:
            os.kill(os.getpid(), signal.SIGKILL)

    def sleeps(random: Random) -> None:
        time.sleep(100)

    monkeypatch.setattr(pieces, "INPUT_S", 0.02)
    monkeypatch.setitem(TARGETS, "x", of(dies if how == "dies" else sleeps))
    outcome = in_child(Piece("x", 0, 100), 0)
    ((number, text),) = outcome.faults
    assert text == "the process ended with status -9"
    if how == "dies":
        assert Random(f"0 x {number}").random() < 0.1


def test_the_command_continues_and_says_what_it_read(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz", "--only", "masks", "--inputs", "300", "--each", "100"]
    first = subprocess.run(
        [*command, "--out", str(tmp_path / "f.jsonl")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "300 inputs of seed 0, 0 faults" in first.stdout
    lines = (tmp_path / "f.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 3
    (tmp_path / "f.jsonl").write_text("".join(lines[:1]) + lines[1][:20])  # killed as it wrote
    again = list(pieces.outcomes(300, 0, 100, tmp_path / "f.jsonl", "masks"))
    assert sum(outcome.piece.count for outcome in again) == 300
    assert len((tmp_path / "f.jsonl").read_text().splitlines()) == 3
