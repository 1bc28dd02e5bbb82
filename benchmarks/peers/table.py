"""The printed table."""

import os
import statistics
from collections.abc import Iterable
from pathlib import Path

from benchmarks.peers.measuring import Row


def processor() -> str:
    """Return the processor's name and the number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores"


def lines(rows: Iterable[Row], flower: Row | None, plain: Row) -> list[str]:
    """Return the table of a model.

    Args:
        rows: one for each framework.
        flower: Flower's, or None if it was not asked for.
        plain: the plain loop's.
    """
    head = (
        f"{'':26}{'seconds':>9}{'min … max':>18}{'CPU s':>9}{'× Flower':>10}{'× plain':>9}{'MB':>8}"
        f"{'accuracy':>10}"
    )
    return [head, *(_line(row, flower, plain) for row in rows)]


def _line(row: Row, flower: Row | None, plain: Row) -> str:
    if row.median is None:
        return f"{row.title:26} {row.refused}"
    spread = f"{min(row.seconds):.3f} … {max(row.seconds):.3f}"
    return (
        f"{row.title:26}{row.median:9.3f}{spread:>18}{statistics.mean(row.cpu_s):9.3f}"
        f"{_times(flower, row):>10}{_times(plain, row):>9}"
        f"{row.memory_bytes / 1e6:8,.0f}{row.accuracy or 0:10.3f}"
    )


def _times(reference: Row | None, row: Row) -> str:
    """Return how many times faster a framework is than the reference."""
    if reference is None or reference.median is None or row.median is None:
        return "–"
    return f"{reference.median / row.median:.2f}"


def versions(rows: Iterable[Row]) -> list[str]:
    """Return a line for each framework with its own environment or packages."""
    return [
        f"{row.title}: {', '.join(f'{name} {number}' for name, number in row.versions.items())}"
        for row in rows
        if row.versions
    ]
