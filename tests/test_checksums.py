"""Checksums of what a run leaves: a changed bit is found, or changes nothing that is read."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import fedray
from fedray.config import sealed
from fedray.durable import append_lines, as_lines, as_mapping, read_lines, read_mapping, scan_lines
from fedray.errors import FedrayError, RunError
from fedray.experiment.run import resume, run
from fedray.overview.summary import summary
from fedray.parquet import read_table, write_table
from fedray.report.reading import load_run
from tests.experiment import tiny

ROWS = [
    {"round": 0, "metrics": {"val/accuracy": 0.25, "x": None}, "notes": []},
    {"round": 1, "metrics": {"val/accuracy": 0.5, "x": 1e-300}, "notes": ["a, b", "é\n"]},
    {"round": 2, "metrics": {"val/accuracy": 0.75, "x": -0.0}, "notes": []},
]


def flips(data: bytes, every: int = 1) -> Iterator[bytes]:
    """Yield the data with each single bit changed, or one of `every`."""
    for place in range(len(data)):
        for bit in range(place % every, 8, every):
            yield data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    for row in ROWS:
        append_lines(path, [row])
    return path


def test_lines_are_as_written_and_any_reader_of_json_reads_them(lines: Path) -> None:
    assert read_lines(lines) == ROWS
    assert lines.read_bytes() == as_lines(ROWS)
    read = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    assert [line.pop("checksum") and line for line in read] == ROWS


def test_a_changed_bit_of_a_line_is_found(lines: Path) -> None:
    whole, kept = lines.read_bytes(), 0
    for data in flips(whole, every=4):
        lines.write_bytes(data)
        rows, problem = scan_lines(lines)
        for row, written in zip(rows, ROWS, strict=False):
            row = {key: row[key] for key in written}  # the first line's "checksum" may have another name
            assert row == written
        assert problem is not None or len(rows) >= 2  # the very last byte looks like a torn line
        kept += problem is None
    assert kept <= 2


@pytest.mark.parametrize(
    "order", [[1, 2], [0, 2], [0, 0, 1, 2], [0, 1, 1, 2], [1, 0, 2], [0, 2, 1], [0, 1, 2, 2]]
)
def test_a_missing_or_doubled_line_is_found(lines: Path, order: list[int]) -> None:
    written = lines.read_bytes().splitlines(keepends=True)
    lines.write_bytes(b"".join(written[n] for n in order))
    with pytest.raises(RunError, match=r"rows\.jsonl, line \d: is damaged, or the line before it is"):
        read_lines(lines)


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_makes_room_for_the_next(lines: Path, cut: int) -> None:
    lines.write_bytes(lines.read_bytes()[:-cut])
    kept = ROWS if cut == 1 else ROWS[:2]  # without its end, a line is whole
    assert read_lines(lines) == kept
    append_lines(lines, [{"round": 3}])
    assert read_lines(lines) == [*kept, {"round": 3}]
    assert lines.read_bytes() == as_lines([*kept, {"round": 3}])


def test_lines_of_an_earlier_version_have_no_checksums_and_new_ones_protect_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    assert read_lines(path) == ROWS[:2]
    append_lines(path, ROWS[2:])
    assert read_lines(path) == ROWS
    path.write_text(path.read_text().replace('"round": 1', '"round": 7'))
    with pytest.raises(RunError, match="line 3: is damaged, or the line before it is"):
        read_lines(path)


def test_long_lines_are_appended_to(tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.jsonl", [{"text": "x" * 100_000, "n": n} for n in range(3)]
    for row in rows:
        append_lines(path, [row])
    assert read_lines(path) == rows


@pytest.mark.parametrize(
    "value", [{}, {"a": 1}, {"status": "finished", "x": {"y": [1, 2.5, None]}, "é": "}"}], ids=str
)
def test_a_changed_bit_of_a_json_file_is_found(tmp_path: Path, value: dict[str, Any]) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(as_mapping(value))
    assert read_mapping(path) == value
    for data in flips(path.read_bytes(), every=2):
        path.write_bytes(data)
        try:
            found = read_mapping(path) or {}
        except RunError as error:
            assert "x.json" in str(error)
        else:  # the name of the checksum itself, or a line end
            assert {key: found[key] for key in value} == value


def test_a_changed_bit_of_a_table_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_table(path, {"client": [1, 2, 3], "loss": [0.5, float("nan"), 2.0], "fate": ["folded", "late", ""]})
    before = read_table(path)
    assert before is not None
    refused = 0
    for data in flips(path.read_bytes(), every=8):
        path.write_bytes(data)
        try:
            found = read_table(path)
        except RunError as error:
            refused += 1
            assert "x.parquet" in str(error)
        else:
            assert found is not None
            pd.testing.assert_frame_equal(found, before)
    assert refused > 300


# ── of a run
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    run(tiny.config(checkpoint_every=2), out=path)
    return path


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_a_changed_bit_of_a_model_is_found(copy: Path) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    expected = torch.cat([p.flatten() for p in fedray.load_model(copy).parameters()])
    for place in [*range(0, 500, 7), *np.random.default_rng(0).integers(500, len(whole), 100)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        try:
            found = fedray.load_model(copy)
        except FedrayError as error:
            assert "model.safetensors" in str(error)
        else:
            assert torch.equal(torch.cat([p.flatten() for p in found.parameters()]), expected)


def test_a_model_of_another_run_is_refused(copy: Path, tmp_path: Path) -> None:
    other = run(tiny.config(seed=9), out=tmp_path / "other")
    shutil.copy(other.path / "model.safetensors", copy / "model.safetensors")
    with pytest.raises(RunError, match=r"model\.safetensors: is not the model of result\.json"):
        fedray.load_model(copy)


def test_a_config_cut_after_any_line_is_refused_by_resume_and_by_readers(copy: Path) -> None:
    path = copy / "config.yaml"
    written = path.read_bytes().splitlines(keepends=True)
    assert len(written) > 40
    for count in range(len(written)):
        path.write_bytes(b"".join(written[:count]))
        for use in (resume, load_run):
            with pytest.raises(FedrayError, match=r"config\.yaml"):
                use(copy)
        assert summary(copy).status == "damaged"


def test_an_edited_config_is_refused_by_readers_and_a_config_by_hand_is_read(copy: Path) -> None:
    path = copy / "config.yaml"
    text = path.read_text()
    path.write_text(text.replace("rounds: 3", "rounds: 4"))
    with pytest.raises(RunError, match=r"config\.yaml: its values are not those that were written"):
        load_run(copy)
    path.write_text(text.partition("\nmethod")[2] and f"# mine\n{text.split(chr(10), 2)[2]}")
    assert load_run(copy).config["rounds"] == 3
    assert sealed.fault(path) is not None


@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
def test_rounds_that_are_missing_at_the_end_are_noticed(copy: Path, rounds: int) -> None:
    path = copy / "rounds.jsonl"
    written = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(written[:rounds]))
    with pytest.raises(RunError, match=r"rounds\.jsonl: (ends with|has no) round.*rounds are missing"):
        load_run(copy)
    assert "rounds are missing" in str(summary(copy).problem)
    if rounds < 3:
        with pytest.raises(RunError, match=r"rounds\.jsonl"):
            resume(copy)
    (copy / "result.json").unlink()
    with pytest.raises(RunError, match=r"rounds\.jsonl: .* its newest checkpoint is of round 3"):
        load_run(copy)
    if rounds == 3:  # there is a checkpoint after round 2
        assert resume(copy).result["status"] == "finished"
        assert load_run(copy).last_round == 3


def test_a_torn_last_round_before_its_checkpoint_is_no_hole(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(
            tiny.config(rounds=6, checkpoint_every=4),
            out=tmp_path / "r",
            on_round=tiny.ending(3, KeyboardInterrupt),
        )
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    (tmp_path / "r" / "checkpoints").mkdir()
    path = tmp_path / "r" / "rounds.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    assert load_run(tmp_path / "r").last_round == 2
