"""Bring MLflow up to the files of runs and sweeps: what `fedray sync` does."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedray.config import sealed
from fedray.config.tune_config import tune_config
from fedray.errors import ConfigError, RunError
from fedray.report.reading import TRACKED, store_of
from fedray.storage.directory import Lock
from fedray.storage.run_files import RunFiles
from fedray.sweeps.outcome import finish_sweep, status_of
from fedray.sweeps.stopping import Budget
from fedray.sweeps.suggesting import SUGGESTED, search_ended
from fedray.tracking.catching_up import Synced, config_of, store_for, sync_run
from fedray.tracking.mlflow_run import RunStatus
from fedray.tracking.parent import parent_run
from fedray.tracking.shown import shown_params, trial_names
from fedray.tracking.tracked import Tracking


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
    config = config_of(files)
    store = store_for(config.tracking, uri or store_of(place), experiment)
    return [sync_run(files, config, Tracking(store=store))]


def sweep_status(trials: Sequence[RunStatus], missing: int, is_over: bool = False) -> RunStatus:
    """Return how a sweep ended, as the sweep itself says it.

    Args:
        trials: how each trial that has begun ended; one that a scheduler stopped is FINISHED.
        missing: trials that never began, those among them that were not suggested yet.
        is_over: whether its time budget is spent.
    """
    if set(trials) <= {"FINISHED"} and not missing:
        return "FINISHED"
    is_cut = bool(missing) or "KILLED" in trials
    return "FAILED" if "FAILED" in trials and (is_over or not is_cut) else "KILLED"


def missing_trials(place: Path, tree: Mapping[str, Any], begun: int) -> int:
    """Return how many trials of a sweep never began; of a search that did not end, also unsuggested ones.

    Args:
        place: the sweep's directory.
        tree: its `sweep.yaml`.
        begun: trials that have begun.
    """
    tune = tune_config(dict(tree.get("tune") or {}), str(place / "sweep.yaml"))
    if not tune.is_searching:
        return len(tree.get("points", ())) - begun
    if search_ended(place) is None:
        return tune.num_samples * max(1, len(tune.repeat)) - begun
    return sum(len(line.get("trials", ())) for line in SUGGESTED.read(place)) - begun


def _sync_sweep(place: Path, uri: str | None, experiment: str | None) -> list[Synced]:
    tree = sealed.load(place / "sweep.yaml")
    runs = [RunFiles(path.parent) for path in sorted(place.glob("trials/*/config.yaml"))]
    if not runs:
        raise ConfigError(f"{place}: no trial of this sweep has begun: there is nothing to bring to MLflow")
    configs = [config_of(files) for files in runs]
    store = store_for(configs[0].tracking, uri or store_of(place), experiment)
    with Lock(place, "sweep"):
        own = RunFiles(place)
        known = TRACKED.read(place) or {}
        name = str(tree.get("name", place.name))
        about: dict[str, Any] = {
            "tags": {"sweep": name},
            "params": shown_params(tree),
            "resume": known.get("run_id"),
        }
        parent = parent_run(store, place.name, **about, folder=place)
        if parent is None:
            raise RunError(f"{place}: {store.problem or 'MLflow did not take it'}")
        own.write_json(TRACKED.name, {"run_id": parent})
        points = [dict(point) for point in tree.get("points", ())]
        names = trial_names(points, {f.path.name: c for f, c in zip(runs, configs, strict=True)})
        done = [
            sync_run(files, config, Tracking(store=store, parent=parent, name=names[files.path.name]))
            for files, config in zip(runs, configs, strict=True)
        ]
        became = Counter(status_of(files.path) for files in runs)
        became["missing"] = missing_trials(place, tree, len(done))
        ended: list[RunStatus] = [
            "FINISHED" if status_of(trial.path) == "stopped" else trial.status for trial in done
        ]
        limit_s = (tree.get("tune") or {}).get("time_budget_s")
        is_over = Budget(place, limit_s).left_s <= 0
        status = sweep_status(ended, became["missing"], is_over)
        if not finish_sweep(store, parent, status, place, became):
            raise RunError(f"{place}: MLflow did not take the outcome of the sweep; sync it again")
        own.write_json(TRACKED.name, {"run_id": parent, "is_complete": True})
    return [Synced(place, parent, status, 0), *done]
