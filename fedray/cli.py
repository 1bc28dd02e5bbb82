"""The command line: `fedray run | sweep | report | resume | sync | ui | agent | methods | …`.

Exit status: 0 done, 1 failed while running, 2 refused before anything started, 130 interrupted, 143 and 129
ended by SIGTERM and SIGHUP.
"""

import atexit
import gc
import inspect
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
import typer.main
from rich.console import Console, ConsoleDimensions
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedray.errors import ConfigError, unknown
from rllib_pruner.commands import run_app

if TYPE_CHECKING:
    from fedray.federation.method import Method

app = typer.Typer(
    name="fedray",
    help="Federated learning with model pruning on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Console(Console):
    """As wide as the terminal; in a pipe or a file, as wide as the longest line."""

    @property  # type: ignore[misc]  # rich's can be set
    def size(self) -> ConsoleDimensions:
        return super().size if self.is_terminal else ConsoleDimensions(UNLIMITED, 25)


UNLIMITED = 100_000
out = _Console(soft_wrap=False)
err = Console(stderr=True)

File = Annotated[
    Path, typer.Argument(help="A YAML file: `base:` (and `space:`, `tune:`), or one run's config.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="e.g. method.lr=0.1 seed=1")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="An empty or new directory; default: the next under runs/.")
]
Name = Annotated[str | None, typer.Argument(help="Show one of them with all its options.")]
Import = Annotated[
    list[Path] | None,
    typer.Option("--import", help="Python file that adds methods, models, devices, … to the tables."),
]


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every round.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("fedray").setLevel(logging.INFO if verbose else logging.WARNING)


@app.command()
def run(file: File, overrides: Overrides = None, out_dir: Out = None, imports: Import = None) -> None:
    """Make one run: of a config, or of the `base:` of a sweep."""
    from fedray.config.run_config import RunConfig
    from fedray.experiment.run import run as make

    config = RunConfig.load(file, [*(overrides or []), *_imports_override(file, imports)])
    if _has_space(file):
        name = _short(file)
        text = f"{name} is a sweep: this runs its base only; `fedray sweep {name}` tries its points"
        err.print(text, highlight=False, soft_wrap=True)
    with _RunProgress(config.rounds) as progress:
        history = make(config, out=out_dir, on_round=progress.show)
    _say_run(history.path)


@app.command()
def sweep(file: File, overrides: Overrides = None, out_dir: Out = None, imports: Import = None) -> None:
    """Try all points of a file's `space:`, with Ray Tune."""
    from fedray.sweeps.space import Sweep
    from fedray.sweeps.sweep import sweep as make

    with _Checking() as checking:
        changes = [*(overrides or []), *_imports_override(file, imports)]
        plan = Sweep.load(file, changes, on_point=checking.show)
    out.print(f"{len(plan.points)} trials of up to {plan.rounds} rounds; starting Ray …")
    rounds = {point.name: point.config.rounds for point in plan.points}
    with _SweepProgress(rounds) as progress:
        result = make(plan, out=out_dir, on_round=progress.show)
    _say_sweep(result)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(help="Directory of a run or a sweep.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="rounds=200, or keys that change no result."),
    ] = None,
    imports: Import = None,
) -> None:
    """Resume an interrupted run or sweep, or give a run more rounds."""
    _import(imports)
    from fedray.durable import local_path
    from fedray.experiment.resuming import resumed_config
    from fedray.experiment.run import finished_result
    from fedray.experiment.run import resume as go_on
    from fedray.storage.run_files import RunFiles

    directory, changes = local_path(directory), overrides or []
    if (directory / "sweep.yaml").is_file():
        _resume_sweep(directory, changes)
        return
    files = RunFiles.open(directory)
    _, config = resumed_config(files, changes)
    if finished_result(files, config) is not None:
        more = f"fedray resume {_short(directory)} rounds=N"
        out.print(f"{_short(directory)} is finished: nothing was run. More rounds: {more}", soft_wrap=True)
    with _RunProgress(config.rounds) as progress:
        history = go_on(directory, changes, on_round=progress.show)
    _say_run(history.path)


def _resume_sweep(directory: Path, changes: list[str]) -> None:
    from fedray.sweeps.sweep import load_sweep, resume_sweep

    if changes:
        raise ConfigError(
            f"{directory} is a sweep, whose points do not change: got {' '.join(changes)}; resume one of its "
            "runs, in trials/, or start another sweep"
        )
    with _Checking() as checking:
        plan = load_sweep(directory, on_point=checking.show)
    rounds = {point.name: point.config.rounds for point in plan.points}
    with _SweepProgress(rounds) as progress:
        result = resume_sweep(directory, plan, on_round=progress.show)
    _say_sweep(result)


@app.command()
def sync(
    directories: Annotated[list[Path], typer.Argument(help="Directories of runs and sweeps.")],
    uri: Annotated[str | None, typer.Option(help="MLflow store; default: that of the run's config.")] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow's experiment; default: as above.")] = None,
    imports: Import = None,
) -> None:
    """Bring MLflow up to date with runs and sweeps, e.g. after it was out of reach."""
    _import(imports)
    from fedray.sweeps.sync import sync as bring

    for directory in directories:
        for done in bring(directory, uri, experiment):
            out.print(f"{_short(done.path)}: {done.status}, {done.points} points added", soft_wrap=True)


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(help="Directories of runs and sweeps.")],
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder for figures and tables.")] = None,
    target: Annotated[
        float | None, typer.Option(help="Also report when each run reached this validation accuracy.")
    ] = None,
) -> None:
    """Draw figures and tables from the files of runs."""
    from fedray.report.reading import find_runs, load_run
    from fedray.report.series import label_runs
    from fedray.report.table import comparison, render_table, write_report

    runs = label_runs([load_run(path) for path in find_runs(directories)])
    out.print(render_table(comparison(runs, target=target), out.width))
    written = write_report(directories, out_dir, target=target)
    for path in written.files:
        out.print(f"  {_short(path)}")
    if any(_tracked(path, "") for path in directories):
        out.print(f"Compare them in MLflow: fedray ui {' '.join(map(_short, directories))}", soft_wrap=True)


@app.command()
def ui(
    directories: Annotated[
        list[Path] | None, typer.Argument(help="Runs and sweeps to compare; their store is opened.")
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
    if compared is None:
        out.print("Other experiments: choose Model training on its start page. Tick runs, then Compare.")
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        status = 0
    raise typer.Exit(status)


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
    given = ", ".join(map(_short, directories))
    if len(stores) > 1:
        raise ConfigError(f"{given}: their runs are in {len(stores)} stores, and a UI shows one; give fewer")
    compared = comparison_address(address, directories)
    if compared is None:
        raise ConfigError(f"{given}: MLflow tracks none of these runs; `fedray sync` brings them to it")
    return compared, stores.pop()


@app.command()
def methods(
    name: Name = None,
    imports: Import = None,
) -> None:
    """List the methods; or show one with its options."""
    if name is not None:
        _import(imports)
        return _method(name)
    if imports:
        _import(imports)
        listed = listing()
    else:  # the file saves the import of torch, which takes seconds
        listed = json.loads(LISTING.read_text(encoding="utf-8"))
    table = _table("method", "what it is", "source", "needs")
    for row in listed["methods"]:
        table.add_row(*row)
    out.print(table)
    out.print(f"Every method has: {listed['common']}\nIn full: fedray methods NAME")


LISTING = Path(__file__).parent / "methods" / "listing.json"
"""The list of methods, as `make docs` writes it."""


def listing() -> dict[str, Any]:
    """Return the rows of the list of methods, and the options that every method has."""
    from dataclasses import fields

    from fedray.federation.method import Method
    from fedray.methods import METHODS

    rows = [[name, _title(kind), kind.citation, _needs(kind) or "—"] for name, kind in METHODS.items()]
    return {"methods": rows, "common": ", ".join(f"{f.name}={f.default}" for f in fields(Method))}


@app.command()
def samplers(
    name: Name = None,
    imports: Import = None,
) -> None:
    """List the client samplers; or show one with its options."""
    _import(imports)
    from fedray.federation.sampling import SAMPLERS

    if name is not None:
        return _describe_entry("sampler", name, SAMPLERS, "clients.sampler")
    _list_entries("sampler", SAMPLERS, "clients.sampler")


@app.command()
def codecs(
    name: Name = None,
    imports: Import = None,
) -> None:
    """List the codecs of updates; or show one with its options."""
    _import(imports)
    from fedray.costs.differences import CODECS

    if name is not None:
        return _describe_entry("codec", name, CODECS, "clients.uplink")
    _list_entries("codec", CODECS, "clients.uplink")


@app.command()
def models(imports: Import = None) -> None:
    """List the models, with their sizes on each data set."""
    _import(imports)
    from fedray.data import DATASETS
    from fedray.models import MODELS, outline, refusal

    table = _table("model", "layers", "source", *(f"weights on {name}" for name in DATASETS))
    for name, architecture in MODELS.items():
        sizes, faults = [], []
        for spec in DATASETS.values():
            if refusal(architecture, spec.input_shape, spec.tokens):
                sizes.append("—")
                continue
            try:
                sizes.append(f"{outline(name, spec.input_shape, spec.num_classes).layout.size:,}")
            except ConfigError as error:
                sizes.append("broken")
                faults.append(str(error))
        summary = f"{architecture.summary}\n{faults[0]}" if faults else architecture.summary
        table.add_row(name, _escape(summary), architecture.source, *sizes)
    out.print(table)


@app.command()
def datasets(imports: Import = None) -> None:
    """List the data sets."""
    _import(imports)
    from fedray.data import DATASETS

    table = _table("data set", "train", "test", "shape", "classes", "data.root holds", "source")
    for name, spec in DATASETS.items():
        shape = "×".join(map(str, spec.input_shape))
        table.add_row(
            name,
            f"{spec.train_examples:,}",
            f"{spec.test_examples:,}",
            shape,
            str(spec.num_classes),
            spec.files or "embedded",
            spec.source,
        )
    out.print(table)


@app.command()
def partitions(
    name: Name = None,
    imports: Import = None,
) -> None:
    """List the kinds of partition; or show one with its options."""
    _import(imports)
    from fedray.data import PARTITIONS

    if name is None:
        _list_entries("partition", PARTITIONS, "data.partition")
    else:
        _describe_entry("partition", name, PARTITIONS, "data.partition")


@app.command()
def devices(
    sources: Annotated[bool, typer.Option(help="Give the source of every number.")] = True,
    imports: Import = None,
) -> None:
    """List the simulated devices and links, each number with its source."""
    _import(imports)
    from fedray.costs.devices import DEVICES, HARDWARE, LINKS, profile

    profiles = {name: profile(name) for name in dict.fromkeys((*DEVICES, *HARDWARE))}
    table = _table(
        "device", "GFLOP/s", "down MB/s", "up MB/s", "latency s", "memory GiB", "available", "drops out"
    )
    for name, device in profiles.items():
        table.add_row(
            name,
            f"{device.flops_per_s / 1e9:,.3g}",
            f"{device.downlink_bytes_per_s / 1e6:,.3g}",
            f"{device.uplink_bytes_per_s / 1e6:,.3g}",
            f"{device.latency_s:.3g}",
            f"{device.memory_bytes / 2**30:.3g}",
            f"{device.availability:.0%}",
            f"{device.dropout:.0%}",
        )
    out.print(table)
    out.print(f"On another link: DEVICE@LINK, e.g. raspberry_pi_4@lte. Links: {', '.join(LINKS)}")
    if sources:
        for name, device in profiles.items():
            out.print(f"\n[bold]{name}[/bold]")
            for field, source in device.sources.items():
                out.print(f"  {field}: {source}", highlight=False)


@app.command()
def schema(
    training: Annotated[bool, typer.Option("--training", help="Of files that train an agent.")] = False,
    imports: Import = None,
) -> None:
    """Print the JSON schema of config files, by which editors complete and check YAML."""
    _import(imports)
    from fedray.config.run_config import RunConfig
    from fedray.config.schema import file_schema

    if training:
        from rllib_pruner.config import TrainConfig

        written = file_schema(TrainConfig)
    else:
        written = file_schema(RunConfig)
    sys.stdout.write(json.dumps(written, indent=1, ensure_ascii=False) + "\n")


AGENT_COMMANDS = {
    "train": "rllib_pruner.train",
    "evaluate": "rllib_pruner.evaluate",
    "judge": "rllib_pruner.stages.judge",
}
"""Name of a command of `fedray agent` → the module whose `app` it is."""


class _AgentGroup(typer.core.TyperGroup):
    """The commands of `fedray agent`; each imports its module, and with it RLlib, when it is used."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(AGENT_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in AGENT_COMMANDS:
            return None
        return typer.main.get_command(import_module(AGENT_COMMANDS[cmd_name]).app)


app.add_typer(
    typer.Typer(cls=_AgentGroup, help="Train, evaluate and judge agents.", no_args_is_help=True), name="agent"
)


def main() -> None:
    """Run the command line; turn fedray's own errors into a message and an exit status."""
    collect_rarely()
    run_app(app)


def collect_rarely() -> None:
    """Let Python look for garbage at every 50,000 new objects instead of 700, and not at the exit.

    torch and MLflow create a million objects; searching them took a fifth of a short run.
    """
    gc.set_threshold(50_000, 20, 100)
    atexit.register(gc.freeze)


# ── output
# ────────────────────────────────────────────────────────────────────────────────────────────


LINES = 20
"""Without a terminal, progress prints about this many lines instead of a bar."""


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(compact=True),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def _say_progress(line: str, before: int, done: int, total: int | None) -> None:
    """Without a terminal, print a line whenever another of LINES parts is done."""
    if not err.is_terminal and (total is None or before * LINES // total != done * LINES // total):
        err.print(line, highlight=False, soft_wrap=True)


class _RunProgress:
    """A bar with round, accuracy, density, bytes and time left; without a terminal, lines."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.bar, self.done = rounds, _bar(), 0
        self.task = self.bar.add_task("rounds", total=rounds, now="setting up")
        self.accuracy = float("nan")

    def __enter__(self) -> "_RunProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, report: Any) -> None:
        """Show a round."""
        self.accuracy = report.metrics.get("val/accuracy", self.accuracy)
        now = _now(report.metrics | {"val/accuracy": self.accuracy})
        self.bar.update(self.task, completed=report.round, now=now)
        _say_progress(f"round {report.round} of {self.rounds}: {now}", self.done, report.round, self.rounds)
        self.done = report.round


class _Checking:
    """A bar over the points of a sweep during validation."""

    def __init__(self) -> None:
        self.bar = _bar()
        self.task = self.bar.add_task("checking points", total=None, now="")

    def __enter__(self) -> "_Checking":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int, total: int) -> None:
        """Show how many points are validated."""
        self.bar.update(self.task, completed=done, total=total)


class _SweepProgress:
    """A bar over the rounds of all trials, with the newest metrics; without a terminal, lines."""

    def __init__(self, rounds: Mapping[str, int]) -> None:
        self.bar, self.done = _bar(), dict[str, int]()
        self.total = sum(rounds.values()) or None
        self.task = self.bar.add_task("rounds", total=self.total, now="starting trials")

    def __enter__(self) -> "_SweepProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, trial: str, metrics: Mapping[str, Any]) -> None:
        """Show a round of a trial."""
        before = sum(self.done.values())
        self.done[trial] = int(metrics["round"])
        done, now = sum(self.done.values()), f"{trial}: {_now(metrics)}"
        self.bar.update(self.task, completed=done, now=now)
        _say_progress(f"{trial}, round {self.done[trial]}: {_now(metrics)}", before, done, self.total)


def _now(metrics: Mapping[str, Any]) -> str:
    sent = metrics.get("total/bytes/up", 0.0) + metrics.get("total/bytes/down", 0.0)
    return (
        f"accuracy {metrics.get('val/accuracy', float('nan')):.3f}  density {metrics['density/global']:.2f}  "
        f"{sent / 1e6:,.1f} MB"
    )


def _say_run(path: Path) -> None:
    from fedray.report.reading import load_run
    from fedray.report.series import label_runs
    from fedray.report.table import comparison, render_table

    loaded = load_run(path)
    out.print(render_table(comparison(label_runs([loaded])), out.width))
    _say_warnings(path)
    out.print(f"Files: {_short(path)}   Pictures: fedray report {_short(path)}{_tracked(path, 'MLflow')}")


def _say_sweep(result: Any) -> None:
    from fedray.report.reading import find_runs, load_run
    from fedray.report.series import label_runs
    from fedray.report.table import comparison, render_table, write_report

    started = time.perf_counter()
    runs = label_runs([load_run(path) for path in find_runs([result.path])])
    out.print(render_table(comparison(runs), out.width))
    written = write_report([result.path])
    logging.getLogger(__name__).info("report written in %.1f s", time.perf_counter() - started)
    for trial in result.trials:
        _say_warnings(trial.path)
    out.print(f"Pictures and table: {_short(written.path)}")
    out.print(f"Runs: {_short(result.path)}/trials{_tracked(result.path, 'Compare them in MLflow')}")
    if result.best is not None:
        best, seeds = result.best, len(result.best.trials)
        spread = "" if seeds == 1 else f" ± {best.half:.2g} over {seeds} seeds"
        text = f"Best {result.metric}: {best.mean:.4g}{spread}, of {best.trials[0].point.name}"
        out.print(f"{text}: fedray run {_short(result.path)}/best.yaml", highlight=False, soft_wrap=True)
    for trial in result.failed:
        reason = _escape(trial.error or "interrupted")
        name = f"[bold red]{trial.point.name} {trial.status}:[/bold red]"
        err.print(f"{name} {reason}", highlight=False, soft_wrap=True)
    if result.failed:
        path = _short(result.path)
        err.print(f"`fedray resume {path}` resumes them from their checkpoints", soft_wrap=True)
        raise typer.Exit(1)


def _tracked(path: Path, what: str) -> str:
    """Return how to see a run or a sweep in MLflow; nothing if MLflow does not track it."""
    from fedray.config.uri import without_password
    from fedray.report.address import comparison_address
    from fedray.report.reading import store_of

    uri = store_of(path)
    if uri is None:
        return ""
    if uri.startswith("sqlite:"):
        return f"   {what}: fedray ui {_short(path)}"
    server = without_password(uri)
    return f"   {what}: {_escape(comparison_address(server, [path]) or server)}"


def _say_warnings(path: Path) -> None:
    warnings = path / "warnings.txt"
    if warnings.is_file():
        for line in warnings.read_text(encoding="utf-8").splitlines()[:10]:
            err.print(f"[yellow]{path.name}:[/yellow] {_escape(line)}", highlight=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(show_lines=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _method(name: str) -> None:
    """Print one method: its summary, its own options, their defaults and meaning."""
    from dataclasses import fields

    from fedray.federation.method import Method
    from fedray.methods import METHODS

    if name not in METHODS:
        raise ConfigError(unknown("method", name, METHODS))
    method, shared = METHODS[name], {field.name for field in fields(Method)}
    own = [f"method.{field.name}={field.default}" for field in fields(method) if field.name not in shared]
    out.print(f"{name}: {_title(method)}", style="bold", highlight=False)
    out.print(f"Source: {method.citation or '—'}   Needs: {_needs(method) or '—'}\n", highlight=False)
    out.print(_escape(inspect.getdoc(method) or ""), highlight=False)
    out.print("\nDefaults: " + ("  ".join(own) or "no further options"), highlight=False)


def _list_entries(what: str, table: Mapping[str, type[Any]], section: str) -> None:
    """Print a table of dataclasses that a section of the config chooses from."""
    from fedray.config.trees import CHOICES

    listed = _table(what, "what it does", "options", "source")
    for name, entry in table.items():
        options = _escape(_defaults(entry)) or "—"
        listed.add_row(name, _escape(_first_line(entry)), options, _escape(_citation(entry)))
    out.print(listed)
    example = f"{section}.{CHOICES[section]}=NAME"
    out.print(f"In full: fedray {what}s NAME   To choose one: {example}", highlight=False)


def _describe_entry(what: str, name: str, table: Mapping[str, type[Any]], section: str) -> None:
    """Print one entry of such a table: its purpose, options and defaults.

    Raises:
        ConfigError: if the table has no such entry.
    """
    if name not in table:
        raise ConfigError(unknown(what, name, table))
    out.print(f"{name}: {_first_line(table[name])}", style="bold", highlight=False)
    if _citation(table[name]) != "—":
        out.print(f"Source: {_citation(table[name])}", highlight=False)
    out.print(_escape(inspect.getdoc(table[name]) or "").partition("\n")[2], highlight=False)
    out.print(f"\nDefaults: {_defaults(table[name], f'{section}.') or 'no options'}", highlight=False)


def _first_line(entry: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(entry) or "").partition("\n")[0]


def _defaults(entry: type[Any], prefix: str = "") -> str:
    """Return the options of a dataclass with their defaults."""
    from dataclasses import asdict

    return "  ".join(f"{prefix}{name}={value}" for name, value in asdict(entry()).items())


def _citation(entry: type) -> str:
    """Return the class's own source, without inheritance; else a dash."""
    return str(vars(entry).get("citation") or "—")


def _title(method: type["Method"]) -> str:
    """Return the first line of the method's file."""
    first = (sys.modules[method.__module__].__doc__ or method.__doc__ or "").strip().splitlines()[0]
    return first.split(".  ")[0]


def _needs(method: type["Method"]) -> str:
    server = ["data.server_fraction"] * method.uses_server_data
    return "; ".join([*server, *[method.needs] * bool(method.needs)])


def _import(paths: list[Path] | None) -> None:
    from fedray.config.plugins import import_modules

    import_modules(paths or [])


def _imports_override(file: Path, imports: list[Path] | None) -> list[str]:
    """Return `--import` files, and those that the file itself names, as an override."""
    if not imports:
        return []
    from fedray.config import yaml_text
    from fedray.config.overrides import base_of

    named = base_of(yaml_text.load(file), file).get("imports") or []
    if not isinstance(named, list):
        return []  # it is refused where the file is validated
    every = [str(path) for path in [*named, *imports]]
    return [f"imports={json.dumps(list(dict.fromkeys(every)))}"]


def _has_space(file: Path) -> bool:
    """Tell whether a file describes several points."""
    from fedray.config import yaml_text

    return bool(yaml_text.load(file).get("space"))


def _short(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
