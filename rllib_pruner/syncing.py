"""Bring MLflow up to the files of trainings: what `fedray sync` does with their directories."""

from pathlib import Path

from fedray.durable import local_path
from fedray.errors import ConfigError, RunError
from fedray.report.reading import store_of
from fedray.storage.directory import Lock
from fedray.sweeps.sync import sweep_status
from fedray.tracking.catching_up import PATIENCE_S, Synced, store_for
from fedray.tracking.mlflow_run import RunStatus
from fedray.tracking.parent import finish_parent, parent_run
from fedray.tracking.store import Store
from rllib_pruner.files import TrainFiles
from rllib_pruner.training import is_over, send


def sync(path: str | Path, uri: str | None = None, experiment: str | None = None) -> list[Synced]:
    """Bring MLflow up to the files of a training, or of several and the run above them.

    Args:
        path: the directory.
        uri: the store; None: the one of the config.
        experiment: name of MLflow's experiment; None: the one of the config.

    Raises:
        ConfigError: if it is not the directory of a training, or there is no store.
        RunError: if one is still running, or the store did not take everything.
    """
    place = local_path(path).resolve()
    if (place / "config.yaml").is_file():
        files = TrainFiles.open(place)
        return [_sync_one(files, _store(files, place, uri, experiment), None)]
    begun = [TrainFiles.open(file.parent) for file in sorted(place.glob("trials/*/config.yaml"))]
    if not begun:
        raise ConfigError(f"{place}: no training has begun here: there is nothing to bring to MLflow")
    store = _store(begun[0], place, uri, experiment)
    above = TrainFiles(place)
    with Lock(place, "training"):
        about = {"trials": [files.path.name for files in begun]}
        parent = parent_run(store, place.name, {}, about, resume=above.run_id())
        above.write_run_id(parent)
        done = [_sync_one(files, store, parent) for files in begun]
        # the best policy is copied here once all trainings have ended
        missing = 0 if above.policy.is_dir() else 1
        status = sweep_status([one.status for one in done], missing)
        if parent is None or not finish_parent(store, parent, status):
            raise RunError(f"{place}: {store.problem or 'MLflow did not take the outcome; sync it again'}")
    return [Synced(place, parent, status, 0), *done]


def _store(files: TrainFiles, place: Path, uri: str | None, experiment: str | None) -> Store:
    return store_for(files.config().tracking, uri or store_of(place), experiment)


def _sync_one(files: TrainFiles, store: Store, parent: str | None) -> Synced:
    with Lock(files.path, "training"):
        config = files.config()
        status: RunStatus = "FINISHED" if is_over(config, files.progress()) else _broken(files)
        tracker = send(files, config, store, status, parent=parent, answer_s=PATIENCE_S)
    if tracker.run_id is None or not tracker.is_complete:
        raise RunError(f"{files.path}: {'; '.join(tracker.warnings) or 'MLflow did not take it'}")
    return Synced(files.path, tracker.run_id, status, tracker.points)


def _broken(files: TrainFiles) -> RunStatus:
    """Tell how a training ended that is not over: a trial's error is noted."""
    return "FAILED" if (files.path / "error.txt").is_file() else "KILLED"
