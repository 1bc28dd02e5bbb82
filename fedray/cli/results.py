"""`fedray results | verify`: files of published results, and whether they come out again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedray.cli.console import err, out, progress_console, say_json, say_path, short
from fedray.cli.entry import Directories, Import, Json, Trust, app, import_all, readable
from fedray.experiment.progress import RunProgress

if TYPE_CHECKING:
    from fedray.experiment.verifying import Verdict

STYLES = {"same bits": "green", "within tolerance": "green", "differs": "red", "not found": "yellow"}


@app.command()
def results(
    directories: Directories,
    out_file: Annotated[Path, typer.Option("--out", help="The file, e.g. results/quickstart.json.")],
    commands: Annotated[
        list[str] | None,
        typer.Option("--command", help="A command that made the runs, for the reader; may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Write the results of finished runs as one small file that `fedray verify` can check."""
    from fedray.report.cells import cells_of, write_cells

    cells = cells_of(directories)
    write_cells(out_file, cells, commands or [])
    if json:
        return say_json({"path": str(out_file), "cells": [cell.name for cell in cells]})
    say_path(out_file)
    dirty = [c.name for c in cells if any(str(p.get("commit")).endswith("-dirty") for p in c.made_by)]
    if dirty:
        text = f"{len(dirty)} of them were made with uncommitted changes; nobody else can check these"
        err.print(text, highlight=False)
    size = out_file.stat().st_size / 1000
    out.print(f"{len(cells)} results: {short(out_file)} ({size:,.0f} kB)", highlight=False)
    out.print(f"Check one: fedray verify {short(out_file)} --cell '{cells[0].name}'", soft_wrap=True)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A file of results.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="Keys that change no result, e.g. data.root=data."),
    ] = None,
    cells: Annotated[
        list[str] | None, typer.Option("--cell", help="Name of a cell, or a pattern (fedavg*); default: all.")
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--against", parser=readable, help="Directory of runs to compare with; then nothing is run."
        ),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Folder for the runs; default: the next under runs/.")
    ] = None,
    imports: Import = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Make published results again, and say whether they match."""
    import_all(imports)
    from fedray.experiment.verifying import against, chosen, config_of
    from fedray.experiment.verifying import verify as make
    from fedray.report.cells import read_cells

    wanted = chosen(read_cells(file), cells or [])
    verdicts: list[Verdict] = []

    def tell(verdict: "Verdict") -> None:
        verdicts.append(verdict)
        if not json:
            style = STYLES[verdict.outcome]
            text = f"{verdict.cell}: [{style}]{verdict.outcome}[/{style}]"
            out.print("; ".join([text, *verdict.reasons]), soft_wrap=True, highlight=False)

    if runs:
        for verdict in against(wanted, runs):
            tell(verdict)
    else:
        configs = [config_of(cell, overrides or []) for cell in wanted]  # all, before the first runs
        for number, (cell, config) in enumerate(zip(wanted, configs, strict=True)):
            path = None if out_dir is None else out_dir / f"{number:03d}"
            with RunProgress(config.rounds, progress_console()) as progress:
                verdict = make(cell, overrides or [], out=path, on_round=progress.show)
            tell(verdict)
    _say(verdicts, json)


def _say(verdicts: "list[Verdict]", json: bool) -> None:
    good = sum(verdict.good for verdict in verdicts)
    if json:
        say_json(
            {
                "matching": good,
                "cells": [
                    {"cell": v.cell, "outcome": v.outcome, "reasons": v.reasons, "run": v.run and str(v.run)}
                    for v in verdicts
                ],
            }
        )
    else:
        out.print(f"{good} of {len(verdicts)} results match", highlight=False)
    if good < len(verdicts):
        raise typer.Exit(1)
