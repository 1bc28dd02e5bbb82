"""The count of damaged variants, as the last line of their tests."""

from typing import Any

from tests.storage.damage import TRIED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many damaged files were tried."""
    if TRIED:
        each = ", ".join(f"{name} {count}" for name, count in TRIED.items())
        terminalreporter.write_line(f"{TRIED.total():,} damaged variants: {each}")
