"""The two streams of the commands, and how they write tables, paths and texts."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleDimensions
from rich.markup import escape
from rich.table import Table

from fedray.durable import shown

__all__ = [
    "columns_of",
    "err",
    "escape",
    "number",
    "out",
    "progress_console",
    "say",
    "say_json",
    "say_path",
    "short",
    "table",
]


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


def say(line: str) -> None:
    """Write a line as it is: a long one is not broken, and nothing in it is coloured."""
    out.out(line, highlight=False)


def columns_of(
    cells: Mapping[str, Sequence[str]], left: Sequence[str], leaving: Sequence[str] = ()
) -> list[str]:
    """Return the lines of a table, for thousands of rows: rich's takes seconds.

    Args:
        cells: header → cells.
        left: headers of columns that are aligned to the left.
        leaving: columns that a narrow terminal does without, the first one first.
    """
    names = list(cells)
    widths = {name: max(map(cell_len, [name, *column])) for name, column in cells.items()}
    for name in leaving:
        if sum(widths[kept] + 2 for kept in names) - 2 > out.width:
            names.remove(name)
    room = out.width - sum(widths[name] + 2 for name in names[1:])
    widths[names[0]] = min(widths[names[0]], max(room, 8))

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            _placed(text, widths[name], name in left) for text, name in zip(row, names, strict=True)
        ).rstrip()

    rule = "─" * min(sum(widths[name] + 2 for name in names) - 2, out.width)
    rows = zip(*(cells[name] for name in names), strict=True)
    return [line(names), rule, *map(line, rows)]


def _placed(text: str, width: int, left: bool) -> str:
    """Return a cell as wide as its column: its beginning and its end where it is wider."""
    if cell_len(text) > width:
        text = f"{text[: width // 2]}…{text[len(text) - (width - width // 2 - 1) :]}"
    gap = " " * (width - cell_len(text))
    return f"{text}{gap}" if left else f"{gap}{text}"


def number(value: float) -> str:
    """Write a number with three digits, whole from a hundred on."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def progress_console() -> Console:
    """Return where progress is shown: stderr, or nowhere."""
    return Console(quiet=True) if out.quiet else err


def say_path(path: Path) -> None:
    """Write the path of what was made, if everything else is left out."""
    if out.quiet:
        sys.stdout.write(f"{short(path)}\n")


def say_json(value: Any) -> None:
    """Write JSON, and nothing else, to stdout; NaN must be null by then."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def short(path: Path) -> str:
    within = path.resolve()
    return shown(within if within.is_relative_to(Path.cwd()) else path)
