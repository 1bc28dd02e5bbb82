"""Results that can be checked: a small file with a cell for each run, read like directories of runs.

    directories → find_runs → Cell → results/NAME.json → Cell → RunData → table, figures

A cell holds all that decides a run's result (its config), what it gave (metrics, `weights_sha256`, the curve
over its evaluated rounds) and what made it (processor, versions, commit). `fedray verify` makes it again.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.config.trees import Tree, decisive, flatten
from fedray.durable import local_path, read_mapping, replace, sealed_text
from fedray.errors import ConfigError, RunError
from fedray.report.reading import RunData, find_runs, load_run
from fedray.report.series import OPEN_SECTIONS, label_runs

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
CURVE = ("val/accuracy", "val/loss", "density/global", "clients/failed")
"""Metrics of rounds that a cell keeps, beside all totals."""

LEFT_OUT = ("checksum", "status", "weights_sha256", "config_digest")
"""Entries of `result.json` that are no metric, or stand elsewhere in a cell."""


@dataclass(frozen=True)
class Cell:
    """One finished run.

    Args:
        name: distinguishes it from the others of its file: the keys in which configs differ, the seed last.
        config: every key that its result depends on.
        digest: of the config, as the version that made it computed it.
        weights_sha256: of the final model.
        data: part of the data set → its digest, as in `data.json`.
        made_by: processor, versions and commit of each process that made rounds of it.
        metrics: final metrics and declared settings by name, wall times left out.
        curve: metric → its values, and `round`, in the rounds that were evaluated; seven digits.
    """

    name: str
    config: Tree
    digest: str
    weights_sha256: str
    data: dict[str, str]
    made_by: tuple[dict[str, Any], ...]
    metrics: dict[str, Any]
    curve: dict[str, list[float | None]]

    def to_run(self, path: Path) -> RunData:
        """Return the cell as the contents of a run's files.

        Args:
            path: the file that it is in.
        """
        import pandas as pd

        rounds = pd.DataFrame(self.curve).astype(float).astype({"round": int})
        return RunData(
            path=path,
            name=self.name,
            label=self.name,
            config=self.config,
            rounds=rounds,
            client_accuracy=None,
            result={**self.metrics, "weights_sha256": self.weights_sha256, "status": "finished"},
        )


def cells_of(paths: Sequence[str | Path]) -> list[Cell]:
    """Return a cell for each finished run below directories.

    Raises:
        ConfigError: if there is no run, or one is not finished.
        RunError: if a file of a run is damaged.
    """
    runs = label_runs([load_run(path) for path in find_runs(paths)])
    open_runs = [run.label for run in runs if not run.finished]
    if open_runs:
        some = ", ".join(open_runs[:5]) + (f" and {len(open_runs) - 5} more" if len(open_runs) > 5 else "")
        raise ConfigError(
            f"{len(open_runs)} of {len(runs)} runs are not finished: {some}; a file of results holds "
            "finished runs only. Resume them, or give the directories of the others"
        )
    return [_cell(run) for run in runs]


def _cell(run: RunData) -> Cell:
    result = run.result or {}
    made_by = (read_mapping(run.path / "made_by.json") or {}).get("processes") or [{"processor": "unknown"}]
    metrics = {k: v for k, v in result.items() if k not in LEFT_OUT and not k.endswith("wall_s")}
    return Cell(
        name=run.label,
        config=_flat(run.config),
        digest=str(result["config_digest"]),
        weights_sha256=str(result["weights_sha256"]),
        data=data_digests(run.path),
        made_by=tuple(made_by),
        metrics=metrics,
        curve=_curve(run.rounds),
    )


def data_digests(path: Path) -> dict[str, str]:
    """Return the digest of each part of a run's data set; nothing where an earlier version made it."""
    parts = (read_mapping(path / "data.json") or {}).get("parts", {})
    return {str(name): str(part.get("digest")) for name, part in parts.items()}


def _curve(rounds: "pd.DataFrame") -> dict[str, list[float | None]]:
    """Return the columns that reports use, of the evaluated rounds."""
    columns = [
        c for c in rounds.columns if c in CURVE or (c.startswith("total/") and not c.endswith("wall_s"))
    ]
    there = rounds[rounds["val/accuracy"].notna()] if "val/accuracy" in rounds else rounds
    kept: dict[str, list[float | None]] = {"round": [int(number) for number in there["round"]]}
    return kept | {column: [_digits(value) for value in there[column]] for column in columns}


def _digits(value: float) -> float | None:
    if value != value:
        return None
    short = float(f"{value:.7g}")
    return int(short) if short == int(short) and abs(short) < 2**53 else short


def _flat(config: Mapping[str, Any]) -> Tree:
    """Return dotted key → value of the keys that a result depends on."""
    return flatten(decisive(config), lambda key: key not in OPEN_SECTIONS)


# ── the file
# ──────────────────────────────────────────────────────────────────────────────────────────


def write_cells(path: str | Path, cells: Sequence[Cell], commands: Sequence[str]) -> None:
    """Write a file of results.

    Args:
        path: the file; it is replaced.
        cells: at least one.
        commands: that make the runs and this file, for the reader.

    Raises:
        ConfigError: if it cannot be written.
    """
    common = {
        key: value
        for key, value in cells[0].config.items()
        if all(key in cell.config and cell.config[key] == value for cell in cells)
    }
    rows = [
        {
            "cell": cell.name,
            "config": {key: value for key, value in cell.config.items() if key not in common},
            "config_digest": cell.digest,
            "weights_sha256": cell.weights_sha256,
            "data": cell.data,
            "made_by": list(cell.made_by),
            "metrics": cell.metrics,
            "curve": cell.curve,
        }
        for cell in cells
    ]
    head = json.dumps({"fedray_results": FORMAT, "commands": list(commands), "config": common}, indent=2)
    lines = ",\n    ".join(json.dumps(row) for row in rows)  # a line for each cell
    text = head.removesuffix("\n}") + f',\n  "cells": [\n    {lines}\n  ]\n}}'
    file = local_path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, sealed_text(text.encode()))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written: {error.strerror or error}") from None


def read_cells(path: str | Path) -> list[Cell]:
    """Read a file of results.

    Raises:
        ConfigError: if there is no such file, or it is another one.
        RunError: if it is damaged.
    """
    file = local_path(path)
    writes = "`fedray results DIRECTORIES --out FILE` writes one"
    if file.suffix != ".json":
        raise ConfigError(f"{file} is no file of results (NAME.json); {writes}")
    content = read_mapping(file)
    if content is None:
        raise ConfigError(f"{file} does not exist; {writes}")
    if "fedray_results" not in content:
        raise ConfigError(f"{file} is no file of results; {writes}")
    if content["fedray_results"] != FORMAT:
        given = content["fedray_results"]
        raise ConfigError(f"{file}: has format {given!r}, and this version reads {FORMAT}; update fedray")
    try:
        return [_read(content["config"], cell) for cell in content["cells"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RunError(f"{file}: is damaged: a cell lacks {error}") from None


def _read(common: Mapping[str, Any], cell: Mapping[str, Any]) -> Cell:
    return Cell(
        name=str(cell["cell"]),
        config={**common, **cell["config"]},
        digest=str(cell["config_digest"]),
        weights_sha256=str(cell["weights_sha256"]),
        data=dict(cell["data"]),
        made_by=tuple(dict(entry) for entry in cell["made_by"]),
        metrics=dict(cell["metrics"]),
        curve={str(key): list(values) for key, values in cell["curve"].items()},
    )


def load_runs(paths: Iterable[str | Path]) -> list[RunData]:
    """Return the runs in files of results (`NAME.json`), then those in directories, in the order given.

    Raises:
        ConfigError: if a directory holds no run, or a file is none of results.
        RunError: if a file is damaged.
    """
    runs: list[RunData] = []
    directories: list[str | Path] = []
    given = list(paths)
    for path in given:
        if local_path(path).suffix == ".json" and local_path(path).is_file():
            runs += [cell.to_run(local_path(path)) for cell in read_cells(path)]
        else:
            directories.append(path)
    if directories or not given:
        runs += [load_run(path) for path in find_runs(directories)]
    return runs
