"""`fedray runs | compare | stop`: runs at hand."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedray.cli.console import columns_of, err, escape, number, out, say, say_json, short
from fedray.cli.entry import Json, app, readable

COLUMNS = (
    "name",
    "status",
    "method",
    "model",
    "data",
    "seed",
    "accuracy",
    "density",
    "up",
    "bytes",
    "round",
    "when",
)
"""Columns of a list, in their order."""

LEAVING = ("up", "model", "when", "data", "density", "seed", "bytes")
"""Columns that a narrow terminal does without, the first one first."""

LEFT = ("name", "status", "method", "model", "data", "when")
HEADERS = {"up": "up MB", "bytes": "MB"}


@app.command()
def runs(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(parser=readable, metavar="[DIRECTORIES]...", help="Or addresses; default: runs/."),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="A condition, e.g. method=staged or 'val/accuracy>0.8'; all of several."),
    ] = None,
    status: Annotated[
        list[str] | None, typer.Option(help="running, finished, stopped, failed, interrupted or damaged.")
    ] = None,
    sort: Annotated[str | None, typer.Option(help="A column, key of the config or metric.")] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="The greatest value first.")] = False,
    columns: Annotated[
        str | None, typer.Option(help="Columns to show, e.g. name,method.lr,val/accuracy,bytes.")
    ] = None,
    json: Json = False,
) -> None:
    """List runs and the trials of sweeps: status, accuracy, cost."""
    from fedray.overview.listing import check_keys, select
    from fedray.overview.summary import summaries

    found = summaries(directories or [Path("runs")])
    wanted = [name.strip() for name in columns.split(",")] if columns else None
    check_keys(found, wanted or [], "--columns")
    shown = select(found, where or [], status or [], sort, reverse)
    if json:
        return say_json([run.to_json() for run in shown])
    for line in _fitting(shown, wanted):
        say(line)
    for run in shown:
        if run.problem is not None:
            err.print(f"[red]{escape(run.name)} is {run.status}:[/red] {escape(run.problem)}", soft_wrap=True)
    if len(shown) < len(found):
        out.print(f"{len(shown)} of {len(found)} runs", highlight=False)


def _fitting(runs: list[Any], wanted: list[str] | None) -> list[str]:
    """Return the lines of a list with as many columns as the terminal has room for."""
    cells = {HEADERS.get(name, name): [cell(run, name) for run in runs] for name in wanted or COLUMNS}
    return columns_of(cells, LEFT, [HEADERS.get(name, name) for name in LEAVING] if wanted is None else ())


def cell(run: Any, name: str) -> str:
    """Return a value of a run as a table shows it."""
    if name == "round":
        return f"{'—' if run.round is None else run.round}/{'?' if run.rounds is None else run.rounds}"
    value = run.value(name)
    if value is None:
        return "—"
    if name in ("up", "bytes", "down"):
        return number(value / 1e6)
    if name.endswith("accuracy"):
        return f"{value:.3f}"
    return number(value) if isinstance(value, float) else str(value)


@app.command()
def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(
            parser=readable,
            metavar="DIRECTORIES...",
            help="Runs and sweeps, or addresses; the first is the base.",
        ),
    ],
    json: Json = False,
) -> None:
    """Show what differs between runs: config, costs, results; paired by seed where there are seeds."""
    from fedray.overview.comparing import config_differences, sides_of, to_json
    from fedray.overview.summary import plain

    sides = sides_of(directories)
    if json:
        return say_json(plain(to_json(sides)))
    letters = [chr(ord("A") + number) if number < 26 else f"#{number + 1}" for number in range(len(sides))]
    for letter, side in zip(letters, sides, strict=True):
        seeds = ", ".join(map(str, side.seeds))
        say(f"{letter} = {side.name}   {side.setting.progress}, seed{'s' * (len(side.seeds) > 1)} {seeds}")
        if side.problem is not None:
            say(f"    not compared with A: {side.problem}")
    differing = config_differences(sides)
    cells = {"config": list(differing)}
    cells |= {k: [_value(values[i]) for values in differing.values()] for i, k in enumerate(letters)}
    say("")
    for line in columns_of(cells, ("config",)) if differing else ["config: the same"]:
        say(line)
    say("")
    for line in columns_of(_results(sides, letters), ("result",)):
        say(line)
    if any(len(side.seeds) > 1 for side in sides):
        say("± is half of the 95 % t-interval; differences are paired by seed")


def _results(sides: list[Any], letters: list[str]) -> dict[str, list[str]]:
    """Return the columns of a comparison's results."""
    from fedray.report.table import MEASURES

    cells = {"result": list(MEASURES)}
    for letter, side in zip(letters, sides, strict=True):
        cells[letter] = [_interval(*side.value(measure)) for measure in MEASURES]
    for letter, side in list(zip(letters, sides, strict=True))[1:]:
        if side.problem is None:
            found = [side.difference(sides[0], measure)[:2] for measure in MEASURES]
            cells[f"{letter} − A"] = [_interval(mean, half, signed=True) for mean, half in found]
    return cells


def _interval(mean: float, half: float, signed: bool = False) -> str:
    if mean != mean:
        return "—"
    sign = "+" if signed and mean > 0 else ""
    return f"{sign}{number(mean)}" + ("" if half != half else f" ±{number(half)}")


def _value(value: Any) -> str:
    return "—" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@app.command()
def stop(
    directory: Annotated[str, typer.Argument(help="Directory of a running run, sweep, trial or training.")],
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the end; 0: do not wait.")] = 600.0,
    now: Annotated[bool, typer.Option("--now", help="Drop the round in progress.")] = False,
) -> None:
    """End a running run, sweep, trial or training in good order; `resume` continues it."""
    from fedray.durable import local_path
    from fedray.overview.stopping import stop as end

    place = local_path(readable(directory))
    asked = end(place, now=now)
    path = short(place)
    err.print(f"{path}: {asked.holder.described} is asked to end", highlight=False, soft_wrap=True)
    if not asked.ended(wait):
        waited = f" after {wait:g} s" if wait else ""
        hint = "" if asked.what == "trial" else f"; `fedray stop --now {path}` drops it"
        when = "its next evaluation" if asked.what == "training" else "its round in progress"
        text = f"{path} has not ended yet{waited}: it ends after {when}{hint}"
        err.print(text, highlight=False, soft_wrap=True)
        raise typer.Exit(0 if wait == 0 else 1)
    _say_end(place, asked.what)


def _say_end(place: Path, what: str) -> None:
    """Say how a run, sweep or trial ended, and how to resume it."""
    from fedray.overview.summary import summary

    path = short(place)
    if what == "training":
        hint = path if (place / "config.yaml").is_file() else f"{path}/trials/NAME"
        ended = f"{path} has ended. To resume: fedray agent train --resume {hint}"
        return out.print(ended, soft_wrap=True, highlight=False)
    if what == "sweep":
        return out.print(
            f"{path} has ended. To resume: fedray resume {path}", soft_wrap=True, highlight=False
        )
    run = summary(place)
    done = f"{path} is {run.status} after round {run.round} of {run.rounds}"
    if run.status == "finished":
        return out.print(f"{done}: it had ended before it was asked", soft_wrap=True, highlight=False)
    note = "; its sweep continues" if what == "trial" else ""
    out.print(f"{done}{note}. To resume: fedray resume {path}", soft_wrap=True, highlight=False)
