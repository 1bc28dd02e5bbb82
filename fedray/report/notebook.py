"""Runs in the cell of a notebook: a small table, and accuracy over bytes."""

import html
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path

from fedray.report.reading import load_run
from fedray.report.series import settings
from fedray.report.table import comparison, shown


def html_of(paths: Sequence[Path], title: str) -> str:
    """Return a table with a row per setting, and the picture if there are rounds to draw.

    Args:
        paths: directories of runs.
        title: stands above.
    """
    from fedray.report import figures

    runs = [load_run(path) for path in paths]
    parts = [f"<p><code>{html.escape(title)}</code></p>"]
    if not runs:
        return parts[0]
    columns = shown(comparison(runs))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = (
        "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        for row in zip(*columns.values(), strict=True)
    )
    parts.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
    picture = figures.by_bytes(settings(runs))
    if picture is not None:
        data = b64encode(picture).decode()
        parts.append(
            f'<img alt="accuracy over uploaded bytes" width="700" src="data:image/png;base64,{data}">'
        )
    return "\n".join(parts)
