"""Points on their way to a store: written down before they are sent.

A server may carry out a call whose answer never arrives, even after the calling process was killed. MLflow
takes a point of equal key, step, value and time only once, so a point is sent again exactly as it was sent
first. When the store has taken all of a run, the file is removed.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedray.durable import append_lines, scan_lines
from fedray.errors import RunError
from fedray.records import Records, Shape

logger = logging.getLogger(__name__)

SENT = "mlflow-sent.jsonl"
"""Name of the file in the directory of a run or a sweep: the run's mark in the store, then points as sent."""

_LINES = Records(
    SENT,
    {
        "mark": Shape({"mark": str}),
        "metrics": Shape(
            {"step": int, "time_ms": int, "metrics": dict}, inside={"metrics": Shape(each=float)}
        ),
    },
)

Sending = tuple[str, float, int]
"""Key, value, and time in milliseconds."""


class SentPoints:
    """The points of one run that may be on their way.

    Args:
        path: of the file; None: kept in memory only.

    Attributes:
        mark: tag value by which a run is found whose creation was not answered.
        is_new: whether no earlier process has written the mark.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._first: dict[tuple[int, str], tuple[float, int]] = {}
        lines: list[dict[str, Any]] = []
        if path is not None:
            try:
                lines, problem = scan_lines(path)
                problem = problem or next(filter(None, map(self._fault, lines)), None)
            except RunError as error:
                problem = str(error)
            if problem is not None:
                logger.warning("%s; points that were on their way may reach the store twice", problem)
        lines = [line for line in lines if _LINES.fault(line) is None]
        self.mark = next((line["mark"] for line in lines if "mark" in line), "")
        for line in lines:
            for key, value in line.get("metrics", {}).items():
                self._first.setdefault((line["step"], key), (float(value), line["time_ms"]))
        self.is_new = not self.mark
        if self.is_new:
            self.mark = uuid4().hex
            self._write({"mark": self.mark})

    def _fault(self, line: Mapping[str, Any]) -> str | None:
        fault = _LINES.fault(line)
        return None if fault is None else f"{self._path}: is damaged: {fault}"

    def sending(self, step: int, metrics: Mapping[str, float]) -> list[Sending]:
        """Return the points to send for a step: each as it was first sent, and new ones with this time.

        The new ones are written down.
        """
        now_ms = time.time_ns() // 1_000_000
        new = {key: float(value) for key, value in metrics.items() if (step, key) not in self._first}
        if new:
            self._write({"step": step, "time_ms": now_ms, "metrics": new})
            self._first |= {(step, key): (value, now_ms) for key, value in new.items()}
        return [(key, *self._first[step, key]) for key in metrics]

    def forget(self, step: int, metrics: Mapping[str, float]) -> None:
        """Free the memory of points that the store has."""
        for key in metrics:
            self._first.pop((step, key), None)

    def remove(self) -> None:
        """Remove the file: the store has everything."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)

    def _write(self, line: Mapping[str, object]) -> None:
        # not flushed to the disk: it has to survive the process, not the machine
        if self._path is not None:
            with suppress(OSError):
                append_lines(self._path, [line], flush=False)
