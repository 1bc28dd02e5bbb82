"""`fedray report | ui`: figures and tables, and MLflow's pages."""

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from fedray.cli.console import out, say_json, say_path, short
from fedray.cli.entry import Directories, Json, app, readable
from fedray.cli.outcome import say_address, tracked
from fedray.errors import ConfigError
from fedray.experiment.interrupt import signals

SERVER_ENDS_S = 5.0
"""Seconds that MLflow's server has to end."""


@app.command()
def report(
    directories: Directories,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for figures and tables.")] = None,
    target: Annotated[
        float | None, typer.Option(help="Also report when each run reached this validation accuracy.")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="png (default), svg or pdf; may be repeated.")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Draw figures, or write tables only.")] = True,
    json: Json = False,
) -> None:
    """Draw figures and tables from the files of runs."""
    from fedray.overview.summary import plain
    from fedray.publishing.fetching import is_readable_copy
    from fedray.report.cells import load_runs
    from fedray.report.series import label_runs
    from fedray.report.table import comparison, render_table, write_report

    if out_dir is None and is_readable_copy(directories[0]):
        out_dir = Path(f"{directories[0].name}-report")
    runs = label_runs(load_runs(directories))
    frame = comparison(runs, target=target)
    written = write_report(
        directories, out_dir, target=target, pictures=pictures, formats=formats or ("png",)
    )
    if json:
        rows, files = frame.to_dict("records"), [str(path) for path in written.files]
        return say_json(plain({"path": str(written.path), "files": files, "settings": rows}))
    say_path(written.path)
    out.print(render_table(frame, out.width))
    for path in written.files:
        out.print(f"  {short(path)}")
    if any(tracked(path, "") for path in directories if path.is_dir()):
        out.print(f"Compare them in MLflow: fedray ui {' '.join(map(short, directories))}", soft_wrap=True)
        say_address(directories)


@app.command()
def ui(
    directories: Annotated[
        list[Path] | None,
        typer.Argument(
            parser=readable,
            metavar="[DIRECTORIES]...",
            help="Runs and sweeps to compare, or addresses; their store is opened.",
        ),
    ] = None,
    uri: Annotated[str | None, typer.Option(help="MLflow store; default: the one that runs use.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open MLflow's UI on this machine's loopback."""
    from fedray.config.run_config import TrackingConfig
    from fedray.tracking.ui import ui_command

    address = f"http://127.0.0.1:{port}"
    compared, own = _compared(directories or [], address)
    command = ui_command(uri or own or TrackingConfig().uri, port)
    page = f"{address}/#/experiments/1/runs"
    out.print(f"MLflow's UI: {compared or page} (Ctrl-C ends it)", soft_wrap=True, highlight=False)
    charts = _charts(directories or [], address, own)
    if charts is not None:
        text = f"Accuracy against bytes, seconds and FLOPs: {charts}"
        out.print(text, soft_wrap=True, highlight=False)
    if compared is None:
        out.print("Other experiments: choose Model training on its start page. Tick runs, then Compare.")
    raise typer.Exit(_until_ended(command))


def _until_ended(command: list[str]) -> int:
    """Run a server until it ends or a signal ends it; return its status, 0 after Ctrl-C."""
    process, status = subprocess.Popen(command, process_group=0), 0  # with the processes that it starts
    try:
        with signals() as stop, stop.ends():
            status = process.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(SERVER_ENDS_S)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status


def _compared(directories: list[Path], address: str) -> tuple[str | None, str | None]:
    """Return where the UI opens on the comparison of runs, and their store; None for no directory.

    Raises:
        ConfigError: if MLflow tracks none of them, or more than one store does.
    """
    if not directories:
        return None, None
    from fedray.report.address import comparison_address
    from fedray.report.reading import find_runs, store_of

    stores = {store for path in find_runs(directories) if (store := store_of(path)) is not None}
    given = ", ".join(map(short, directories))
    if len(stores) > 1:
        raise ConfigError(f"{given}: their runs are in {len(stores)} stores, and a UI shows one; give fewer")
    compared = comparison_address(address, directories)
    if compared is None:
        raise ConfigError(f"{given}: MLflow tracks none of these runs; `fedray sync` brings them to it")
    return compared, stores.pop()


def _charts(directories: list[Path], address: str, store: str | None) -> str | None:
    """Return where the UI opens on charts of accuracy against costs; None for one run, and without a view."""
    if store is None:
        return None
    from fedray.config.uri import database_of
    from fedray.report.address import charts_address, tracked_runs
    from fedray.tracking.view import keep_view

    runs, experiments = tracked_runs(directories)
    if len(runs) < 2 or len(experiments) != 1:
        return None
    view = keep_view(database_of(store), experiments[0], runs)
    return None if view is None else charts_address(address, experiments[0], view)
