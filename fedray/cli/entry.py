"""The `fedray` command: its options, and the arguments that several commands share."""

import atexit
import gc
import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
import typer.core

from fedray.cli.completion import completed_key, completed_name
from fedray.cli.console import out
from fedray.errors import ConfigError
from rllib_pruner.commands import run_app

ANYWHERE = ("-v", "--verbose", "-q", "--quiet")
"""Options that may stand before and after the name of a command."""


class _Group(typer.core.TyperGroup):
    """The commands of fedray."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        moved = [arg for arg in args[:end] if arg in ANYWHERE]
        rest = [arg for arg in args[:end] if arg not in ANYWHERE]
        return super().parse_args(ctx, [*moved, *rest, *args[end:]])


app = typer.Typer(
    name="fedray",
    cls=_Group,
    help="Federated learning with model pruning on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def readable(text: str) -> Path:
    """Return a directory; of an address (`s3://…`) a copy in the cache, brought up to date."""
    if "://" not in text or text.lower().startswith("file://"):
        return Path(text.removeprefix("file://"))
    from fedray.publishing.fetching import readable_copy

    return readable_copy(text)


Directories = Annotated[
    list[Path],
    typer.Argument(
        parser=readable, metavar="DIRECTORIES...", help="Directories or addresses of runs and sweeps."
    ),
]
File = Annotated[
    Path, typer.Argument(help="A YAML file: `base:` (and `space:`, `tune:`), or one run's config.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="e.g. method.lr=0.1 seed=1", autocompletion=completed_key),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="An empty or new directory; default: the next under runs/.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ray cluster: auto, HOST:PORT, ray://HOST:PORT, or local for a Ray that ends with the command; "
        "default: RAY_ADDRESS, or local.",
    ),
]
Name = Annotated[
    str | None, typer.Argument(help="Show one of them with all its options.", autocompletion=completed_name)
]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, and nothing else.")]
Import = Annotated[
    list[Path] | None,
    typer.Option("--import", help="Python file that adds methods, models, devices, … to the tables."),
]


def _trust(context: typer.Context, yes: bool) -> bool:
    if yes:
        from fedray.config.trust import trusting

        context.with_resource(trusting())
    return yes


Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        callback=_trust,
        is_eager=True,
        help="Run the Python files that the config names (imports).",
    ),
]


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the stderr of the moment: while a bar is drawn, its lines go above it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, stream: TextIO) -> None: ...


def _say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"fedray {version('fedray')}")
        raise typer.Exit


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every round.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the directory of a run, sweep or report only.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    out.quiet = quiet
    form = "%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[_StderrHandler()])
    logging.getLogger("fedray").setLevel(logging.INFO if verbose else logging.WARNING)


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


def import_all(paths: list[Path] | None) -> None:
    from fedray.config.plugins import import_modules
    from fedray.config.shipped import located

    import_modules([located(path) for path in paths or []])


def use_cluster(address: str | None, actors: int | str | None = None) -> None:
    """Use the cluster of `--address`.

    Args:
        address: what was given.
        actors: `clients.actors` of the run.

    Raises:
        ConfigError: if it is no address, or the run has no client actors.
    """
    from fedray.experiment import reaching

    if address is not None and actors == 0:
        raise ConfigError(
            f"{reaching.OPTION} {address!r}: with clients.actors=0 the clients train in the process of the "
            f"run, and use no cluster. Leave out {reaching.OPTION}, or set clients.actors to auto or a number"
        )
    reaching.use(address)


def imports_override(file: Path, imports: list[Path] | None) -> list[str]:
    """Return `--import` files, and those that the file itself names, as an override."""
    if not imports:
        return []
    from fedray.config import yaml_text
    from fedray.config.overrides import base_of
    from fedray.config.shipped import located
    from fedray.config.trust import check, resolved

    named = base_of(yaml_text.load(file), file).get("imports") or []
    if not isinstance(named, list):
        return []  # it is refused where the file is validated
    theirs = {path.resolve() for path in map(located, imports)}
    check([name for name in map(str, named) if resolved(name) not in theirs], str(file))
    every = [str(path) for path in [*named, *map(located, imports)]]
    return [f"imports={json.dumps(list(dict.fromkeys(every)))}"]
