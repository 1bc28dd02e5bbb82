"""A run's directory as MLflow sees it: opened, filled from the files, and ended."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedray.config.run_config import RunConfig
from fedray.durable import shown
from fedray.errors import RunError
from fedray.publishing.publisher import PUBLISHED
from fedray.report.reading import TRACKED, moved_store
from fedray.storage.directory import LOCK
from fedray.storage.final_model import load_module
from fedray.storage.run_files import RunFiles
from fedray.tracking.also import Beside
from fedray.tracking.data_inputs import DESCRIBED, dataset_inputs
from fedray.tracking.mlflow_run import MLflowTracker, RunStatus
from fedray.tracking.provenance import declared, run_tags
from fedray.tracking.sent import SENT
from fedray.tracking.shown import run_name, shown_params
from fedray.tracking.store import Store, prepare_store
from fedray.types import RoundReport

logger = logging.getLogger(__name__)

KNOWN = TRACKED.name


@dataclass
class Tracking:
    """Where MLflow tracks a run.

    Args:
        store: a prepared MLflow store; None: prepare the one of the config.
        parent: MLflow's run id of the sweep.
        name: name of the run in MLflow.
        answer_s: seconds to wait for the store; None: as `MLflowTracker`.
        is_running: whether the run has rounds to come.
    """

    store: Store | None = None
    parent: str | None = None
    name: str | None = None
    answer_s: float | None = None
    is_running: bool = True


def open_tracker(config: RunConfig, files: RunFiles, tracking: Tracking) -> MLflowTracker:
    """Return a run's tracker: of this directory's MLflow run if the store has one, else of a new one.

    Rounds that the store lacks are queued now: an earlier process could not deliver them.
    """
    known = TRACKED.read(files.path) or {}
    store = tracking.store
    if store is None:
        at = moved_store(config.tracking.uri, files.path, known.get("run_id"))
        store = prepare_store(at, config.tracking.experiment)
    if known.pop("is_complete", False):
        files.write_json(KNOWN, known)

    def opened(experiment_id: str, run_id: str) -> None:
        found = {"uri": store.uri, "experiment_id": experiment_id, "run_id": run_id}
        parent = tracking.parent if known.get("run_id") != run_id else known.get("parent")
        files.write_json(KNOWN, found if parent is None else found | {"parent": parent})

    tracker = MLflowTracker(
        store,
        run_name=tracking.name or run_name(config),
        params=shown_params(config.to_tree()),
        tags=run_tags(
            method=config.method.name,
            dataset=config.data.name,
            model=config.model,
            digest=config.digest,
            **declared(config),
        ),
        parent_run_id=tracking.parent,
        resume=known.get("run_id"),
        answer_s=tracking.answer_s,
        folder=files.path,
        on_open=opened,
        is_running=tracking.is_running,
    )
    if (data := DESCRIBED.read(files.path)) is not None:
        tracker.log_inputs(dataset_inputs(data) if store.uri != "none" else [])
    for line in files.rounds():
        tracker.log_round(as_report(line))
    return tracker


def open_beside(config: RunConfig, files: RunFiles) -> Beside:
    """Return the further trackers of a run, filled with its rounds so far."""
    rounds = map(as_report, files.rounds()) if config.tracking.also else ()
    return Beside(config.tracking.also, files.path, config.to_tree(), rounds)


def close_beside(beside: Beside | None, files: RunFiles, status: RunStatus) -> None:
    """End the further trackers of a run, if it came to have any."""
    if beside is None:
        return
    result = (files.result() or {}) if status == "FINISHED" else {}
    tags = {"weights_sha256": str(result["weights_sha256"])} if "weights_sha256" in result else {}
    beside.finish(status, final(result) if result else None, tags)
    with suppress(RunError):  # the disk may have failed
        files.warn(beside.warnings)


def close_tracker(tracker: MLflowTracker, config: RunConfig, files: RunFiles, status: RunStatus) -> None:
    """End the MLflow run; a finished one gets its final metrics, its files and the model."""
    artifacts: Sequence[Path] = []
    model = None
    if status == "FINISHED":
        result = files.result() or {}
        tracker.log_round(final(result))
        tracker.tag({"weights_sha256": str(result.get("weights_sha256"))})
        skipped = {"checkpoints", KNOWN, SENT, LOCK, PUBLISHED, *config.tracking.also}
        artifacts = [path for path in sorted(files.path.iterdir()) if path.name not in skipped]
        model = lambda: load_module(config, files)  # noqa: E731
    tracker.finish(status, artifacts, model)
    with suppress(RunError):  # the disk may have failed
        files.warn(tracker.warnings)
        if tracker.is_complete:
            files.write_json(KNOWN, {**(TRACKED.read(files.path) or {}), "is_complete": True})
        elif tracker.warnings:
            logger.warning("`fedray sync %s` brings MLflow up to this run's files", shown(files.path))


def as_report(line: Mapping[str, Any]) -> RoundReport:
    """Return a line of `rounds.jsonl` as a round's report; metrics without a value are left out."""
    metrics = {name: value for name, value in line["metrics"].items() if value is not None}
    return RoundReport(line["round"], metrics)


def final(result: Mapping[str, Any]) -> RoundReport:
    """Return the metrics of `result.json` as a report of the last round; the tracker has most of them."""
    own = {name: value for name, value in result.items() if "/" in name and type(value) in (int, float)}
    return RoundReport(int(result.get("rounds", 0)), own)
