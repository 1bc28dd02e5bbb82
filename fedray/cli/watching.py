"""`fedray watch`: a running run or sweep, live, from another terminal."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fedray.cli.console import columns_of, number, out, say, say_json, short
from fedray.cli.entry import app, readable
from fedray.errors import ConfigError
from fedray.experiment.interrupt import signals


@app.command()
def watch(
    directory: Annotated[
        str | None,
        typer.Argument(help="Or its address; default: the newest below runs/ that runs."),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one table, or with --json one object.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    json: Annotated[
        bool, typer.Option("--json", help="Write JSON: a line whenever something has changed, until the end.")
    ] = False,
) -> None:
    """Watch a running run or sweep from another terminal: trials, rounds, accuracy, bytes, speed."""
    from fedray.durable import local_path
    from fedray.overview.watching import look, newest_running

    path = newest_running(local_path("runs")) if directory is None else local_path(readable(directory))
    again = partial(_look_again, path, directory)
    view = look(path)
    if json and once:
        return say_json(view.to_json())
    if once:
        return _print(view)
    if not view.is_running:
        raise ConfigError(
            f"{short(path)} does not run: `fedray watch --once {short(path)}` shows how it ended"
        )
    with signals() as stop, stop.ends():  # what it watches runs on
        live = out.is_terminal and not json
        view = _live(view, again, every) if live else _lines(view, again, every, json)
        if out.is_terminal and not json:
            _print(view)


def _look_again(path: Path, directory: str | None) -> Any:
    """Return the state of a run or sweep now; at an address, as it was published last."""
    from fedray.overview.watching import look

    if directory is not None:
        readable(directory)
    return look(path)


def _live(view: Any, again: Callable[[], Any], every: float) -> Any:
    """Show a table until the end; return the last state."""
    from rich.live import Live
    from rich.text import Text

    def text() -> Text:
        return Text("\n".join([*_table(view)[: max(3, out.size.height - 3)], view.line()]))

    with Live(text(), console=out, transient=True, auto_refresh=False) as live:
        while view.is_running:
            time.sleep(every)
            view = again()
            live.update(text(), refresh=True)
    return view


def _lines(view: Any, again: Callable[[], Any], every: float, json: bool) -> Any:
    """Print a line, of JSON or of words, whenever something has changed; return the last state."""
    from json import dumps

    said = ""
    while True:
        counts = f"{view.done} {[run.status for run in view.runs]}"
        if counts != said or (json and not view.is_running):
            print_line(dumps(view.to_json(), allow_nan=False) if json else view.line())
        said = counts
        if not view.is_running:
            if not json:
                print_line(f"{short(view.path)} has ended")
            return view
        time.sleep(every)
        view = again()


def print_line(line: str) -> None:
    """Write a line at once, also into a pipe."""
    say(line)
    out.file.flush()


def _print(view: Any) -> None:
    for line in _table(view):
        say(line)
    say(view.line() if view.is_running else f"{view.line()} · does not run")


def _table(view: Any) -> list[str]:
    """Return the lines of a table of trials; those that run stand above."""
    from fedray.overview.watching import actors, speed

    order = ("running", "failed", "damaged", "interrupted", "stopped", "finished")
    runs = sorted(view.runs, key=lambda run: order.index(run.status))

    def column(key: str, scale: float = 1.0, form: str = "") -> list[str]:
        values = [run.value(key) for run in runs]
        return ["—" if v is None else format(v, form) if form else number(v / scale) for v in values]

    cells = {
        "trial" if view.planned > 1 or len(runs) > 1 else "run": [run.path.name for run in runs],
        "status": [run.status for run in runs],
        "round": [f"{'—' if run.round is None else run.round}/{run.rounds or '?'}" for run in runs],
        "accuracy": column("accuracy", form=".3f"),
        "density": column("density/global"),
        "MB": column("bytes", 1e6),
        "actors": [actors(run) for run in runs],
        "dropped": column("total/clients/dropped"),
        "rounds/s": [number(speed(run)) if speed(run) else "—" for run in runs],
    }
    lines = columns_of(cells, ("trial", "run", "status"), ("actors", "density", "dropped", "rounds/s"))
    return [*lines, *(f"{run.path.name} {run.status}: {run.problem}" for run in runs if run.problem)]
