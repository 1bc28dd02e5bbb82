"""The command that compares a trained agent with its controls, which need no training.

    fedray agent evaluate [PROCESS] [--policy DIR] [--problems N] [--no-cost] [--root DIR] [--out FILE.md]

`python -m rllib_pruner.evaluate` is the same command.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedray.errors import ConfigError, unknown
from rllib_pruner.commands import run_app

if TYPE_CHECKING:
    from rllib_pruner.tables import Table

Evaluation = Callable[[Path | None, int, bool, Path | None], "list[Table]"]
"""(policy, problems of a kind, whether to measure costs, folder of the data sets) → tables."""

EVALUATIONS = {"rate_search": "rllib_pruner.rate_search.tables", "stages": "rllib_pruner.stages.tables"}
"""Name of a process → the module whose `tables` is its Evaluation; imported when it is used."""

out = Console()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    process: Annotated[str, typer.Argument(help=f"One of: {', '.join(EVALUATIONS)}.")] = "rate_search",
    policy: Annotated[Path | None, typer.Option(help="Its folder; default: the policy that ships.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems of each kind.")] = 1000,
    cost: Annotated[bool, typer.Option(help="Also measure costs, which takes minutes.")] = True,
    root: Annotated[Path | None, typer.Option(help="Folder of the data sets; default: the cache.")] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Markdown file for the tables.")] = None,
) -> None:
    """Compare a trained agent with its controls, which need no training."""
    if process not in EVALUATIONS:
        raise ConfigError(unknown("process", process, EVALUATIONS))
    evaluation: Evaluation = import_module(EVALUATIONS[process]).tables
    tables = evaluation(policy, problems, cost, root)
    for table in tables:
        out.print(table.for_terminal())
    if out_file is not None:
        out_file.write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")


def main() -> None:
    """Run the command line."""
    run_app(app)


if __name__ == "__main__":
    main()
