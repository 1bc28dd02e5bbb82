"""The address at which MLflow's UI opens on the comparison of given runs."""

import json
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from fedray.report.reading import TRACKED, find_runs

WORKFLOW = "workflowType=machine_learning"
"""Without it, MLflow's UI opens on its pages for language models."""

LOCAL = "http://127.0.0.1:5000"
"""Where `fedray ui` shows a store, unless it is given another port."""


def comparison_address(server: str, directories: Iterable[str | Path]) -> str | None:
    """Return the address of the comparison of all tracked runs among directories and below them.

    Args:
        server: the UI's own address, e.g. http://127.0.0.1:5000.
        directories: of runs and sweeps.

    Returns:
        The page of the run if there is only one; None if MLflow tracks none of them.

    Raises:
        ConfigError, RunError: if a directory holds no run, or a file of one cannot be read.
    """
    runs, experiments = tracked_runs(directories)
    if not runs:
        return None
    page = f"{server.rstrip('/')}/#"
    if len(runs) == 1:
        return f"{page}/experiments/{experiments[0]}/runs/{runs[0]}?{WORKFLOW}"
    listed = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (runs, experiments))
    return f"{page}/compare-runs?runs={next(listed)}&experiments={next(listed)}&{WORKFLOW}"


def tracked_runs(directories: Iterable[str | Path]) -> tuple[list[str], list[str]]:
    """Return the ids of all tracked runs among directories and below them, and those of their experiments."""
    tracked = [TRACKED.read(path) or {} for path in find_runs(directories)]
    runs = [str(known.get("run_id")) for known in tracked if known.get("experiment_id")]
    return runs, sorted({str(known["experiment_id"]) for known in tracked if known.get("experiment_id")})


def charts_address(server: str, experiment: str, view: str) -> str:
    """Return the address of the charts of a view that `tracking.view.keep_view` kept."""
    page = f"{server.rstrip('/')}/#/experiments/{experiment}/runs"
    return f"{page}?viewStateShareKey={view}&compareRunsMode=CHART&{WORKFLOW}"
