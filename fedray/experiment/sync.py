"""Bring MLflow up to the files of runs and sweeps: what `fedray sync` does.

A run's own files are always complete. MLflow may not be: it was busy, out of reach or switched off, the
process was killed, or the run was deleted there. No point is logged twice, and of the files only
`mlflow.json` changes.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedray.config.run_config import RunConfig
from fedray.config.uri import absolute_uri
from fedray.errors import ConfigError, RunError
from fedray.experiment.outcome import finish_sweep, status_of
from fedray.experiment.tracked import Tracking, close_tracker, open_tracker
from fedray.experiment.tracking import (
    PARENT,
    RunStatus,
    Store,
    parent_run,
    prepare_store,
)
from fedray.storage import sealed
from fedray.storage.directory import Lock
from fedray.storage.run_files import RunFiles

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0
"""Timeout in seconds for the store: long, since the user asked for the transfer."""


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


def sync(path: str | Path, uri: str | None = None, experiment: str | None = None) -> list[Synced]:
    """Bring MLflow up to the files of a run, or of a sweep and its trials.

    Args:
        path: the directory.
        uri: the store; None: the one of the run's config.
        experiment: name of MLflow's experiment; None: the one of the config.

    Raises:
        ConfigError: if `path` is neither, or there is no store.
        RunError: if the run is still running, or the store did not take everything.
    """
    place = Path(path).expanduser().resolve()
    if (place / "sweep.yaml").is_file():
        return _sync_sweep(place, uri, experiment)
    files = RunFiles.open(place)
    config = _config(files)
    return [sync_run(files, config, Tracking(store=_store(config, uri, experiment)))]


def sync_run(
    files: RunFiles, config: RunConfig, tracking: Tracking, status: RunStatus | None = None
) -> Synced:
    """Bring MLflow up to a run's files; `status` is how it ended, None: as the files say.

    Raises:
        RunError: as `sync`.
    """
    with Lock(files.path):
        tracker = open_tracker(config, files, replace(tracking, answer_s=PATIENCE_S))
        if tracking.parent is not None:
            tracker.tag({PARENT: tracking.parent})
        status = status or ended_as(files)
        close_tracker(tracker, config, files, status)
    if tracker.run_id is None or not tracker.is_complete:
        raise RunError(f"{files.path}: {'; '.join(tracker.warnings) or 'MLflow did not take it'}")
    return Synced(files.path, tracker.run_id, status, tracker.points)


def mend(files: RunFiles, config: RunConfig, tracking: Tracking) -> None:
    """Bring MLflow up to a finished run's files, if it lacks any; a failure is a warning."""
    known = files.read_json("mlflow.json") or {}
    if config.tracking.uri == "none" or known.get("is_complete"):
        return
    try:
        store = tracking.store or _store(config, None, None)
        sync_run(files, config, replace(tracking, store=store))
    except RunError as error:
        logger.warning("%s", error)


def ended_as(files: RunFiles) -> RunStatus:
    """Tell from a run's files how it ended; one without a result is KILLED."""
    result = files.read_json("result.json")
    if result is not None:
        return "FINISHED" if result.get("status") == "finished" else "KILLED"
    warnings = files.path / "warnings.txt"
    lines = warnings.read_text(encoding="utf-8").splitlines() if warnings.is_file() else []
    return "FAILED" if any(line.startswith("failed: ") for line in lines) else "KILLED"


def sweep_status(statuses: Sequence[RunStatus | None]) -> RunStatus:
    """Return the outcome of a sweep from those of its trials; None is a trial that never began."""
    if "FAILED" in statuses or None in statuses:
        return "FAILED"
    return "FINISHED"


def _sync_sweep(place: Path, uri: str | None, experiment: str | None) -> list[Synced]:
    tree = sealed.load(place / "sweep.yaml")
    runs = [RunFiles(path.parent) for path in sorted(place.glob("trials/*/config.yaml"))]
    if not runs:
        raise ConfigError(f"{place}: no trial of this sweep has begun: there is nothing to bring to MLflow")
    configs = [_config(files) for files in runs]
    store = _store(configs[0], uri, experiment)
    with Lock(place, "sweep"):
        own = RunFiles(place)
        known = own.read_json("mlflow.json") or {}
        name = str(tree.get("name", place.name))
        parent = parent_run(store, place.name, {"sweep": name}, tree, resume=known.get("run_id"))
        if parent is None:
            raise RunError(f"{place}: {store.problem or 'MLflow did not take it'}")
        own.write_json("mlflow.json", {"run_id": parent})
        done = [
            sync_run(files, config, Tracking(store=store, parent=parent, name=files.path.name))
            for files, config in zip(runs, configs, strict=True)
        ]
        begun: list[RunStatus | None] = [trial.status for trial in done]
        missing: list[RunStatus | None] = [None] * (len(tree.get("points", ())) - len(done))
        status = sweep_status([*begun, *missing])
        became = Counter(status_of(files.path) for files in runs)
        became["missing"] = len(missing)
        finish_sweep(store, parent, status, place, became)
    return [Synced(place, parent, status, 0), *done]


def _config(files: RunFiles) -> RunConfig:
    return RunConfig.from_tree(files.read_config(), str(files.path / "config.yaml"))


def _store(config: RunConfig, uri: str | None, experiment: str | None) -> Store:
    """Return the store to write to.

    Raises:
        ConfigError: if nothing is tracked.
        RunError: if it is out of reach.
    """
    where = config.tracking.uri if uri is None else absolute_uri(uri)
    if where == "none":
        raise ConfigError("tracking.uri is none: name the store, e.g. --uri sqlite:///runs/mlflow.db")
    store = prepare_store(where, experiment or config.tracking.experiment)
    if store.problem is not None:
        raise RunError(store.problem)
    return store
