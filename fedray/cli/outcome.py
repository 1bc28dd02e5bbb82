"""The last lines of a run or a sweep: a table, the files, how to see and to resume it."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from fedray.cli.console import err, escape, out, say_json, say_path, short

SHOWN = 8
"""Trials whose early ends are printed, at most."""


def say_run(history: Any, json: bool = False) -> None:
    """Say how a run ended; as JSON: `path` and every final metric by name."""
    from fedray.overview.summary import plain

    path = history.path
    if json:
        say_json({"path": str(path), **plain(history.result)})
        return
    say_path(path)
    from fedray.report.reading import load_run
    from fedray.report.series import label_runs
    from fedray.report.table import comparison, render_table

    loaded = load_run(path)
    out.print(render_table(comparison(label_runs([loaded])), out.width))
    _say_warnings(path)
    out.print(f"Files: {short(path)}   Pictures: fedray report {short(path)}{tracked(path, 'MLflow')}")
    _say_place(path)


def _say_place(path: Path) -> None:
    """Print the address where a directory is published, if it is."""
    from fedray.publishing.publisher import Known

    known = Known.read(path)
    if known is not None:
        out.print(f"Published: {escape(known.place)}", soft_wrap=True, highlight=False)


def say_sweep(result: Any, json: bool = False) -> None:
    """Say how a sweep ended, and write its report; as JSON: its best point, and each trial."""
    if json:
        out.quiet = True
    else:
        say_path(result.path)
    try:
        _say_sweep(result)
    finally:
        if json:
            say_json(_sweep_json(result))


def _sweep_json(result: Any) -> dict[str, Any]:
    from fedray.overview.summary import plain, summary

    best = result.best
    tree = {
        "path": str(result.path),
        "metric": result.metric,
        "best": None
        if best is None
        else {"trials": [t.point.name for t in best.trials], "mean": best.mean, "half": best.half},
        **({"pareto": _pareto_json(result)} if result.objectives else {}),
        "trials": [
            {"status": t.status, "error": t.error}
            if t.status == "missing"
            else {**summary(t.path).to_json(), "status": t.status, "error": t.error}
            for t in result.trials
        ],
    }
    written: dict[str, Any] = plain(tree)
    return written


def _pareto_json(result: Any) -> list[dict[str, Any]]:
    return [
        {
            "trials": [trial.point.name for trial in point.trials],
            "means": {name: point.spread(name)[0] for name in result.objectives},
        }
        for point in result.pareto
    ]


def _say_sweep(result: Any) -> None:
    from fedray.report.reading import find_runs, load_run
    from fedray.report.series import label_runs
    from fedray.report.table import comparison, render_table
    from fedray.sweeps.outcome import sweep_report

    started = time.perf_counter()
    if result.ended is not None and all(trial.status == "missing" for trial in result.trials):
        out.print(_ends(result)[-1], highlight=False, soft_wrap=True)
        return
    runs = label_runs([load_run(path) for path in find_runs([result.path])])
    out.print(render_table(comparison(runs), out.width))
    folder = sweep_report(result.path)
    logging.getLogger(__name__).info("report written in %.1f s", time.perf_counter() - started)
    for trial in result.trials:
        _say_warnings(trial.path)
    out.print(f"Pictures and table: {short(folder)}")
    out.print(f"Runs: {short(result.path)}/trials{tracked(result.path, 'Compare them in MLflow')}")
    _say_place(result.path)
    if result.best is not None:
        best, seeds = result.best, len(result.best.trials)
        spread = "" if seeds == 1 else f" ± {best.half:.2g} over {seeds} seeds"
        name = f"{best.trials[0].point.name}{_last_options(best.trials[0].path)}"
        text = f"Best {result.metric}: {best.mean:.4g}{spread}, of {name}"
        out.print(f"{text}: fedray run {short(result.path)}/best.yaml", highlight=False, soft_wrap=True)
    _say_search(result)
    for text in _ends(result):
        out.print(text, highlight=False, soft_wrap=True)
    say_address([result.path])
    for trial in result.failed:
        reason = escape(trial.error or "interrupted")
        name = f"[bold red]{trial.point.name} {trial.status}:[/bold red]"
        err.print(f"{name} {reason}", highlight=False, soft_wrap=True)
    if result.failed:
        path = short(result.path)
        err.print(f"`fedray resume {path}` resumes them from their checkpoints", soft_wrap=True)
        raise typer.Exit(1)


def _last_options(path: Path) -> str:
    """Return the options of a run that changed as it ran; its name has the first ones."""
    from fedray.experiment.forking import lineage

    changed = {key: new for entry in lineage(path) for key, (_, new) in entry["changes"].items()}
    values = {key: f"{new:.4g}" if isinstance(new, float) else str(new) for key, new in changed.items()}
    parts = [f"{key.rpartition('.')[2]}={escape(value)}" for key, value in values.items()]
    return f" (at its end {', '.join(parts)})" if parts else ""


def _say_search(result: Any) -> None:
    """Print the Pareto set, and why a search ended early."""
    if result.objectives:
        out.print(_pareto(result))
    if result.note is not None:
        err.print(f"The search ended early: {escape(result.note)}", highlight=False, soft_wrap=True)


def _pareto(result: Any) -> Any:
    """Return the Pareto set as a table: a row for each point, a column for each objective."""
    from rich import box
    from rich.table import Table

    title = f"Pareto set, also in {short(result.path)}/pareto.json"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("point", overflow="fold")
    for name, way in result.objectives.items():
        table.add_column(f"{name} ({way})", justify="right")
    for point in result.pareto:
        spreads = [point.spread(name) for name in result.objectives]
        one = len(point.trials) == 1
        cells = [_figure(mean) if one else f"{_figure(mean)} ± {_figure(half, 2)}" for mean, half in spreads]
        table.add_row(escape(point.trials[0].point.name), *cells)
    return table


def _figure(value: float, digits: int = 4) -> str:
    """Return a number with some significant digits; a large one, e.g. of bytes, as a whole number."""
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.{digits}g}"


def _ends(result: Any) -> list[str]:
    """Return why trials ended before their last rounds, and the sweep before all trials."""
    from fedray.storage.run_files import RunFiles

    lines = []
    for trial in result.trials:
        ended = (RunFiles(trial.path).result() or {}).get("ended")
        if ended is not None:
            rounds = RunFiles(trial.path).rounds()[-1]["round"]
            lines.append(f"{trial.point.name} ended after round {rounds}: {escape(ended)}")
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"… and {len(lines) - SHOWN} more"]
    if result.ended is not None:
        begun = sum(trial.status == "failed" for trial in result.cut)
        more = f"fedray resume {short(result.path)} tune.time_budget_s=N"
        parts = f"{begun} of its trials are interrupted, {len(result.cut) - begun} have not begun"
        lines.append(f"{result.ended[0].upper()}{result.ended[1:]}: {parts}; to continue: {more}")
    return lines


def _say_warnings(path: Path) -> None:
    warnings = path / "warnings.txt"
    if warnings.is_file():
        for line in warnings.read_text("utf-8", "replace").splitlines()[:10]:
            err.print(f"[yellow]{path.name}:[/yellow] {escape(line)}", highlight=False, soft_wrap=True)


def say_address(directories: Sequence[Path]) -> None:
    """Print the address that opens the comparison of runs in MLflow, if an SQLite store tracks them.

    The line that names a server has its address already.
    """
    from fedray.report.address import LOCAL, comparison_address
    from fedray.report.reading import store_of

    if any((store_of(path) or "").startswith("sqlite:") for path in directories):
        address = comparison_address(LOCAL, directories)
        if address is not None:
            out.print(f"`fedray ui` opens {escape(address)}", highlight=False, soft_wrap=True)


def tracked(path: Path, what: str) -> str:
    """Return how to see a run or a sweep in MLflow; nothing if MLflow does not track it."""
    from fedray.config.uri import without_password
    from fedray.report.address import comparison_address
    from fedray.report.reading import store_of

    uri = store_of(path)
    if uri is None:
        return ""
    if uri.startswith("sqlite:"):
        return f"   {what}: fedray ui {short(path)}"
    server = without_password(uri)
    return f"   {what}: {escape(comparison_address(server, [path]) or server)}"
