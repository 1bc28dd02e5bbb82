"""Writes the tables of pages that come from files of results.

    make docs

A page holds `<!-- table: results/NAME.json target=0.85 columns=setting,n,… -->` before a table, and
`<!-- end of table -->` after it; `target` and `columns` may be left out. tests/test_reference.py fails while
a page is not what this module writes.
"""

import re
import shlex
from pathlib import Path

from fedray.errors import ConfigError
from fedray.report.cells import load_runs
from fedray.report.table import comparison, to_markdown

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/*.md", "docs/methods/*.md")
TABLE = re.compile(r"(<!-- table: (.+?) -->\n)(?:.*?)(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    """Return the pages that hold such a table."""
    found = [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]
    return [page for page in found if TABLE.search(page.read_text(encoding="utf-8"))]


def with_tables(text: str) -> str:
    """Return a page with its tables written anew.

    Raises:
        ConfigError: if a file of results, or a column, is missing.
    """
    return TABLE.sub(lambda match: f"{match[1]}{table(match[2])}{match[3]}", text)


def table(wanted: str) -> str:
    """Return a table in Markdown.

    Args:
        wanted: `results/NAME.json target=0.85 columns=setting,n`; columns are named as the table names them,
            without what stands in brackets.
    """
    file, *options = shlex.split(wanted)
    given = dict(option.split("=", 1) for option in options)
    target = float(given["target"]) if "target" in given else None
    lines = to_markdown(comparison(load_runs([ROOT / file]), target)).splitlines()
    if "columns" not in given:
        return "\n".join(lines) + "\n"
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    names = [head.partition(" (")[0] for head in rows[0]]
    missing = set(given["columns"].split(",")) - set(names)
    if missing:
        raise ConfigError(f"{file}: no column {', '.join(sorted(missing))}; there are {', '.join(names)}")
    kept = [names.index(name) for name in given["columns"].split(",")]
    return "".join(f"| {' | '.join(row[at] for at in kept)} |\n" for row in rows)
