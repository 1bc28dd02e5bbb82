"""`fedray runs | compare | watch | stop`: runs at hand."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.cells import cell_len

from fedray.cli.console import err, escape, out, say_json, short
from fedray.cli.entry import Json, app

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
    directories: Annotated[list[Path] | None, typer.Argument(help="Default: runs/.")] = None,
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
        out.out(line, highlight=False)
    for run in shown:
        if run.problem is not None:
            err.print(f"[red]{escape(run.name)} is {run.status}:[/red] {escape(run.problem)}", soft_wrap=True)
    if len(shown) < len(found):
        out.print(f"{len(shown)} of {len(found)} runs", highlight=False)


def _fitting(runs: list[Any], wanted: list[str] | None) -> list[str]:
    """Return the lines of a list with as many columns as the terminal has room for."""
    columns = list(wanted or COLUMNS)
    cells = {name: [HEADERS.get(name, name), *(cell(run, name) for run in runs)] for name in columns}
    widths = {name: max(map(cell_len, column)) for name, column in cells.items()}
    for leaving in LEAVING if wanted is None else ():
        if sum(widths[name] + 2 for name in columns) - 2 > out.width:
            columns.remove(leaving)
    room = out.width - sum(widths[name] + 2 for name in columns[1:])
    widths[columns[0]] = min(widths[columns[0]], max(room, 8))
    lines = [
        "  ".join(_placed(cells[name][row], name, widths[name]) for name in columns)
        for row in range(len(runs) + 1)
    ]
    rule = "─" * min(max(map(cell_len, lines)), out.width)
    return [lines[0], rule, *(line.rstrip() for line in lines[1:])]


def _placed(text: str, name: str, width: int) -> str:
    """Return a cell as wide as its column: its beginning and its end where it is wider."""
    if cell_len(text) > width:
        text = f"{text[: width // 2]}…{text[len(text) - (width - width // 2 - 1) :]}"
    gap = " " * (width - cell_len(text))
    return f"{text}{gap}" if name in LEFT else f"{gap}{text}"


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


def number(value: float) -> str:
    """Write a number with three digits, whole from a hundred on."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


@app.command()
def stop(
    directory: Annotated[Path, typer.Argument(help="Directory of a running run, sweep or trial.")],
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the end; 0: do not wait.")] = 600.0,
    now: Annotated[bool, typer.Option("--now", help="Drop the round in progress.")] = False,
) -> None:
    """End a running run, sweep or trial in good order; `resume` continues it."""
    from fedray.durable import local_path
    from fedray.overview.stopping import stop as end

    place = local_path(directory)
    asked = end(place, now=now)
    path = short(place)
    err.print(f"{path}: {asked.holder.described} is asked to end", highlight=False, soft_wrap=True)
    if not asked.ended(wait):
        waited = f" after {wait:g} s" if wait else ""
        hint = "" if asked.what == "trial" else f"; `fedray stop --now {path}` drops it"
        text = f"{path} has not ended yet{waited}: it ends after its round in progress{hint}"
        err.print(text, highlight=False, soft_wrap=True)
        raise typer.Exit(0 if wait == 0 else 1)
    _say_end(place, asked.what)


def _say_end(place: Path, what: str) -> None:
    """Say how a run, sweep or trial ended, and how to resume it."""
    from fedray.overview.summary import summary

    path = short(place)
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
