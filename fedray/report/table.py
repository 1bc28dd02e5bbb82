"""Runs → tables and figures, from the files of their directories alone.

    directory → RunData → Setting (the seeds of one config) → a row of a table, a line in a picture

Nothing is mixed in silence: runs that stopped early, or have another number of rounds, get a separate row
that says so; a mean is only taken over runs that all have the number; a comparison with FedAvg needs a FedAvg
whose other settings agree.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from fedray.durable import as_mapping, local_path, read_mapping, replace
from fedray.errors import ConfigError
from fedray.report.cells import load_runs
from fedray.report.reading import RunData
from fedray.report.series import Flat, Setting, settings

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

KILO, MEGA, TERA = 1e3, 1e6, 1e12

# ── comparing
# ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Reached:
    """Costs of a run from its start until it first reached an accuracy.

    Args:
        round: number of the round after which it was measured.
        up_bytes: bytes sent by clients.
        simulated_s: simulated seconds.
    """

    round: int
    up_bytes: float
    simulated_s: float


def accuracy_at(run: RunData, target: float) -> Reached | None:
    """Return the costs until validation accuracy was first `target` (in (0, 1]) or above.

    None where that never happened: the run is censored, not infinitely slow.
    """
    if "val/accuracy" not in run.rounds:
        return None
    there = run.rounds[run.rounds["val/accuracy"] >= target]
    if there.empty:
        return None
    first = there.iloc[0]
    return Reached(
        round=int(first["round"]),
        up_bytes=float(first.get("total/bytes/up", nan)),
        simulated_s=float(first.get("total/time/simulated_s", nan)),
    )


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % t-interval (NaN for fewer than two values).

    Of normal values it covers the mean in 95 of 100 cases, of as few as there are; of five skewed, uniform or
    heavy-tailed ones in 93 to 96. (A percentile bootstrap of five covers it in 83 to 85, their interquartile
    mean's in 89 to 91.) All intervals of reports and judgements are of this kind.

    One missing value (NaN) makes both NaN: a mean over the available values would compare unlike things.
    """
    if not values or not all(map(isfinite, values)):
        return nan, nan
    if len(values) < 2:
        return fmean(values), nan
    from scipy.special import stdtrit

    return fmean(values), float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / sqrt(len(values))


MEASURES = {
    "val accuracy": ("val/accuracy", 1.0),
    "test accuracy": ("test/accuracy", 1.0),
    "density": ("density/global", 1.0),
    "up MB": ("total/bytes/up", MEGA),
    "down MB": ("total/bytes/down", MEGA),
    "executed TFLOP": ("total/flops/executed", TERA),
    "theoretical TFLOP": ("total/flops/clients", TERA),
    "client kJ": ("total/energy/clients_j", KILO),
    "simulated s": ("total/time/simulated_s", 1.0),
    "compute-bound s": ("total/time/compute_bound_s", 1.0),
    "network-bound s": ("total/time/network_bound_s", 1.0),
}
"""Column of the table → metric and divisor."""

AGAINST_FEDAVG = {
    "up MB": "up × FedAvg",
    "down MB": "down × FedAvg",
    "executed TFLOP": "executed × FedAvg",
    "theoretical TFLOP": "theoretical × FedAvg",
    "client kJ": "kJ × FedAvg",
    "simulated s": "simulated × FedAvg",
    "compute-bound s": "compute-bound × FedAvg",
    "network-bound s": "network-bound × FedAvg",
}
DIFFERENCE = "test − FedAvg"
"""Column of the table: points of test accuracy, paired by seed."""

Cells = dict[str, Any]
"""Column → value, for one row."""


def comparison(runs: Sequence[RunData], target: float | None = None) -> "pd.DataFrame":
    """Return a table with a row per setting: final accuracies, density, and the costs of all rounds.

    Each measure has its mean over seeds and, beside it in `… ±`, half of the 95 % t-interval (NaN for one
    seed). `… × FedAvg` divides by the FedAvg row whose settings outside `method` agree (if there are several,
    the one that sends exact values; else the one whose method options agree too) after as many rounds; NaN
    where there is none. `test − FedAvg` is the mean difference over the seeds that both have, in points.

    Args:
        runs: at least one.
        target: a validation accuracy in (0, 1]; adds rounds, MB sent up and simulated seconds until it was
            reached (NaN where a run of the row never did), and how many of the row's runs did.

    Raises:
        ConfigError: if `target` is out of range.
    """
    import pandas as pd

    if target is not None and not 0 < target <= 1:
        raise ConfigError(f"target: got {target:g}; an accuracy is in (0, 1], e.g. 0.8")
    rows = settings(runs)
    full = Counter(row.last_round for row in rows if row.status == "finished").most_common(1)
    table = [_row(row, rows, full[0][0] if full else None, target) for row in rows]
    return pd.DataFrame(table)


def _row(row: Setting, rows: Sequence[Setting], usual_rounds: int | None, target: float | None) -> Cells:
    reference = _fedavg_for(row, rows)
    cells: Cells = {"setting": row.label, "n": len(row.runs)}
    for column, (metric, unit) in MEASURES.items():
        mean, half = mean_and_interval([run.last(metric) / unit for run in row.runs])
        cells |= {column: mean, f"{column} ±": half}
        if column in AGAINST_FEDAVG:
            base = nan
            if reference is not None:
                base, _ = mean_and_interval([run.last(metric) / unit for run in reference.runs])
            cells[AGAINST_FEDAVG[column]] = mean / base if base else nan
    if reference is not None and reference is not row:
        cells[DIFFERENCE], cells[f"{DIFFERENCE} ±"] = mean_and_interval(_differences(row, reference))
    else:
        cells[DIFFERENCE] = cells[f"{DIFFERENCE} ±"] = nan
    if target is not None:
        cells |= _until(row, reference, target)
    cells["rounds"] = nan if row.last_round is None else row.last_round
    notes = list(row.notes)
    if row.status == "finished" and row.last_round != usual_rounds:
        notes.insert(0, f"other rows: {usual_rounds} rounds")
    return cells | {"status": "; ".join([row.progress, *notes])}


def _differences(row: Setting, reference: Setting) -> list[float]:
    """Return test accuracy minus FedAvg's, in points, for each seed that both have."""
    return [100 * points for points in paired(row.runs, reference.runs, "test/accuracy")]


def paired(runs: Sequence[RunData], others: Sequence[RunData], metric: str) -> list[float]:
    """Return the difference of a metric from the other run of the same seed, for each seed that both have."""
    base = {run.seed: run.last(metric) for run in others}
    return [run.last(metric) - base[run.seed] for run in runs if run.seed in base]


def _until(row: Setting, reference: Setting | None, target: float) -> Cells:
    """Return the mean costs of reaching the target, if all runs did."""

    def reached(setting: Setting) -> list[Reached]:
        found = [accuracy_at(run, target) for run in setting.runs]
        return [r for r in found if r is not None]

    there, base = reached(row), reached(reference) if reference is not None else []
    cells: Cells = {f"reached {target:.2f}": len(there)}
    for column, value in UNTIL.items():
        name = f"{column} to {target:.2f}"
        complete = len(there) == len(row.runs)
        mean, half = mean_and_interval([value(r) for r in there]) if complete else (nan, nan)
        cells |= {name: mean, f"{name} ±": half}
        if column == "seconds":
            whole = reference is not None and len(base) == len(reference.runs)
            dense = fmean(map(value, base)) if whole else nan
            cells[f"{name} × FedAvg"] = mean / dense if dense else nan
    return cells


UNTIL: dict[str, Callable[[Reached], float]] = {
    "rounds": lambda reached: float(reached.round),
    "up MB": lambda reached: reached.up_bytes / MEGA,
    "seconds": lambda reached: reached.simulated_s,
}
"""Column of a target → its value."""


def _fedavg_for(row: Setting, rows: Sequence[Setting]) -> Setting | None:
    """Return the finished FedAvg row that differs from `row` in the method alone, if it is one."""

    def outside(flat: Flat) -> Flat:
        return {key: value for key, value in flat.items() if not key.startswith("method.")}

    def options(flat: Flat) -> Flat:
        return {k: v for k, v in flat.items() if k.startswith("method.") and k != "method.name"}

    if row.status != "finished":
        return None
    candidates = [
        other
        for other in rows
        if other.is_fedavg
        and (other.status, other.last_round) == (row.status, row.last_round)
        and outside(other.flat) == outside(row.flat)
    ]
    exact = [o for o in candidates if {options(o.flat).get(key) for key in VALUES} <= {"fp32", None}]
    agreeing = [o for o in candidates if options(o.flat).items() <= options(row.flat).items()]
    chosen = exact if len(exact) == 1 else agreeing or candidates
    return chosen[0] if len(chosen) == 1 else None


VALUES = ("method.uplink_values", "method.downlink_values")
"""Options of the number format; FedAvg with a coarse format is a row to compare, not the reference."""


# ── showing
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def render_table(frame: "pd.DataFrame", width: int = 100) -> "Table":
    """Return a comparison as a table for a terminal of `width` characters.

    A wider one is cut in two, results above costs. Where `n`, `rounds` or `status` is the same in all rows,
    it stands below.
    """
    from rich.console import Console
    from rich.table import Table

    cells_of = shown(frame)
    words = {"n": "n = {}", "rounds": "{} rounds", "status": "{}"}
    same = [name for name in words if len(set(cells_of[name])) == 1]
    caption = " · ".join(words[name].format(cells_of.pop(name)[0]) for name in same)
    table = _table(cells_of, caption)
    if Console(width=10 * width).measure(table).maximum <= width:
        return table
    above = {name: cells for name, cells in cells_of.items() if name in RESULTS}
    below = {name: cells for name, cells in cells_of.items() if name == "setting" or name not in RESULTS}
    both = Table.grid()
    both.add_row(_table(above, ""))
    both.add_row("")
    both.add_row(_table(below, caption))
    return both


UNSEEN = 0.005
"""An interval of a smaller share of a number with three digits is left out."""

TEXT_COLUMNS = ("setting", "status")
RESULTS = ("setting", "n", "val accuracy", "test accuracy", "density", "rounds", "status")


def _table(shown: Mapping[str, Sequence[str]], caption: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, caption=Text(caption)
    )
    for name in shown:
        side: Literal["left", "right"] = "left" if name in TEXT_COLUMNS else "right"
        table.add_column(Text(_in_two_lines(name)), justify=side, overflow="fold")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*(Text(cell) for cell in row))
    return table


def _in_two_lines(header: str) -> str:
    start = next((at for mark in (" (", " to ", " ") if (at := header.find(mark)) > 0), None)
    return header if start is None else f"{header[:start]}\n{header[start + 1 :]}"


def to_markdown(frame: "pd.DataFrame") -> str:
    """Return a comparison as a table in Markdown, with an interval wherever there is one."""
    cells_of = shown(frame, intervals=True)
    rows = [
        list(cells_of),
        ["---" if name in TEXT_COLUMNS else "---:" for name in cells_of],
        *(list(cells) for cells in zip(*cells_of.values(), strict=True)),
    ]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def shown(frame: "pd.DataFrame", *, intervals: bool = False) -> dict[str, list[str]]:
    """Return header → cells as text: interval and ratio stand in the cell of their value."""
    shown: dict[str, list[str]] = {}
    beside = {*AGAINST_FEDAVG.values(), DIFFERENCE}
    for column in map(str, frame.columns):
        if column.endswith((" ±", " × FedAvg")) or column in beside or column.startswith("reached "):
            continue
        values = list(frame[column])
        if column in AGAINST_FEDAVG and frame[column].isna().all():
            continue  # a cost that no run has, as runs from before it was measured
        if column in TEXT_COLUMNS:
            shown[column] = [str(value) for value in values]
        elif column.endswith("accuracy"):
            halves = frame[f"{column} ±"]
            shown[column] = [_accuracy(mean, half) for mean, half in zip(values, halves, strict=True)]
        else:
            name, cells = _cost_cells(frame, column, intervals)
            shown[name] = cells
        if column == "test accuracy" and intervals and frame[DIFFERENCE].notna().any():
            pairs = zip(frame[DIFFERENCE], frame[f"{DIFFERENCE} ±"], strict=True)
            shown[DIFFERENCE] = [_points(mean, half) for mean, half in pairs]
    return shown


def _cost_cells(frame: "pd.DataFrame", column: str, intervals: bool) -> tuple[str, list[str]]:
    """Return header and cells of a column of numbers: `mean ± half (ratio×)`."""
    values, scale, header = frame[column], 1.0, column
    if column.endswith(" TFLOP") and not values.max() >= 1:
        scale, header = 1000.0, column.replace("TFLOP", "GFLOP")
    elif column == "client kJ" and not values.max() >= 1:
        scale, header = 1000.0, "client J"
    cells = [_number(scale * value) for value in values]
    if intervals and f"{column} ±" in frame and column != "density":
        halves = frame[f"{column} ±"]
        cells = [
            f"{cell} ±{_number(scale * half)}" if half > UNSEEN * abs(value) else cell
            for cell, value, half in zip(cells, values, halves, strict=True)
        ]
    ratio = AGAINST_FEDAVG.get(column, f"{column} × FedAvg")
    if ratio in frame:
        header += " (× FedAvg)"
        cells = [f"{cell} ({_ratio(value)})" for cell, value in zip(cells, frame[ratio], strict=True)]
    target = column.partition(" to ")[2]
    if column.startswith("seconds to ") and f"reached {target}" in frame:
        reached = zip(values, frame[f"reached {target}"], frame["n"], cells, strict=True)
        cells = [cell if isfinite(v) else f"— ({there} of {n})" for v, there, n, cell in reached]
    return header, cells


def _points(mean: float, half: float) -> str:
    if not isfinite(mean):
        return "—"
    return f"{mean:+.1f}" if not isfinite(half) else f"{mean:+.1f} ±{half:.1f}"


def _accuracy(mean: float, half: float) -> str:
    if not isfinite(mean):
        return "—"
    return f"{mean:.3f}" if not isfinite(half) else f"{mean:.3f} ±{half:.3f}"


def _ratio(value: float) -> str:
    return f"{value:.2g}×" if isfinite(value) and value < 99.5 else _number(value)


def _number(value: float) -> str:
    """Write a number with three digits, whole from a hundred on; — for none."""
    if not isfinite(value):
        return "—"
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


# ── writing
# ──────────────────────────────────────────────────────────────────────────────────────────────────

LEGEND = """
Accuracies: share of right answers of the final model on the validation and the test examples; ± is half of
the 95 % t-interval over n seeds. Bytes, FLOPs, energy of the clients and seconds are totals from the start,
set-up included. Executed FLOPs are those that the devices run, and they drive the clock; of theoretical ones
masked weights are free. Simulated seconds are those of the run's own devices, with waits and deadlines;
compute-bound and network-bound ones are those of the same work on Raspberry Pi 4 with fibre, and on GPU
workstations with 3G. × FedAvg divides by the FedAvg row whose other settings agree, after as many rounds;
test − FedAvg is the difference in points, paired by seed. A dash: not measured, not reached by every seed
(with how many did), or nothing to compare with.
"""


@dataclass(frozen=True)
class Report:
    """The files of a report.

    Args:
        path: the folder.
        files: the pictures, `table.md`, `table.csv`, and `report.json`: which directories it is about.
    """

    path: Path
    files: tuple[Path, ...]


def write_report(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    target: float | None = None,
    pictures: bool = True,
    formats: Sequence[str] = ("png",),
) -> Report:
    """Write the figures and tables of runs and sweeps.

    Files of an earlier report on the same directories are replaced; others are left alone.

    Args:
        paths: directories of runs and sweeps.
        out: the folder; by default `report` in the one directory given, or beside the first of several the
            first of `report`, `report-2`, … that holds no report on other directories; of a file of results
            `NAME-report` in the working directory.
        target: as for `comparison`; figures of accuracy get a line there.
        pictures: whether to draw figures.
        formats: of the figures: `png`, `svg`, `pdf`.

    Raises:
        ConfigError: if a format is unknown, there is no run, or the folder cannot be written, or holds
            another report.
        RunError: if a file of a run is damaged.
    """
    from fedray.report import canvas, figures

    chosen = canvas.formats_of(formats)
    runs = load_runs(paths)
    frame = comparison(runs, target)
    folder = local_path(out) if out is not None else _default_folder(paths)
    if out is not None and _is_of_others(folder, paths):
        raise ConfigError(f"{folder} holds another report, on {_subject(folder)}; choose another with --out")
    contents: dict[str, bytes] = figures.draw(settings(runs), target, chosen) if pictures else {}
    contents["table.md"] = f"{to_markdown(frame)}{LEGEND}".encode()
    contents["table.csv"] = frame.to_csv(index=False).encode()
    contents[SUBJECT] = as_mapping({"directories": _directories(folder, paths)})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        every = {f"{Path(name).stem}.{format}" for name in figures.NAMES for format in canvas.FORMATS}
        for name in every - set(contents):
            (folder / name).unlink(missing_ok=True)  # of an earlier report, on other runs
        for name, data in contents.items():
            replace(folder / name, data)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written: {error.strerror or error}; choose another with --out"
        ) from None
    return Report(folder, tuple(folder / name for name in contents))


def _default_folder(paths: Sequence[str | Path]) -> Path:
    first = local_path(paths[0])
    if first.is_file():
        return Path(f"{first.stem}-report").absolute()
    if len(paths) == 1 and not _is_of_others(first / "report", paths):
        return first / "report"
    above, number = first if len(paths) == 1 else first.parent, 1
    while _is_of_others(folder := above / (f"report-{number}" if number > 1 else "report"), paths):
        number += 1
    return folder


SUBJECT = "report.json"
"""File in the folder of a report: the directories that it is about, from the folder."""


def _directories(folder: Path, paths: Sequence[str | Path]) -> list[str]:
    return [os.path.relpath(local_path(path).resolve(), folder.resolve()) for path in paths]


def _is_of_others(folder: Path, paths: Sequence[str | Path]) -> bool:
    """Tell whether a folder holds a report on other directories; a report without a note is on its own."""
    if not folder.is_dir():
        return False
    known = read_mapping(folder / SUBJECT)
    if known is None:
        return (folder / "table.md").exists() and not (
            len(paths) == 1 and folder.parent.resolve() == local_path(paths[0]).resolve()
        )
    return known.get("directories") != _directories(folder, paths)


def _subject(folder: Path) -> str:
    """Return what the report in a folder is about."""
    known = read_mapping(folder / SUBJECT) or {}
    return ", ".join(map(str, known.get("directories", []))) or "other directories"
