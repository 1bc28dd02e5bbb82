"""TensorBoard's event files, in the run's directory: `tensorboard --logdir runs` shows all runs below it."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedray.config.trees import flat_text
from fedray.types import RoundReport


class TensorBoard:
    """A run's event file, by tensorboardX.

    Args:
        folder: of the event file.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        folder.mkdir(0o700, parents=True, exist_ok=True)  # the config may hold addresses
        self._writer = SummaryWriter(str(folder))

    def log_round(self, report: RoundReport) -> None:
        """Add a scalar for each finite metric; they are on disk when this returns."""
        for name, value in report.metrics.items():
            if math.isfinite(value):
                self._writer.add_scalar(name, value, report.round)
        self._writer.flush()

    def tag(self, tags: Mapping[str, str]) -> None:
        """Add a text for each tag."""
        for name, value in tags.items():
            self._writer.add_text(name, value)

    def finish(self, status: str) -> None:
        """Add the status as a text, and close the file."""
        self.tag({"status": status})
        self._writer.close()


def open_run(folder: Path, name: str, config: Mapping[str, Any]) -> TensorBoard:
    """Start a run's event file anew, with the config as a text."""
    shutil.rmtree(folder, ignore_errors=True)
    tracker = TensorBoard(folder)
    lines = (f"    {key}: {value}" for key, value in flat_text(config).items())
    tracker.tag({"name": name, "config": "\n".join(lines)})
    return tracker
