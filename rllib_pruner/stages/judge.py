"""The command that judges the stage agent from the files of a sweep: at equal bytes, and at equal accuracy.

    fedray agent judge runs/stages_judged-001 [--out FILE.md]

`python -m rllib_pruner.stages.judge` is the same command.

Each row compares a setting of the sweep, seed by seed, with the front of fixed settings: the schedules and
constant densities that no other one beats in mean test accuracy with fewer bytes, joined by lines over
log(bytes). The front is chosen with hindsight, the agent's preference is not. Other methods have rows, but
are no part of the front: a setting above the front need not be above them. Intervals are t-intervals over
seeds, as in a report.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console

from fedray.errors import ConfigError
from fedray.report.cells import load_runs
from fedray.report.series import Setting, settings
from fedray.report.table import mean_and_interval
from rllib_pruner.commands import run_app
from rllib_pruner.tables import Table

Floats = NDArray[np.float64]
CONSTANT = ("fedavg", "snip", "random_mask")
"""Methods whose mask stays as `setup` makes it."""
MEGA = 1e6

out = Console(soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Judged:
    """A setting: bytes both ways and test accuracy of each seed, in order of seeds.

    Args:
        label: of the setting in reports.
        kind: `agent`, `schedule`, `constant` (a density that never changes), or `other`.
        bytes: (seeds,), totals of a run, set-up included.
        accuracy: (seeds,), of the final model on the test set.
        validation: (seeds,), on the validation set; a user may choose by it.
    """

    label: str
    kind: str
    bytes: Floats
    accuracy: Floats
    validation: Floats


def read(path: Path) -> list[Judged]:
    """Read the finished settings of a sweep.

    Raises:
        ConfigError: if there are none, or if settings have different seeds.
    """
    found = settings(load_runs([path]))
    finished = [setting for setting in found if setting.status == "finished"]
    if not finished:
        raise ConfigError(f"{path}: no finished run")
    seeds = {tuple(sorted(str(run.seed) for run in setting.runs)) for setting in finished}
    if len(seeds) > 1:
        raise ConfigError(f"{path}: settings have different seeds: {sorted(seeds)}; `fedray resume` it first")
    return [_judged(setting) for setting in finished]


def _judged(setting: Setting) -> Judged:
    runs = sorted(setting.runs, key=lambda run: str(run.seed))
    name, policy = setting.flat.get("method.name"), setting.flat.get("method.policy", "schedule")
    kind = "other"
    if name == "staged":
        kind = {"schedule": "schedule", "agent": "agent"}.get(str(policy), "other")
    elif name in CONSTANT:
        kind = "constant"
    sent = [run.last("total/bytes/up") + run.last("total/bytes/down") for run in runs]
    accuracy = [run.last("test/accuracy") for run in runs]
    validation = [run.last("val/accuracy") for run in runs]
    return Judged(setting.label, kind, np.array(sent), np.array(accuracy), np.array(validation))


def tuned(constants: Sequence[Judged]) -> Judged | None:
    """Return the constant density that is best on validation data, seed by seed.

    Its bytes are those of all trials. A validation accuracy of NaN is the lowest; None if a seed
    has no other.
    """
    validation = np.array([one.validation for one in constants])
    known = np.where(np.isnan(validation), -np.inf, validation)
    if np.isneginf(known.max(axis=0)).any():
        return None
    best = known.argmax(axis=0)
    accuracy, chosen = (
        np.array([getattr(constants[k], name)[seed] for seed, k in enumerate(best)])
        for name in ("accuracy", "validation")
    )
    sent = np.sum([one.bytes for one in constants], axis=0)
    return Judged(f"best of {len(constants)} constants, all paid", "tuned", sent, accuracy, chosen)


def front(fixed: Sequence[Judged]) -> list[Judged]:
    """Return the settings that no other one beats in mean accuracy with fewer bytes, in order of bytes.

    A setting with an accuracy of NaN is left out.
    """
    kept: list[Judged] = []
    for one in sorted(fixed, key=lambda judged: float(judged.bytes.mean())):
        if np.isfinite(one.accuracy).all() and (not kept or one.accuracy.mean() > kept[-1].accuracy.mean()):
            kept.append(one)
    return kept


def at_bytes(best: Sequence[Judged], sent: float) -> Floats:
    """Return the front's accuracy (seeds,) at a number of bytes.

    Beyond the front's largest number it is the last setting's; below the smallest it is NaN.
    """
    log_bytes = np.log([float(one.bytes.mean()) for one in best])
    curves = np.array([one.accuracy for one in best])
    if sent < float(best[0].bytes.mean()):
        return np.full(curves.shape[1], np.nan)
    return np.array([np.interp(np.log(sent), log_bytes, curves[:, k]) for k in range(curves.shape[1])])


def at_accuracy(best: Sequence[Judged], accuracy: float) -> float:
    """Return the bytes at which the front reaches a mean accuracy.

    NaN above its best point and below its worst one.
    """
    means = [float(one.accuracy.mean()) for one in best]
    if not means[0] <= accuracy <= means[-1]:
        return float("nan")
    return float(np.exp(np.interp(accuracy, means, np.log([float(one.bytes.mean()) for one in best]))))


def tables(judged: Sequence[Judged]) -> list[Table]:
    """Return the table of all settings beside the front of the fixed ones."""
    fixed = [one for one in judged if one.kind in ("schedule", "constant")]
    if not fixed:
        raise ConfigError("no schedule and no constant density among the runs to compare with")
    best = front(fixed)
    if not best:
        raise ConfigError("no schedule and no constant density has a test accuracy for every seed")
    sparse = [one for one in judged if one.kind == "constant" and "fedavg" not in one.label]
    chosen = tuned(sparse) if len(sparse) > 1 else None
    shown = [*judged, chosen] if chosen is not None else judged
    rows = []
    for one in sorted(shown, key=lambda judged: (judged.kind, float(judged.bytes.mean()))):
        rows.append(_row(one, best))
    note = (
        f"Means over {len(judged[0].bytes)} seeds ± half of the 95 % t-interval; points are paired by seed. "
        f"The front: {', '.join(one.label for one in best)}; other methods are no part of it. A dash: the "
        "front has no point at this accuracy, or at this number of bytes."
    )
    columns = (
        "setting",
        "kind",
        "test accuracy",
        "MB both ways",
        "points at equal bytes",
        "bytes at equal accuracy",
    )
    return [Table("Against the front of fixed schedules and constant densities", columns, rows, note)]


def _row(one: Judged, best: Sequence[Judged]) -> list[str]:
    sent = float(one.bytes.mean())
    difference = 100 * (one.accuracy - at_bytes(best, sent))
    ratio = sent / at_accuracy(best, float(one.accuracy.mean()))
    points, bytes_ = _interval(difference, "+.1f"), "—" if np.isnan(ratio) else f"{ratio:.2f}×"
    if one in best:
        points = bytes_ = "on it"
    return [one.label, one.kind, _interval(one.accuracy, ".3f"), f"{sent / MEGA:.3g}", points, bytes_]


def _interval(values: Floats, form: str) -> str:
    """Write the mean and half of its 95 % t-interval; a dash if a seed has no value."""
    mean, half = mean_and_interval(values.tolist())
    if np.isnan(mean):
        return "—"
    return f"{mean:{form}}" if np.isnan(half) else f"{mean:{form}} ±{half:{form.lstrip('+')}}"


@app.command()
def judge(
    sweep: Annotated[
        Path, typer.Argument(help="The directory of a sweep of tune_configs/stages_judged.yaml.")
    ],
    out_file: Annotated[Path | None, typer.Option("--out", help="Markdown file for the tables.")] = None,
) -> None:
    """Judge the stage agent from the files of a sweep."""
    found = tables(read(sweep))
    for table in found:
        out.print(table.for_terminal())
    if out_file is not None:
        out_file.write_text("\n".join(table.markdown() for table in found), encoding="utf-8")


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
