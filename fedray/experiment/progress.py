"""Bars over rounds, trials and points, in a terminal or a notebook; without either, a few lines."""

import html
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

ERR = Console(stderr=True)

LINES = 20
"""Without a terminal, progress prints about this many lines instead of a bar."""


BAR = 16
"""Characters of a bar."""
TIME = 7
"""Characters of the time left, at most."""


class _Rest(ProgressColumn):
    """The text at the end: in a narrow terminal it gives way, and the numbers stay."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def render(self, task: Task) -> Text:
        """Return as much of the text as there is room for."""
        counts = 2 * len(str(task.total or "?")) + 1
        room = self.console.width - sum((len(task.description), BAR, counts, TIME, 4))
        text = Text(task.fields["now"])
        text.truncate(max(room, 8), overflow="ellipsis")
        return text


def _bar(console: Console) -> "Progress | NotebookBar":
    if in_notebook():
        return NotebookBar()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=BAR),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        _Rest(console),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def in_notebook() -> bool:
    """Tell whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython.get_ipython(), "kernel", None) is not None if ipython is not None else False


class NotebookBar:
    """What this module uses of rich's `Progress`, as one output of a notebook's cell.

    rich's own needs ipywidgets.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._what, self._done, self._now = "", 0.0, ""
        self._total: int | None = None

    def start(self) -> None:
        """Show the output."""
        from IPython.display import HTML, display

        self._handle = display(HTML(self._text()), display_id=True)

    def stop(self) -> None:
        """Leave the last state where it is."""

    def add_task(self, what: str, *, total: int | None, now: str) -> Any:
        """Describe the only task."""
        self._what, self._total, self._now = what, total, now

    def update(self, _task: Any, *, completed: int, total: int | None = None, now: str | None = None) -> None:
        """Show how far it is."""
        from IPython.display import HTML

        self._done = completed
        self._total, self._now = total or self._total, self._now if now is None else now
        if self._handle is not None:
            self._handle.update(HTML(self._text()))

    def _text(self) -> str:
        whole = f' max="{self._total}"' if self._total else ""
        of = f" of {self._total}" if self._total else ""
        text = html.escape(f"{self._what} {self._done:g}{of}  {self._now}")
        return f'<progress value="{self._done:g}"{whole}></progress> <code>{text}</code>'


def _say_progress(console: Console, line: str, before: int, done: int, total: int | None) -> None:
    """Without a terminal, print a line whenever another of LINES parts is done."""
    quiet = console.is_terminal or in_notebook()
    if not quiet and (total is None or before * LINES // total != done * LINES // total):
        console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def watched(
    progress: bool | None, on_round: Callable[..., None] | None, make: Callable[[], Any]
) -> Iterator[Callable[..., None] | None]:
    """Yield what is called after each round: `on_round`, the progress that `make` makes, or both.

    Args:
        progress: whether to show it; None: in a notebook or Python's prompt, unless there is an `on_round`.
        on_round: the caller's own.
        make: returns a `RunProgress` or a `SweepProgress`.
    """
    if progress is None:
        progress = on_round is None and (hasattr(sys, "ps1") or in_notebook())
    if not progress:
        yield on_round
        return
    with make() as shown:

        def both(*round: Any) -> None:
            shown.show(*round)
            if on_round is not None:
                on_round(*round)

        yield both


class RunProgress:
    """A bar with round, accuracy, density, bytes and time left; without a terminal, lines."""

    def __init__(self, rounds: int, console: Console = ERR) -> None:
        self.rounds, self.bar, self.done, self.console = rounds, _bar(console), 0, console
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
        line = f"round {report.round} of {self.rounds}: {now}"
        _say_progress(self.console, line, self.done, report.round, self.rounds)
        self.done = report.round


class Checking:
    """A bar over the points of a sweep during validation."""

    def __init__(self, console: Console = ERR) -> None:
        self.bar = _bar(console)
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

    def __init__(self, rounds: Mapping[str, int], console: Console = ERR) -> None:
        self.bar, self.done, self.console = _bar(console), dict[str, int](), console
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
        done, now = sum(self.done.values()), f"{_now(metrics)}  {trial}"
        self.bar.update(self.task, completed=done, now=now)
        line = f"{trial}, round {self.done[trial]}: {_now(metrics)}"
        _say_progress(self.console, line, before, done, self.total)


def _now(metrics: Mapping[str, Any]) -> str:
    sent = metrics.get("total/bytes/up", 0.0) + metrics.get("total/bytes/down", 0.0)
    return (
        f"accuracy {metrics.get('val/accuracy', float('nan')):.3f}  density {metrics['density/global']:.2f}  "
        f"{sent / 1e6:,.1f} MB"
    )
