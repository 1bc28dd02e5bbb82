"""`fedray run | sweep | resume | sync`."""

from pathlib import Path
from typing import Annotated

import typer

from fedray.cli.console import err, out, progress_console, short
from fedray.cli.entry import (
    Address,
    File,
    Import,
    Json,
    Out,
    Overrides,
    Trust,
    app,
    import_all,
    imports_override,
    use_cluster,
)
from fedray.cli.outcome import say_run, say_sweep
from fedray.experiment.progress import Checking, RunProgress, SweepProgress


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    out_dir: Out = None,
    imports: Import = None,
    trust: Trust = False,
    json: Json = False,
    address: Address = None,
) -> None:
    """Make one run: of a config, or of the `base:` of a sweep."""
    from fedray.config.run_config import RunConfig
    from fedray.experiment.run import run as make

    config = RunConfig.load(file, [*(overrides or []), *imports_override(file, imports)])
    use_cluster(address, config.clients.actors)
    if _has_space(file):
        name = short(file)
        text = f"{name} is a sweep: this runs its base only; `fedray sweep {name}` tries its points"
        err.print(text, highlight=False, soft_wrap=True)
    with RunProgress(config.rounds, progress_console()) as progress:
        history = make(config, out=out_dir, on_round=progress.show)
    say_run(history, json)


@app.command()
def sweep(
    file: File,
    overrides: Overrides = None,
    out_dir: Out = None,
    imports: Import = None,
    trust: Trust = False,
    json: Json = False,
    address: Address = None,
) -> None:
    """Try all points of a file's `space:`, with Ray Tune."""
    from fedray.sweeps.space import Sweep
    from fedray.sweeps.sweep import sweep as make

    use_cluster(address)

    with Checking(progress_console()) as checking:
        changes = [*(overrides or []), *imports_override(file, imports)]
        plan = Sweep.load(file, changes, on_point=checking.show)
    say = err if json else out
    how = f", suggested by {plan.tune.search.name}" if plan.sample else ""
    say.print(f"{plan.most} trials of up to {plan.rounds} rounds{how}; starting Ray …")
    with SweepProgress(plan.lengths, progress_console()) as progress:
        result = make(plan, out=out_dir, on_round=progress.show)
    say_sweep(result, json)


@app.command()
def resume(
    given: Annotated[
        str, typer.Argument(metavar="DIRECTORY", help="Directory of a run or a sweep, or its address.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]…",
            help="rounds=200, or keys that change no result; of a sweep tune.time_budget_s.",
        ),
    ] = None,
    imports: Import = None,
    trust: Trust = False,
    json: Json = False,
    address: Address = None,
) -> None:
    """Resume an interrupted run or sweep, or give a run more rounds."""
    import_all(imports)
    from fedray.experiment.homes import brought
    from fedray.experiment.resuming import resumed_config
    from fedray.experiment.run import finished_result
    from fedray.experiment.run import resume as go_on
    from fedray.storage.run_files import RunFiles

    changes = overrides or []
    directory, _ = brought(given, changes)
    if (directory / "sweep.yaml").is_file():
        use_cluster(address)
        _resume_sweep(directory, changes, json)
        return
    files = RunFiles.open(directory)
    _, config = resumed_config(files, changes)
    use_cluster(address, config.clients.actors)
    if finished_result(files, config) is not None and not json:
        more = f"fedray resume {short(directory)} rounds=N"
        out.print(f"{short(directory)} is finished: nothing was run. More rounds: {more}", soft_wrap=True)
    with RunProgress(config.rounds, progress_console()) as progress:
        history = go_on(directory, changes, on_round=progress.show)
    say_run(history, json)


def _resume_sweep(directory: Path, changes: list[str], json: bool) -> None:
    from fedray.sweeps.sweep import load_sweep, resume_sweep

    with Checking(progress_console()) as checking:
        plan = load_sweep(directory, checking.show, changes)
    with SweepProgress(plan.lengths, progress_console()) as progress:
        result = resume_sweep(directory, plan, on_round=progress.show)
    say_sweep(result, json)


@app.command()
def sync(
    directories: Annotated[
        list[str], typer.Argument(help="Directories of runs, sweeps and trainings, or addresses.")
    ],
    uri: Annotated[str | None, typer.Option(help="MLflow store; default: that of the run's config.")] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow's experiment; default: as above.")] = None,
    imports: Import = None,
    trust: Trust = False,
) -> None:
    """Bring MLflow up to date with runs, sweeps and trainings, e.g. after it was out of reach."""
    import_all(imports)
    from fedray.config.places import is_place
    from fedray.durable import local_path
    from fedray.experiment.homes import brought, publish_all
    from fedray.overview.summary import is_training

    for given in directories:
        directory, place = brought(given) if is_place(given) else (local_path(given), None)
        if is_training(directory):
            from rllib_pruner.syncing import sync as bring
        else:
            from fedray.sweeps.sync import sync as bring
        for done in bring(directory, uri, experiment):
            out.print(f"{short(done.path)}: {done.status}, {done.points} points added", soft_wrap=True)
        publish_all(directory, place)


def _has_space(file: Path) -> bool:
    """Tell whether a file describes several points."""
    from fedray.config import yaml_text

    return bool(yaml_text.load(file).get("space"))
