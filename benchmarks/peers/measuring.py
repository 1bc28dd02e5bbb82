"""Check what each framework learns, then time the rounds of those that pass, in turn."""

import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.peers.environments import NotInstalledError
from benchmarks.peers.session import FrameworkError, Session

Start = Callable[[], Session]
"""Starts a framework on a federation."""


@dataclass
class Row:
    """What was found about a framework.

    Args:
        title: its name.
        accuracy: after the short training, in 0..1.
        seconds: of each measured round.
        cpu_s: CPU seconds of its process tree in each of them, in steps of 0.01.
        memory_bytes: proportional set size of its process tree, after the last round.
        versions: package → version.
        refused: why it was not timed, or "".
    """

    title: str
    accuracy: float | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    memory_bytes: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""

    @property
    def median(self) -> float | None:
        """The median of its rounds, or None if it was not timed."""
        return statistics.median(self.seconds) if self.seconds and not self.refused else None


def check(row: Row, start: Start, rounds: int, examples: range) -> None:
    """Let a framework train for some rounds; note its accuracy, or why it failed.

    Args:
        row: gets the result.
        start: starts it on the federation whose accuracy is taken.
        rounds: rounds to train.
        examples: how many examples a round may have.
    """
    try:
        with start() as session:
            row.versions = session.versions
            for _ in range(rounds):
                if not _as_asked(row, session.round().examples, examples):
                    return
            row.accuracy = session.accuracy()
    except (FrameworkError, NotInstalledError) as error:
        row.refused = _reason(error)


def judge(rows: Iterable[Row], reference: Row, tolerance: float) -> None:
    """Refuse each framework whose accuracy is more than `tolerance` below the reference's."""
    if reference.accuracy is None:
        raise SystemExit(f"{reference.title}: {reference.refused}; without it there is nothing to compare")
    for row in rows:
        if row.accuracy is not None and row.accuracy < reference.accuracy - tolerance:
            row.refused = (
                f"not timed: accuracy {row.accuracy:.3f}, the plain loop's is {reference.accuracy:.3f} "
                f"(tolerance {tolerance})"
            )


def time_rounds(
    rows: Mapping[str, Row], start: Callable[[str], Session], warm_up: int, rounds: int, examples: range
) -> None:
    """Time the rounds of the frameworks that were not refused, one round of each in turn.

    Args:
        rows: name → row; seconds and memory are added.
        start: starts a framework by name on the federation that is timed.
        warm_up: rounds of each that are not counted.
        rounds: rounds of each that are.
        examples: how many examples a round may have.
    """
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for name, row in rows.items():
            if not row.refused:
                try:
                    sessions[name] = stack.enter_context(start(name))
                except (FrameworkError, NotInstalledError) as error:
                    row.refused = _reason(error)
        for number in range(warm_up + rounds):
            for name in [name for name in sessions if not rows[name].refused]:
                _time_round(rows[name], sessions[name], examples, counted=number >= warm_up)
        for name, session in sessions.items():
            if not rows[name].refused:
                rows[name].memory_bytes = session.memory_bytes()


def _time_round(row: Row, session: Session, examples: range, *, counted: bool) -> None:
    try:
        made = session.round()
    except FrameworkError as error:
        row.refused = _reason(error)
        return
    if _as_asked(row, made.examples, examples) and counted:
        row.seconds.append(made.seconds)
        row.cpu_s.append(made.cpu_s)


def _as_asked(row: Row, trained: int, examples: range) -> bool:
    """Tell whether a round had as many examples as it should; note it if not."""
    if trained not in examples:
        row.refused = f"not timed: {trained:,} examples in a round, not {_span(examples)}"
    return not row.refused


def _span(examples: range) -> str:
    low, high = examples[0], examples[-1]
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _reason(error: Exception) -> str:
    kind = "not installed" if isinstance(error, NotInstalledError) else "failed"
    return f"{kind}: {str(error)[:160]}"
