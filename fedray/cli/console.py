"""The two streams of the commands, and how they write tables, paths and texts."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleDimensions
from rich.markup import escape
from rich.table import Table

__all__ = ["err", "escape", "out", "say_json", "short", "table"]


class _Console(Console):
    """As wide as the terminal; in a pipe or a file, as wide as the longest line."""

    @property  # type: ignore[misc]  # rich's can be set
    def size(self) -> ConsoleDimensions:
        return super().size if self.is_terminal else ConsoleDimensions(UNLIMITED, 25)


UNLIMITED = 100_000
out = _Console(soft_wrap=False)
err = Console(stderr=True)


def table(*columns: str) -> Table:
    table = Table(show_lines=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def say_json(value: Any) -> None:
    """Write JSON, and nothing else, to stdout; NaN must be null by then."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def short(path: Path) -> str:
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
