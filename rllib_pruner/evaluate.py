"""The command that compares a trained agent with what needs no training.

python -m rllib_pruner.evaluate [PROCESS] [--policy DIR] [--problems N] [--no-cost] [--root DIR]
                                [--out FILE.md]
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fedray.errors import ConfigError, FedrayError, unknown
from rllib_pruner.rate_search.tables import tables as rate_search_tables
from rllib_pruner.stages.tables import tables as stage_tables
from rllib_pruner.tables import Table

Evaluation = Callable[[Path | None, int, bool, Path | None], list[Table]]
"""(policy, problems of a kind, whether to measure what takes minutes, where data sets are) → tables."""

EVALUATIONS: dict[str, Evaluation] = {"rate_search": rate_search_tables, "stages": stage_tables}

out = Console()
err = Console(stderr=True, soft_wrap=True, highlight=False)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    process: Annotated[str, typer.Argument(help=f"One of: {', '.join(EVALUATIONS)}.")] = "rate_search",
    policy: Annotated[Path | None, typer.Option(help="Its folder; default: the policy that ships.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="Held-out problems of each kind.")] = 1000,
    cost: Annotated[bool, typer.Option(help="Also measure training of the server.")] = True,
    root: Annotated[Path | None, typer.Option(help="Folder of the data sets; default: the cache.")] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Markdown file for the tables.")] = None,
) -> None:
    """Compare a trained agent with what needs no training."""
    if process not in EVALUATIONS:
        raise ConfigError(unknown("process", process, EVALUATIONS))
    tables = EVALUATIONS[process](policy, problems, cost, root)
    for table in tables:
        out.print(table.for_terminal())
    if out_file is not None:
        out_file.write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")


def main() -> None:
    """Run the command line; turn fedray's own errors into a message and an exit status."""
    try:
        app()
    except FedrayError as error:
        wrong = isinstance(error, ConfigError)
        err.print(f"[bold red]{'cannot run' if wrong else 'failed'}:[/bold red] {escape(str(error))}")
        sys.exit(2 if wrong else 1)


if __name__ == "__main__":
    main()
