"""Bars over rounds, trials and points; without a terminal, a few lines."""

from collections.abc import Mapping
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedray.cli.console import err

LINES = 20
"""Without a terminal, progress prints about this many lines instead of a bar."""


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeRemainingColumn(compact=True),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


def _say_progress(line: str, before: int, done: int, total: int | None) -> None:
    """Without a terminal, print a line whenever another of LINES parts is done."""
    if not err.is_terminal and (total is None or before * LINES // total != done * LINES // total):
        err.print(line, highlight=False, soft_wrap=True)


class RunProgress:
    """A bar with round, accuracy, density, bytes and time left; without a terminal, lines."""

    def __init__(self, rounds: int) -> None:
        self.rounds, self.bar, self.done = rounds, _bar(), 0
        self.task = self.bar.add_task("rounds", total=rounds, now="setting up")
        self.accuracy = float("nan")

    def __enter__(self) -> "RunProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, report: Any) -> None:
        """Show a round."""
        self.accuracy = report.metrics.get("val/accuracy", self.accuracy)
        now = _now(report.metrics | {"val/accuracy": self.accuracy})
        self.bar.update(self.task, completed=report.round, now=now)
        _say_progress(f"round {report.round} of {self.rounds}: {now}", self.done, report.round, self.rounds)
        self.done = report.round


class Checking:
    """A bar over the points of a sweep during validation."""

    def __init__(self) -> None:
        self.bar = _bar()
        self.task = self.bar.add_task("checking points", total=None, now="")

    def __enter__(self) -> "Checking":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, done: int, total: int) -> None:
        """Show how many points are validated."""
        self.bar.update(self.task, completed=done, total=total)


class SweepProgress:
    """A bar over the rounds of all trials, with the newest metrics; without a terminal, lines."""

    def __init__(self, rounds: Mapping[str, int]) -> None:
        self.bar, self.done = _bar(), dict[str, int]()
        self.total = sum(rounds.values()) or None
        self.task = self.bar.add_task("rounds", total=self.total, now="starting trials")

    def __enter__(self) -> "SweepProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, trial: str, metrics: Mapping[str, Any]) -> None:
        """Show a round of a trial."""
        before = sum(self.done.values())
        self.done[trial] = int(metrics["round"])
        done, now = sum(self.done.values()), f"{trial}: {_now(metrics)}"
        self.bar.update(self.task, completed=done, now=now)
        _say_progress(f"{trial}, round {self.done[trial]}: {_now(metrics)}", before, done, self.total)


def _now(metrics: Mapping[str, Any]) -> str:
    sent = metrics.get("total/bytes/up", 0.0) + metrics.get("total/bytes/down", 0.0)
    return (
        f"accuracy {metrics.get('val/accuracy', float('nan')):.3f}  density {metrics['density/global']:.2f}  "
        f"{sent / 1e6:,.1f} MB"
    )
