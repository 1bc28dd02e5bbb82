"""Tables for the terminal and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

import rich.table


@dataclass(frozen=True)
class Table:
    """Rows of text under names; all columns but the first are numbers.

    Args:
        title: of the comparison.
        columns: names.
        rows: a text for each column.
        note: how the figures were obtained.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def for_terminal(self) -> rich.table.Table:
        """Return what rich prints."""
        table = rich.table.Table(title=self.title, caption=self.note, header_style="bold")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Return a Markdown table below its title and above its note."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")
