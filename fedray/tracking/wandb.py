"""Weights & Biases, offline: `wandb sync DIR/wandb/wandb/offline-run-*` sends a run to a server later.

Nothing is sent and no login is needed.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedray.config.trees import flat_text
from fedray.types import RoundReport


class WeightsAndBiases:
    """A run in an offline directory.

    Args:
        folder: the directory.
        name: of the run.
        config: of the run.
        run_id: under which W&B keeps the run.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], run_id: str) -> None:
        import wandb

        folder.mkdir(0o700, parents=True, exist_ok=True)  # the config may hold addresses
        quiet = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
        self._run = wandb.init(
            mode="offline",
            project="fedray",
            dir=str(folder),
            name=name,
            id=run_id,
            config=dict(flat_text(config)),
            settings=quiet,
            reinit="create_new",
        )

    def log_round(self, report: RoundReport) -> None:
        """Log the finite metrics; those of one round are one row, and final ones join the last round."""
        finite = {name: value for name, value in report.metrics.items() if math.isfinite(value)}
        self._run.log(finite, step=report.round)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Add the tags to the run's summary."""
        self._run.summary.update(dict(tags))

    def finish(self, status: str) -> None:
        """Write the rest, with the status, and end."""
        self.tag({"status": status})
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)


def open_run(folder: Path, name: str, config: Mapping[str, Any]) -> WeightsAndBiases:
    """Start a run's directory anew, under the id that it had."""
    earlier = sorted(folder.glob("wandb/offline-run-*"))
    run_id = earlier[-1].name.rpartition("-")[2] if earlier else uuid4().hex[:8]
    shutil.rmtree(folder, ignore_errors=True)
    return WeightsAndBiases(folder, name, config, run_id)
