"""Files of results: what goes in comes out, tables from a file equal those from its directories."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.errors import ConfigError, RunError
from fedray.experiment.run import run
from fedray.report.cells import CURVE, Cell, cells_of, load_runs, read_cells, write_cells
from fedray.report.table import comparison, write_report
from tests.experiment import tiny

NUMBER = st.floats(allow_nan=False, allow_infinity=False, width=32)
CELL = st.builds(
    Cell,
    name=st.text(min_size=1),
    config=st.dictionaries(st.text(), st.one_of(st.none(), st.booleans(), st.integers(), NUMBER, st.text())),
    digest=st.text("0123456789abcdef", min_size=12, max_size=12),
    weights_sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    data=st.dictionaries(st.text(), st.text()),
    made_by=st.lists(st.dictionaries(st.text(), st.text())).map(tuple),
    metrics=st.dictionaries(st.text(), st.one_of(NUMBER, st.text())),
    curve=st.dictionaries(st.text(), st.lists(st.one_of(st.none(), NUMBER))),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        run(tiny.config(seed=seed), out=folder / f"fedavg-{seed}")
    run(tiny.config({"method.name": "random_mask", "method.density": 0.5}), out=folder / "mask")
    return folder


@pytest.fixture(scope="module")
def file(runs: Path) -> Path:
    path = runs.parent / "results.json"
    write_cells(path, cells_of([runs]), ["fedray run x.yaml"])
    return path


@settings(deadline=None, max_examples=25)
@given(cells=st.lists(CELL, min_size=1, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, cells: list[Cell]) -> None:
    path = tmp_path_factory.mktemp("cells") / "x.json"
    write_cells(path, cells, [])
    assert read_cells(path) == cells


def test_a_cell_has_all_that_decides_a_result_and_what_made_it(runs: Path, file: Path) -> None:
    first, second, mask = read_cells(file)
    assert [first.name, second.name, mask.name] == ["fedavg s0", "fedavg s1", "random_mask s0"]
    assert first.config["method.lr"] == 0.05 and "tracking.uri" not in first.config
    assert "clients.actors" not in first.config and "data.root" not in first.config
    result = json.loads((runs / "fedavg-0" / "result.json").read_text())
    assert first.weights_sha256 == result["weights_sha256"] != second.weights_sha256
    assert first.metrics["test/accuracy"] == result["test/accuracy"]
    assert not any(name.endswith("wall_s") for name in (*first.metrics, *first.curve))
    assert set(first.data) == {"training", "validation", "test"}
    assert first.made_by[0]["from_round"] == 0 and ", " in first.made_by[0]["processor"]
    assert first.curve["round"] == [0, 1, 2, 3] and set(CURVE) - {"clients/failed"} <= set(first.curve)
    assert len(file.read_text().splitlines()) < 80  # a line for each cell


def test_the_table_of_a_file_is_that_of_its_directories(runs: Path, file: Path, tmp_path: Path) -> None:
    ours, theirs = comparison(load_runs([file]), 0.4), comparison(load_runs([runs]), 0.4)
    assert ours["n"].tolist() == [2, 1]
    for column in theirs.columns:
        if theirs[column].dtype.kind == "f":
            assert ours[column].to_numpy() == pytest.approx(theirs[column].to_numpy(), rel=1e-4, nan_ok=True)
        else:
            assert list(ours[column]) == list(theirs[column])
    report = write_report([file], tmp_path / "report")
    assert {"table.md", "accuracy_by_bytes.png"} <= {path.name for path in report.files}


def test_a_file_and_a_directory_stand_in_one_table(runs: Path, file: Path) -> None:
    assert len(load_runs([file, runs / "mask"])) == 4


def test_a_run_that_is_not_finished_is_refused(runs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / "mask", tmp_path / "mask")
    (tmp_path / "mask" / "result.json").unlink()
    with pytest.raises(ConfigError, match="1 of 3 runs are not finished: random_mask"):
        cells_of([runs / "fedavg-0", runs / "fedavg-1", tmp_path / "mask"])


@pytest.mark.parametrize("old, new", [('"seed": 1', '"seed": 2'), ("fedavg s0", "fedavg s9"), ("0.7", "0.8")])
def test_an_edited_file_is_refused(file: Path, tmp_path: Path, old: str, new: str) -> None:
    edited = tmp_path / "results.json"
    edited.write_text(file.read_text().replace(old, new, 1))
    assert edited.read_text() != file.read_text()
    with pytest.raises(RunError, match="checksum"):
        read_cells(edited)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"rounds": 3}', "is no file of results"),
        ('{"fedray_results": 9}', "has format 9, and this version reads 1"),
        ('{"fedray_results": 1, "config": {}}', "lacks 'cells'"),
        ('{"fedray_results": 1, "config": {}, "cells": [{}]}', "a cell lacks 'cell'"),
        ("[]", "does not hold a JSON mapping"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises((ConfigError, RunError), match=message):
        read_cells(path)
