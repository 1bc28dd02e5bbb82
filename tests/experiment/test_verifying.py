"""Published results are made again: the same bits here, a tolerance elsewhere, and all else is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedray.cli import app
from fedray.errors import ConfigError
from fedray.experiment import verifying
from fedray.experiment.makers import MADE_BY, makers
from fedray.experiment.run import resume, run
from fedray.report.cells import Cell, cells_of, write_cells
from fedray.storage.run_files import RunFiles
from fedray.tracking import provenance
from tests.experiment import tiny


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    run(tiny.config(), out=path)
    return path


@pytest.fixture(scope="module")
def cell(there: Path) -> Cell:
    return cells_of([there])[0]


def changed(cell: Cell, **metrics: Any) -> Cell:
    other = {name.replace("__", "/"): value for name, value in metrics.items()}
    return replace(cell, weights_sha256="0" * 64, metrics=cell.metrics | other)


def test_a_cell_comes_out_with_the_same_bits(cell: Cell, tmp_path: Path) -> None:
    verdict = verifying.verify(cell, out=tmp_path / "again")
    assert (verdict.outcome, verdict.reasons, verdict.run) == ("same bits", (), tmp_path / "again")


def test_on_the_same_kind_of_processor_other_bits_are_told(cell: Cell, there: Path) -> None:
    verdict = verifying.judged(changed(cell), there)
    assert verdict.outcome == "differs" and "other bits on the same kind" in verdict.reasons[0]


@pytest.mark.parametrize("key", provenance.BITS)
def test_on_another_machine_a_tolerance_holds(cell: Cell, there: Path, key: str) -> None:
    elsewhere = replace(changed(cell), made_by=({**cell.made_by[0], key: "another"},))
    verdict = verifying.judged(elsewhere, there)
    assert verdict.outcome == "within tolerance" and verdict.reasons[0].startswith(f"{key}: another, here ")


@pytest.mark.parametrize(
    "metric, factor", [("test/accuracy", 1.1), ("total/bytes/up", 1.06), ("total/time/simulated_s", 0.9)]
)
def test_beyond_the_tolerance_the_figure_is_named(
    cell: Cell, there: Path, metric: str, factor: float
) -> None:
    far = replace(
        changed(cell, **{metric.replace("/", "__"): factor * cell.metrics[metric]}),
        made_by=({"processor": "another"},),
    )
    verdict = verifying.judged(far, there)
    assert verdict.outcome == "differs" and verdict.reasons[0].startswith(metric)


def test_other_data_is_named(cell: Cell, there: Path) -> None:
    verdict = verifying.judged(replace(changed(cell), data={"training": "0" * 12}), there)
    assert verdict.outcome == "differs" and "other data" in verdict.reasons[0]


def test_a_cell_is_found_among_runs_by_its_config(cell: Cell, there: Path) -> None:
    found, missing = verifying.against([cell, replace(cell, digest="0" * 12)], [there.parent])
    assert (found.outcome, missing.outcome, missing.good) == ("same bits", "not found", False)


def test_only_keys_that_change_no_result_may_be_given(cell: Cell) -> None:
    assert verifying.config_of(cell, ["clients.actors=0", "tracking.experiment=x"]).method.options.lr == 0.05
    with pytest.raises(ConfigError, match=r"method\.lr: a cell is verified as it was published"):
        verifying.config_of(cell, ["method.lr=1"])


@pytest.mark.parametrize("pattern, names", [("a*", ["a s0", "a s1"]), ("b s0", ["b s0"]), ("*s1", ["a s1"])])
def test_cells_are_chosen_by_pattern(cell: Cell, pattern: str, names: list[str]) -> None:
    cells = [replace(cell, name=name) for name in ("a s0", "a s1", "b s0")]
    assert [found.name for found in verifying.chosen(cells, [pattern])] == names
    with pytest.raises(ConfigError, match=r"did you mean 'b s0'\?"):
        verifying.chosen(cells, ["b s"])


def test_from_the_command_line(cell: Cell, there: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    write_cells(file, [cell, replace(changed(cell), name="other")], [])
    command = ["verify", str(file), "--against", str(there), "--json"]
    done = CliRunner().invoke(app, [*command, "--cell", cell.name])
    assert done.exit_code == 0 and json.loads(done.stdout)["matching"] == 1
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert [found["outcome"] for found in json.loads(done.stdout)["cells"]] == ["same bits", "differs"]


# ── what made a run
# ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_moves_to_another_processor_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "run"
    run(tiny.config(rounds=2), out=path)
    elsewhere = {"processor": "another", "torch": "1"}
    monkeypatch.setattr("fedray.experiment.makers.machine", lambda: elsewhere)
    resume(path, ["rounds=4"])
    first, second = makers(RunFiles(path))
    assert first == {"from_round": 0, **provenance.machine()}
    assert second == {"from_round": 3, **elsewhere}
    resume(path, ["rounds=6"])
    assert makers(RunFiles(path)) == [first, second]


def test_rounds_that_are_made_again_have_one_maker(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "run"
    run(tiny.config(rounds=4), out=path)
    (path / "result.json").unlink()
    shutil.rmtree(path / "checkpoints")
    (path / "rounds.jsonl").unlink()
    monkeypatch.setattr("fedray.experiment.makers.machine", lambda: {"processor": "another"})
    resume(path)
    assert makers(RunFiles(path)) == [{"from_round": 0, "processor": "another"}]


@pytest.mark.parametrize("damage", [b"{", b'{"processes": 1}', b'{"processes": [1]}', None])
def test_a_damaged_or_missing_list_is_replaced(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "run"
    run(tiny.config(rounds=2), out=path)
    (path / MADE_BY).unlink()
    if damage is not None:
        (path / MADE_BY).write_bytes(damage)
    resume(path, ["rounds=3"])
    found = makers(RunFiles(path))
    assert [entry["from_round"] for entry in found] == [0, 3] and found[0]["processor"] == "unknown"
