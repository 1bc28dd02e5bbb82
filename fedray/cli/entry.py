"""The `fedray` command: its options, and the arguments that several commands share."""

import atexit
import gc
import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from rllib_pruner.commands import run_app

app = typer.Typer(
    name="fedray",
    help="Federated learning with model pruning on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout, and nothing else.")]
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


def imports_override(file: Path, imports: list[Path] | None) -> list[str]:
    """Return `--import` files, and those that the file itself names, as an override."""
    if not imports:
        return []
    from fedray.config import yaml_text
    from fedray.config.overrides import base_of
    from fedray.config.shipped import located

    named = base_of(yaml_text.load(file), file).get("imports") or []
    if not isinstance(named, list):
        return []  # it is refused where the file is validated
    every = [str(path) for path in [*named, *map(located, imports)]]
    return [f"imports={json.dumps(list(dict.fromkeys(every)))}"]
