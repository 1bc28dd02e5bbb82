"""Further trackers beside MLflow: `tracking.also` names them. They write into the run's own directory.

They are filled from the reports of the run. A resumed run writes their files anew, from its rounds so far, so
that no point is there twice. They never stop a run: the first error leaves a warning and ends that tracker.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from fedray.types import RoundReport

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """One run as a tracker sees it; made by `open_run(folder, name, config)` of the tracker's module."""

    def log_round(self, report: RoundReport) -> None:
        """Log the finite metrics of a round, with the round as step."""

    def tag(self, tags: Mapping[str, str]) -> None:
        """Add texts about the run."""

    def finish(self, status: str) -> None:
        """End the run: FINISHED, FAILED or KILLED."""


class Beside:
    """The further trackers of one run; an empty one does nothing.

    Args:
        names: which; each writes into a folder of its name.
        path: the run's directory.
        config: the run's config.
        rounds: the rounds so far.

    Attributes:
        warnings: warnings on the run, for its readers.
    """

    def __init__(
        self, names: Sequence[str], path: Path, config: Mapping[str, Any], rounds: Iterable[RoundReport]
    ) -> None:
        self.warnings: list[str] = []
        self._open: dict[str, Tracker] = {}
        self._last = RoundReport(-1, {})
        before = list(rounds) if names else []
        for name in names:
            self._try(name, partial(self._start, name, path, config))
        for report in before:
            self.log_round(report)

    def _start(self, name: str, path: Path, config: Mapping[str, Any]) -> None:
        module = import_module(f"fedray.tracking.{name}")
        self._open[name] = module.open_run(path / name, path.name, config)

    def log_round(self, report: RoundReport) -> None:
        """Log a round."""
        self._last = report
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log_round, report))

    def finish(self, status: str, final: RoundReport | None, tags: Mapping[str, str]) -> None:
        """End the run, with those of its final metrics that the last round has not."""
        if final is not None:
            new = {name: value for name, value in final.metrics.items() if name not in self._last.metrics}
            self.log_round(RoundReport(final.round, new))
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.tag, tags))
            self._try(name, partial(tracker.finish, status))
        self._open = {}

    def _try(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._open.pop(name, None)
            text = f"{name} gets no more of this run: {type(error).__name__}: {error}"
            self.warnings.append(text)
            logger.warning(text)
