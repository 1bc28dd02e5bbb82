"""Runs → tables and pictures, from the files of their directories alone.

    directory → RunData → Setting (the seeds of one config) → a row of a table, a line in a picture

Nothing is mixed in silence: runs that stopped early, or made another number of rounds, get a row of their own
that says so; a mean is only taken over runs that all have the number; a comparison with FedAvg needs a FedAvg
whose other settings agree.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite, nan, sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from fedray.errors import ConfigError, RunError
from fedray.experiment import yaml

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

MEGA, TERA = 1e6, 1e12

Status = Literal["finished", "stopped", "unfinished"]
"""At its last round; ended early by a scheduler; going on, or broken."""

# ── reading
# ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class RunData:
    """What the files of a run say.

    Args:
        path: the run's directory.
        name: the directory's name.
        label: what tells it from the runs beside it; its name until `label_runs` has seen them.
        config: the nested config, empty where there is none.
        rounds: a row per round, ascending; `round` and a column per metric, NaN where it was not measured.
        client_accuracy: client, device, num_examples and accuracy of the final model; finished runs only.
        result: the final metrics by name and `status`; finished and stopped runs only.
    """

    path: Path
    name: str
    label: str
    config: dict[str, Any]
    rounds: "pd.DataFrame"
    client_accuracy: "pd.DataFrame | None"
    result: dict[str, Any] | None

    @cached_property
    def clients(self) -> "pd.DataFrame | None":
        """A row per client and round, as far as the last checkpoint; read when first asked for."""
        return _read_parquet(self.path / "clients.parquet")

    @property
    def finished(self) -> bool:
        """Whether all rounds were made and the final model was tested."""
        return self.status == "finished"

    @property
    def status(self) -> Status:
        """What became of the run."""
        if self.result is None:
            return "unfinished"
        return "stopped" if self.result.get("status") == "stopped" else "finished"

    @property
    def last_round(self) -> int | None:
        """Number of rounds made; None before the first is written."""
        return int(self.rounds["round"].iloc[-1]) if len(self.rounds) else None

    @property
    def seed(self) -> object:
        """The run's seed; where there is no config, its own name."""
        return self.config.get("seed", self.name)

    def last(self, metric: str) -> float:
        """Return a metric as it was last measured, or NaN."""
        value = (self.result or {}).get(metric)
        if value is None and metric in self.rounds:
            measured = self.rounds[metric].dropna()
            value = measured.iloc[-1] if len(measured) else None
        return nan if value is None else float(value)


def load_run(path: str | Path) -> RunData:
    """Read a run's directory, be the run finished or not.

    Raises:
        ConfigError: if `config.yaml` cannot be read.
        RunError: if a file is damaged; a torn last line of `rounds.jsonl` is left out.
    """
    folder = Path(path)
    config = yaml.load(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    return RunData(
        path=folder,
        name=folder.resolve().name,
        label=folder.resolve().name,
        config=config,
        rounds=_read_rounds(folder / "rounds.jsonl"),
        client_accuracy=_read_parquet(folder / "client_accuracy.parquet"),
        result=_read_result(folder / "result.json"),
    )


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Return the run directories among `paths` and below them, each once, `x-2` before `x-10`.

    Raises:
        ConfigError: if one of `paths` holds no run, with what was looked at.
    """
    given = [Path(path) for path in paths]
    found = {path: list(_runs_below(path)) for path in given}
    empty = [path for path, runs in found.items() if not runs]
    if empty or not given:
        looked = "; ".join(_what_is_at(path) for path in empty) or "no directory was given"
        raise ConfigError(
            f"no runs found: {looked}. A run's directory holds config.yaml and rounds.jsonl; "
            "give such a directory, a sweep's, or one above them"
        )
    runs = [run for path in given for run in found[path]]
    return list({run.resolve(): run for run in reversed(runs)}.values())[::-1]


def _runs_below(path: Path) -> Iterable[Path]:
    for folder, below, files in os.walk(path):
        if "config.yaml" in files or "rounds.jsonl" in files:
            below.clear()
            yield Path(folder)
        # copies of the files that a tracker keeps are not further runs
        kept = (d for d in below if not d.startswith(".") and d not in ("mlruns", "mlartifacts", "artifacts"))
        below[:] = sorted(kept, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _what_is_at(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist"
    if not path.is_dir():
        return f"{path} is a file"
    inside = sorted(p.name for p in path.iterdir())
    return f"{path} holds {', '.join(inside[:8]) or 'nothing'}{', …' if len(inside) > 8 else ''}"


def _read_rounds(path: Path) -> "pd.DataFrame":
    import pandas as pd

    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            rows.append({"round": record["round"], **record["metrics"]})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise RunError(f"{path}, line {number}: not a round, and not the last line") from None
    frame = pd.DataFrame(rows, columns=None if rows else ["round"]).astype(float)  # null becomes NaN
    return frame.astype({"round": int})


def _read_result(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise RunError(f"{path}: not JSON: {error}") from None
    return result


def _read_parquet(path: Path) -> "pd.DataFrame | None":
    if not path.exists():
        return None
    import pandas as pd

    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise RunError(f"{path}: cannot be read: {error}") from None


# ── telling runs apart
# ──────────────────────────────────────────────────────────────────────────────────────────────────

Flat = dict[str, Any]
"""Dotted key → value."""

NO_MATTER = ("tracking", "imports", "checkpoint_every", "data.root", "clients.actors", "clients.resources")
"""Keys that say where a run is computed, read and kept, not what comes of it."""

CHOICES = {"method.": "method.name", "data.partition.": "data.partition.kind"}
"""Sections in which one key decides which others there are."""

VALUE_ALONE = ("method.name", "model", "data.name", "data.partition.kind")
"""Keys whose values speak for themselves."""

OPEN_SECTIONS = ("clients.devices",)
"""Sections whose keys are data: they are one value."""


@dataclass(frozen=True, eq=False)
class Setting:
    """Runs that differ in nothing but the seed, and are equally far.

    Args:
        label: what tells this setting from the others.
        runs: one per seed, at least one.
        notes: what a reader should know of how they were gathered.
    """

    label: str
    runs: tuple[RunData, ...]
    notes: tuple[str, ...] = ()

    @property
    def last_round(self) -> int | None:
        """Number of rounds made; None before the first is written."""
        return self.runs[0].last_round

    @property
    def status(self) -> Status:
        """What became of the runs."""
        return self.runs[0].status

    @property
    def is_fedavg(self) -> bool:
        """Whether this is the dense reference."""
        return self.flat.get("method.name") == "fedavg"

    @property
    def progress(self) -> str:
        """The status in words, with the round where it matters."""
        if self.last_round is None:
            return "no round yet"
        return "finished" if self.status == "finished" else f"{self.status} at round {self.last_round}"

    @cached_property
    def flat(self) -> Flat:
        """The config, flattened, without the seed and what does not matter."""
        return _without_seed(self.runs[0])


def label_runs(runs: Sequence[RunData]) -> list[RunData]:
    """Return the runs with labels made of the config keys in which they differ.

    `method.name` stands as its value alone, `seed` as s0, any other key by its last part, e.g.
    `staged threshold=0.5 s0`. Equal labels are told apart by the name of the directory.
    """
    labels = _labels([_flatten(run.config) for run in runs], [run.name for run in runs])
    often, homes = Counter(labels), Counter(run.name for run in runs)
    return [
        replace(run, label=label if often[label] == 1 else f"{label} ({_home(run, homes)})")
        for run, label in zip(runs, labels, strict=True)
    ]


def _home(run: RunData, homes: Mapping[str, int]) -> str:
    return run.name if homes[run.name] == 1 else str(run.path)


def settings(runs: Sequence[RunData]) -> list[Setting]:
    """Gather runs that differ in the seed only and are equally far; in order of first appearance.

    Two runs of one seed are the same run twice: only the last counts.
    """
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        same = [_without_seed(run) or str(run.path), run.last_round, run.status]
        key = json.dumps(same, sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    members = list(groups.values())
    labels = _labels([_without_seed(group[0]) for group in members], [group[0].name for group in members])
    return [_setting(label, group) for label, group in zip(labels, members, strict=True)]


def _setting(label: str, group: Sequence[RunData]) -> Setting:
    by_seed = {run.seed: run for run in group}
    often = Counter(run.seed for run in group)
    notes = tuple(f"seed {seed} stands {n} times, one counts" for seed, n in often.items() if n > 1)
    return Setting(label, tuple(by_seed.values()), notes)


def _without_seed(run: RunData) -> Flat:
    return {key: value for key, value in _flatten(run.config).items() if key != "seed"}


def _flatten(tree: Mapping[str, Any], above: str = "") -> Flat:
    flat: Flat = {}
    for key, value in tree.items():
        dotted = f"{above}{key}"
        if dotted in NO_MATTER:
            continue
        if isinstance(value, Mapping) and dotted not in OPEN_SECTIONS:
            flat |= _flatten(value, f"{dotted}.")
        else:
            flat[dotted] = value
    return flat


def _labels(flats: Sequence[Flat], names: Sequence[str]) -> list[str]:
    """Return a label for each config; where nothing differs, the method's name or the given one."""
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    keys = [key for key in keys if _differs(key, flats)]
    keys.sort(key=lambda key: (not key.startswith("method."), key == "seed"))  # stable: else as in the config
    last_parts = Counter(key.rpartition(".")[2] for key in keys)
    labels = []
    for flat, name in zip(flats, names, strict=True):
        parts = [_part(key, flat[key], last_parts) for key in keys if key in flat]
        labels.append(" ".join(parts) or str(flat.get("method.name", name)))
    return labels


def _differs(key: str, flats: Sequence[Flat]) -> bool:
    """Tell whether a key tells runs apart; an option of one method is compared within that method."""
    choice = next((c for above, c in CHOICES.items() if key.startswith(above) and key != c), None)
    if choice is None or all(key in flat for flat in flats):
        return len({repr(flat.get(key)) for flat in flats}) > 1
    values: dict[str, set[str]] = {}
    for flat in flats:
        if key in flat:
            values.setdefault(str(flat.get(choice)), set()).add(repr(flat[key]))
    return any(len(different) > 1 for different in values.values())


def _part(key: str, value: Any, last_parts: Mapping[str, int]) -> str:
    if key == "seed":
        return f"s{value}"
    if key in VALUE_ALONE:
        return str(value)
    last = key.rpartition(".")[2]
    return f"{last if last_parts[last] == 1 else key}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{key}:{_text(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ",".join(map(_text, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


# ── comparing
# ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Reached:
    """What had been spent when a run first reached an accuracy; all from the start of the run.

    Args:
        round: number of the round after which it was measured.
        up_bytes: bytes sent by clients.
        simulated_s: simulated seconds.
    """

    round: int
    up_bytes: float
    simulated_s: float


def accuracy_at(run: RunData, target: float) -> Reached | None:
    """Return what it took until validation accuracy was first measured at `target` (in (0, 1]) or above.

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

    One missing value (NaN) makes both NaN: a mean over what happens to be there would compare unlike things.
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
    "client TFLOP": ("total/flops/clients", TERA),
    "simulated s": ("total/time/simulated_s", 1.0),
}
"""Column of the table → metric, and what it is divided by."""

AGAINST_FEDAVG = {"up MB": "up × FedAvg", "down MB": "down × FedAvg"}


def comparison(runs: Sequence[RunData], target: float | None = None) -> "pd.DataFrame":
    """Return a table with a row per setting: final accuracies, density, and what all rounds cost together.

    Each measure has its mean over seeds and, beside it in `… ±`, half of the 95 % t-interval (NaN for one
    seed). `up × FedAvg` and `down × FedAvg` divide by the FedAvg row whose settings outside `method` agree
    (and, if there are several, whose method options agree too) after as many rounds; NaN where there is none.

    Args:
        runs: at least one.
        target: a validation accuracy in (0, 1]; adds rounds, MB sent up and simulated seconds until it was
            reached, NaN where a run of the row never did.

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


def _row(row: Setting, rows: Sequence[Setting], usual_rounds: int | None, target: float | None) -> Flat:
    reference = _fedavg_for(row, rows)
    cells: Flat = {"setting": row.label, "n": len(row.runs)}
    for column, (metric, unit) in MEASURES.items():
        mean, half = mean_and_interval([run.last(metric) / unit for run in row.runs])
        cells |= {column: mean, f"{column} ±": half}
        if column in AGAINST_FEDAVG:
            base = nan
            if reference is not None:
                base, _ = mean_and_interval([run.last(metric) / unit for run in reference.runs])
            cells[AGAINST_FEDAVG[column]] = mean / base if base else nan
    if target is not None:
        cells |= _until(row, target)
    cells["rounds"] = nan if row.last_round is None else row.last_round
    notes = list(row.notes)
    if row.status == "finished" and row.last_round != usual_rounds:
        notes.insert(0, f"other rows: {usual_rounds} rounds")
    return cells | {"status": "; ".join([row.progress, *notes])}


def _until(row: Setting, target: float) -> Flat:
    reached = [accuracy_at(run, target) for run in row.runs]
    there = [r for r in reached if r is not None]
    complete = len(there) == len(reached)
    return {
        f"rounds to {target:.2f}": fmean(r.round for r in there) if complete else nan,
        f"up MB to {target:.2f}": fmean(r.up_bytes / MEGA for r in there) if complete else nan,
        f"seconds to {target:.2f}": fmean(r.simulated_s for r in there) if complete else nan,
    }


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
    agreeing = [o for o in candidates if options(o.flat).items() <= options(row.flat).items()]
    chosen = agreeing or candidates
    return chosen[0] if len(chosen) == 1 else None


# ── showing
# ──────────────────────────────────────────────────────────────────────────────────────────────────


def render_table(frame: "pd.DataFrame") -> "Table":
    """Return a comparison as a table for the terminal.

    A wide one is cut in two, results above costs. Where `n`, `rounds` or `status` is the same in all rows, it
    stands below.
    """
    from rich.console import Console
    from rich.table import Table

    shown = _shown(frame)
    words = {"n": "n = {}", "rounds": "{} rounds", "status": "{}"}
    same = [name for name in words if len(set(shown[name])) == 1]
    caption = " · ".join(words[name].format(shown.pop(name)[0]) for name in same)
    table = _table(shown, caption)
    if Console(width=10 * TERMINAL).measure(table).maximum <= TERMINAL:
        return table
    above = {name: cells for name, cells in shown.items() if name in RESULTS}
    below = {name: cells for name, cells in shown.items() if name == "setting" or name not in RESULTS}
    both = Table.grid()
    both.add_row(_table(above, ""))
    both.add_row("")
    both.add_row(_table(below, caption))
    return both


TERMINAL = 100
"""Widest table in one piece, in characters."""

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
    """Return a comparison as a table in Markdown."""
    shown = _shown(frame)
    rows = [
        list(shown),
        ["---" if name in TEXT_COLUMNS else "---:" for name in shown],
        *(list(cells) for cells in zip(*shown.values(), strict=True)),
    ]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def _shown(frame: "pd.DataFrame") -> dict[str, list[str]]:
    """Return header → cells as text: interval and ratio stand in the cell of what they belong to."""
    shown: dict[str, list[str]] = {}
    for column in map(str, frame.columns):
        if column.endswith(" ±") or column in AGAINST_FEDAVG.values():
            continue
        values = list(frame[column])
        if column in TEXT_COLUMNS:
            shown[column] = [str(value) for value in values]
        elif column.endswith("accuracy"):
            halves = frame[f"{column} ±"]
            shown[column] = [_accuracy(mean, half) for mean, half in zip(values, halves, strict=True)]
        elif column in AGAINST_FEDAVG:
            ratios = frame[AGAINST_FEDAVG[column]]
            shown[f"{column} (× FedAvg)"] = [
                f"{_number(value)} ({_ratio(ratio)})" for value, ratio in zip(values, ratios, strict=True)
            ]
        elif column == "client TFLOP" and not frame[column].max() >= 1:
            shown["client GFLOP"] = [_number(1000 * value) for value in values]
        else:
            shown[column] = [_number(value) for value in values]
    return shown


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
the 95 % t-interval over n seeds. Bytes, FLOPs (masked weights are free) and simulated seconds are totals from
the start, set-up included; × FedAvg divides by the FedAvg row whose other settings agree, after as many
rounds. `table.csv` has the intervals of all columns. A dash: not measured, not reached by every seed, or
nothing to compare with.
"""


@dataclass(frozen=True)
class Report:
    """What was written.

    Args:
        path: the folder.
        files: the pictures (PNG), `table.md` and `table.csv`.
    """

    path: Path
    files: tuple[Path, ...]


def write_report(
    paths: Sequence[str | Path], out: str | Path | None = None, *, target: float | None = None
) -> Report:
    """Write the pictures and tables of runs and sweeps.

    Files of an earlier report in the same folder are replaced; others are left alone.

    Args:
        paths: directories of runs and sweeps.
        out: the folder; by default `report` in the one directory given, or beside the first of several.
        target: as for `comparison`; pictures of accuracy get a line there.

    Raises:
        ConfigError: if there is no run, or the folder cannot be written.
        RunError: if a file of a run is damaged.
    """
    from fedray.experiment import figures

    runs = [load_run(path) for path in find_runs(paths)]
    frame = comparison(runs, target)
    folder = Path(out) if out is not None else _default_folder(paths)
    contents: dict[str, bytes] = figures.draw(settings(runs), target)
    contents["table.md"] = f"{to_markdown(frame)}{LEGEND}".encode()
    contents["table.csv"] = frame.to_csv(index=False).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in set(figures.NAMES) - set(contents):
            (folder / name).unlink(missing_ok=True)  # of an earlier report, on other runs
        for name, data in contents.items():
            _replace(folder / name, data)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written: {error.strerror or error}; choose another with --out"
        ) from None
    return Report(folder, tuple(folder / name for name in contents))


def _default_folder(paths: Sequence[str | Path]) -> Path:
    first = Path(paths[0])
    return first / "report" if len(paths) == 1 else Path(os.path.abspath(first)).parent / "report"


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.writing")
    partial.write_bytes(data)
    partial.replace(path)
