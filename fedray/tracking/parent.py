"""The run in MLflow that the trials of a sweep belong to: started before them, and ended after them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedray.tracking.mlflow_run import MLflowTracker, RunStatus
from fedray.tracking.store import Store
from fedray.types import RoundReport


def parent_run(
    store: Store,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, object],
    resume: str | None = None,
    folder: Path | None = None,
) -> str | None:
    """Start the run that a sweep's trials belong to, or continue it; return its id.

    None where nothing is tracked, and where the store does not answer.
    """
    tracker = MLflowTracker(store, run_name=name, params=params, tags=tags, resume=resume, folder=folder)
    tracker.close()
    return tracker.run_id


def finish_parent(
    store: Store,
    run_id: str | None,
    status: RunStatus,
    artifacts: Sequence[Path] = (),
    tags: Mapping[str, str] | None = None,
    report: RoundReport | None = None,
    folder: Path | None = None,
) -> bool:
    """End a run in MLflow, with artifacts, and with tags and metrics of its outcome.

    Returns:
        Whether MLflow took all of it.
    """
    if run_id is None:
        return False
    tracker = MLflowTracker(
        store, run_name="", params=None, tags={}, resume=run_id, folder=folder, is_running=False
    )
    tracker.tag(tags or {})
    if report is not None:
        tracker.log_round(report)
    tracker.finish(status, artifacts)
    return tracker.is_complete
