"""Bring MLflow up to a run's files: what it lacks is sent, no point twice.

A run's own files are always complete. MLflow may not be: it was busy, out of reach or switched off, the
process was killed, or the run was deleted there. Of the files only `mlflow.json` changes.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from fedray.config.run_config import RunConfig, TrackingConfig
from fedray.config.trust import IMPORTED, recorded
from fedray.config.uri import absolute_uri
from fedray.errors import ConfigError, RunError
from fedray.report.reading import TRACKED, moved_store, read_result
from fedray.storage.directory import Lock
from fedray.storage.run_files import RunFiles
from fedray.tracking import store as stores
from fedray.tracking.mlflow_run import PARENT, RunStatus
from fedray.tracking.store import Store, prepare_store
from fedray.tracking.tracked import KNOWN, Tracking, close_tracker, open_tracker

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""Timeout in seconds for the store: long, since the user asked for the transfer."""

LEAVING_S = 5.0
"""Seconds to wait for the process of a trial that has just ended."""


@dataclass(frozen=True)
class Synced:
    """The transfer of one directory.

    Args:
        path: of the run or the sweep.
        run_id: its id in MLflow.
        status: in MLflow, now.
        points: metric values that MLflow lacked.
    """

    path: Path
    run_id: str
    status: RunStatus
    points: int


def sync_run(
    files: RunFiles,
    config: RunConfig,
    tracking: Tracking,
    status: RunStatus | None = None,
    *,
    patience_s: float = 0.0,
) -> Synced:
    """Bring MLflow up to a run's files.

    Args:
        files: of the run.
        config: of the run.
        tracking: where to track it.
        status: how it ended; None: as the files say.
        patience_s: seconds to wait for a process that is leaving the run.

    Raises:
        RunError: as `sync`.
    """
    with Lock(files.path, patience_s=patience_s):
        answer_s = PATIENCE_S if tracking.answer_s is None else tracking.answer_s
        given = replace(tracking, answer_s=answer_s, is_running=False)
        tracker = open_tracker(config, files, given)
        if tracking.parent is not None:
            tracker.tag({PARENT: tracking.parent})
        status = status or ended_as(files)
        close_tracker(tracker, config, files, status)
        if tracker.is_complete and tracking.parent is not None:
            files.write_json(KNOWN, {**(TRACKED.read(files.path) or {}), "parent": tracking.parent})
    if tracker.run_id is None or not tracker.is_complete:
        raise RunError(f"{files.path}: {'; '.join(tracker.warnings) or 'MLflow did not take it'}")
    return Synced(files.path, tracker.run_id, status, tracker.points)


def mend(files: RunFiles, config: RunConfig, tracking: Tracking, status: RunStatus | None = None) -> bool:
    """Bring MLflow up to the files of a run that has ended, if it lacks any; a failure is a warning.

    Args:
        files: of the run.
        config: of the run.
        tracking: where it is tracked.
        status: how it ended; None: as the files say.

    Returns:
        Whether MLflow has everything now.
    """
    known = TRACKED.read(files.path) or {}
    is_attached = tracking.parent is None or known.get("parent") == tracking.parent
    if config.tracking.uri == "none" or (known.get("is_complete") and is_attached):
        return True
    try:
        where = moved_store(config.tracking.uri, files.path, known.get("run_id"))
        store = tracking.store or store_for(config.tracking, where, None)
        given = replace(tracking, store=store, answer_s=stores.ANSWER_S)
        sync_run(files, config, given, status, patience_s=LEAVING_S)
    except RunError as error:
        logger.warning("%s", error)
        return False
    return True


def ended_as(files: RunFiles) -> RunStatus:
    """Tell from a run's files how it ended; one without a result is KILLED.

    Raises:
        RunError: if its result is damaged.
    """
    result = read_result(files.path)
    if result is not None:
        return "FINISHED" if result.get("status") == "finished" else "KILLED"
    warnings = files.path / "warnings.txt"
    lines = warnings.read_text("utf-8", "replace").splitlines() if warnings.is_file() else []
    return "FAILED" if any(line.startswith("failed: ") for line in lines) else "KILLED"


def config_of(files: RunFiles) -> RunConfig:
    with recorded(IMPORTED.read(files.path)):
        return RunConfig.from_tree(files.read_config(), str(files.path / "config.yaml"))


def store_for(tracking: TrackingConfig, uri: str | None, experiment: str | None) -> Store:
    """Return the store to write to.

    Raises:
        ConfigError: if nothing is tracked.
        RunError: if it is out of reach.
    """
    where = tracking.uri if uri is None else absolute_uri(uri)
    if where == "none":
        raise ConfigError("tracking.uri is none: name the store, e.g. --uri sqlite:///runs/mlflow.db")
    store = prepare_store(where, experiment or tracking.experiment)
    if store.problem is not None:
        raise RunError(store.problem)
    return store
