"""Whether a published result comes out again: a cell of a file of results, against a run of its config.

    Cell → RunConfig → run → its files → Verdict

On the same kind of processor, with the same torch and NumPy, the weights must have the same bits. Elsewhere
sums are rounded otherwise, and training amplifies it: there the figures must lie within a tolerance.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite, nan
from pathlib import Path
from typing import Any, Literal

from fedray.config.overrides import override_tree
from fedray.config.run_config import RunConfig
from fedray.config.trees import INDECISIVE
from fedray.durable import shown
from fedray.errors import ConfigError, RunError, nearest
from fedray.experiment.given import changes_of
from fedray.experiment.makers import makers
from fedray.experiment.run import OnRound, run
from fedray.report.cells import Cell, data_digests
from fedray.report.reading import find_runs
from fedray.storage.run_files import RunFiles
from fedray.tracking.provenance import BITS

Outcome = Literal["same bits", "within tolerance", "differs", "not found"]

ACCURACY = 0.02
"""On another kind of processor, the test accuracy may differ by at most this."""
COSTS = 0.05
"""On another kind of processor, each total may differ by at most this share."""
TOTALS = ("total/bytes/up", "total/bytes/down", "total/flops/clients", "total/time/simulated_s")


@dataclass(frozen=True)
class Verdict:
    """What became of a cell.

    Args:
        cell: its name.
        outcome: `same bits`, `within tolerance`, `differs`, or `not found` among the runs given.
        reasons: what differs, each in a few words.
        run: directory of the run; None where there is none.
    """

    cell: str
    outcome: Outcome
    reasons: tuple[str, ...] = ()
    run: Path | None = None

    @property
    def good(self) -> bool:
        """Whether the cell came out again."""
        return self.outcome in ("same bits", "within tolerance")


def chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Return the cells whose names match one of the patterns (`fedavg*`), all without a pattern.

    Raises:
        ConfigError: if a pattern matches none.
    """
    names = [cell.name for cell in cells]
    for pattern in patterns:
        if not any(_fits(name, pattern) for name in names):
            more = ", …" if len(names) > 6 else ""
            text = f"--cell {pattern!r}: no cell of the file has this name{nearest(pattern, names)}"
            raise ConfigError(f"{text} Cells: {', '.join(names[:6])}{more}")
    return [cell for cell in cells if not patterns or any(_fits(cell.name, text) for text in patterns)]


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def config_of(cell: Cell, changes: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """Return the config of a cell's run, untracked.

    Args:
        cell: of a file of results.
        changes: keys on which no result depends, as `data.root`.

    Raises:
        ConfigError: if another key is changed, or the config cannot run.
    """
    given = changes_of(changes)
    for key in given:
        if not any(key == free or key.startswith(f"{free}.") for free in INDECISIVE):
            raise ConfigError(
                f"{key}: a cell is verified as it was published; verify can change {', '.join(INDECISIVE)}"
            )
    tree = override_tree({}, {"tracking.uri": "none", **cell.config, **given})
    return RunConfig.from_tree(tree, f"cell {cell.name}")


def verify(
    cell: Cell,
    changes: Sequence[str] | Mapping[str, Any] = (),
    *,
    out: str | Path | None = None,
    on_round: OnRound | None = None,
) -> Verdict:
    """Make the run of a cell again.

    Args:
        cell: of a file of results.
        changes: as for `config_of`.
        out: the run's directory; None: the next free one under `runs/`.
        on_round: called after each round.

    Raises:
        ConfigError, DataError: if the config cannot run.
        RunError: if the run failed.
    """
    history = run(config_of(cell, changes), out=out, on_round=on_round)
    return judged(cell, history.path)


def against(cells: Iterable[Cell], paths: Sequence[str | Path]) -> list[Verdict]:
    """Judge cells by finished runs that are there, found by the digest of the config.

    Raises:
        ConfigError: if there is no run.
        RunError: if a file of a run is damaged.
    """
    there: dict[str, Path] = {}
    for path in find_runs(paths):
        result = RunFiles(path).result() or {}
        if result.get("status") == "finished":
            there[str(result.get("config_digest"))] = path
    return [
        judged(cell, there[cell.digest]) if cell.digest in there else Verdict(cell.name, "not found")
        for cell in cells
    ]


def judged(cell: Cell, path: Path) -> Verdict:
    """Judge a cell by a finished run of its config.

    Raises:
        RunError: if a file of the run is damaged, or it is not finished.
    """
    files = RunFiles(path)
    result, mine = files.result(), makers(files)
    if result is None or result.get("status") != "finished":
        raise RunError(f"{shown(path)}: is not finished; `fedray resume {shown(path)}` continues it")
    if result["weights_sha256"] == cell.weights_sha256:
        return Verdict(cell.name, "same bits", run=path)
    data = data_digests(path)
    if cell.data and data and cell.data != data:
        text = f"other data ({_data(data)} instead of {_data(cell.data)}): see data.root"
        return Verdict(cell.name, "differs", (text,), path)
    differences = tuple(_differences(cell.metrics, result))
    if differences:
        return Verdict(cell.name, "differs", differences, path)
    kinds = _kinds(cell.made_by) | _kinds(mine)
    if len(kinds) > 1:
        return Verdict(cell.name, "within tolerance", tuple(_others(cell.made_by, mine)), path)
    text = "other bits on the same kind of processor, with the same torch and NumPy"
    return Verdict(cell.name, "differs", (text, *_commits(cell.made_by, mine)), path)


def _data(digests: Mapping[str, str]) -> str:
    return " ".join(f"{part} {digest}" for part, digest in digests.items())


def _kinds(processes: Iterable[Mapping[str, Any]]) -> set[tuple[Any, ...]]:
    return {tuple(entry.get(key) for key in BITS) for entry in processes}


def _others(theirs: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """Yield in what the machines differ."""
    for key in BITS:
        before, now = ({str(entry.get(key)) for entry in side} for side in (theirs, mine))
        if before != now or len(now) > 1:
            yield f"{key}: {' and '.join(sorted(before))}, here {' and '.join(sorted(now))}"


def _commits(theirs: Sequence[Mapping[str, Any]], mine: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    before, now = ({str(entry.get("commit", "unknown"))[:12] for entry in side} for side in (theirs, mine))
    if before != now:
        yield f"commit {' and '.join(sorted(before))}, here {' and '.join(sorted(now))}: see CHANGELOG.md"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterable[str]:
    """Yield each figure that lies outside the tolerance."""
    if before.get("rounds") != now.get("rounds"):
        yield f"{now.get('rounds')} rounds instead of {before.get('rounds')}"
    was, found = _number(before, "test/accuracy"), _number(now, "test/accuracy")
    if not abs(found - was) <= ACCURACY:
        yield f"test/accuracy {found:.4f} instead of {was:.4f} (tolerance {ACCURACY:g})"
    for name in TOTALS:
        was, found = _number(before, name), _number(now, name)
        if not abs(found - was) <= COSTS * abs(was):
            yield f"{name} {found:,.7g} instead of {was:,.7g} (tolerance {100 * COSTS:g} %)"


def _number(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    return float(value) if isinstance(value, int | float) and isfinite(value) else nan
