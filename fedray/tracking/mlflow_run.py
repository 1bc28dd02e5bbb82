"""A run as MLflow sees it: one parent for a sweep, one child for each trial, one batch of metrics a round.

Each trial opens an `MLflowTracker` on the driver's `Store`. A run's own files are written elsewhere and are
always complete: tracking never stops a run. A separate thread makes all calls to MLflow, so that a server
which fails or does not answer costs a few seconds at the start and at the end, and nothing in between.

Nothing here touches MLflow's global state (active run): client and run id are explicit.
"""

import hashlib
import logging
import math
import posixpath
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import nn

from fedray.config.trees import flat_text
from fedray.tracking import store as stores
from fedray.tracking.lane import Lane
from fedray.tracking.logged_model import log_model, save_module
from fedray.tracking.store import (
    Store,
    client_of,
    import_mlflow,
    import_quietly,
    named,
    one_line,
    opening_s,
    reach,
)
from fedray.types import RoundReport

logger = logging.getLogger(__name__)

SHIPPED_BYTES_PER_S = 1e6
"""Artifacts lengthen the wait at the end by their size over this rate."""

PARENT = "mlflow.parentRunId"
"""MLflow's tag for the run that another belongs to."""

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_NAME_LENGTH, _PARAM_LENGTH, _TAG_LENGTH, _PARAMS_PER_BATCH = 250, 6000, 5000, 100  # MLflow's limits


class MLflowTracker:
    """One run in MLflow. Where the store tracks nothing, or stops answering, every method does nothing.

    The first call that fails leaves one warning and ends the tracking of this run.

    Args:
        store: from `prepare_store`.
        run_name: the run's name in the UI.
        params: nested config; logged once, under dotted names such as `method.density`. None: only a run that
            is there is continued, and none is made.
        tags: see `provenance.run_tags`.
        parent_run_id: the sweep that the run belongs to.
        resume: id of a run to continue instead of starting one, if the store has it; if it is deleted, it is
            restored. Its params and tags stay, missing ones are added, and no point is logged twice.
        answer_s: how long to wait for the store at the start and at the end, in seconds; None: ANSWER_S.

    Attributes:
        run_id: None until MLflow has given one.
        warnings: warnings on the run, for its readers.
        is_complete: whether the run has ended and the store has taken everything.
        points: how many metric values were logged.
    """

    def __init__(
        self,
        store: Store,
        *,
        run_name: str,
        params: Mapping[str, object] | None,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        resume: str | None = None,
        answer_s: float | None = None,
    ) -> None:
        self.run_id: str | None = None
        self.is_complete, self.points = False, 0
        self._wait_s = answer_s
        self.warnings: list[str] = [] if store.problem is None else [store.problem]
        self._uri, self._is_on = store.uri, store.experiment_id is not None
        self._steps: dict[str, set[int]] = {}
        self._lane = Lane() if self._is_on else None
        if not self._is_on:
            return
        import_mlflow(self._uri)
        if parent_run_id is not None:
            tags = {**tags, PARENT: parent_run_id}
        opened = self._submit(lambda: self._open(store.experiment_id, run_name, params, tags, resume))
        self._await(opened, answer_s or opening_s(self._uri))

    def log_round(self, report: RoundReport) -> None:
        """Hand over the finite metrics of a round as one batch, with the round as step. Does not wait."""
        if not self._is_on:
            return
        from mlflow.entities import Metric

        now_ms, step = time.time_ns() // 1_000_000, report.round
        finite = {_name(key): value for key, value in report.metrics.items() if math.isfinite(value)}
        # MLflow keys its metrics by time too: a value logged twice appears twice
        new = {key: value for key, value in finite.items() if step not in self._steps.get(key, ())}
        batch = [Metric(key, float(value), now_ms, step) for key, value in new.items()]
        if batch:
            self.points += len(batch)
            for key in new:
                self._steps.setdefault(key, set()).add(step)
            self._submit(lambda: self._client.log_batch(self.run_id, metrics=batch, synchronous=True))

    def log_inputs(self, inputs: Sequence[Any]) -> None:
        """Name the data sets of the run. Does not wait."""
        if self._is_on and inputs:
            self._submit(lambda: self._client.log_inputs(self.run_id, datasets=list(inputs)))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags, new ones and others. Does not wait."""
        for key, value in tags.items():
            if self._is_on:
                self._submit(partial(self._set_tag, _name(key), value[:_TAG_LENGTH]))

    def finish(
        self,
        status: RunStatus,
        artifacts: Sequence[Path] = (),
        model: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Ship the artifacts and the model, and end the run.

        Args:
            status: how it ended.
            artifacts: files, and folders with all that is in them; those that do not exist are passed over.
            model: called only for a tracked run; `mlflow.pytorch.load_model` loads the module from
                `runs:/<run_id>/model`.
        """
        if self._is_on:
            self._end(status, artifacts, model)
        self.close()

    def _end(
        self, status: RunStatus, artifacts: Sequence[Path], model: Callable[[], nn.Module] | None
    ) -> None:
        with TemporaryDirectory() as folder:
            saved = Path(folder, "model")
            if model is not None:
                import_quietly("mlflow.pyfunc", "mlflow.pytorch")
                self._await(self._submit(partial(self._save_model, model(), saved)), self._answer_s)
            shipped_bytes = 0
            for file, to in _files(artifacts):
                shipped_bytes += file.stat().st_size
                self._submit(partial(self._ship, file, to))
            if saved.is_dir():
                shipped_bytes += sum(file.stat().st_size for file, _ in _files([saved]))
                self._submit(partial(self._log_model, saved))
            ended = self._submit(lambda: self._client.set_terminated(self.run_id, status))
            self._await(ended, self._answer_s + shipped_bytes / SHIPPED_BYTES_PER_S)
            self.is_complete = self._is_on

    def close(self) -> None:
        """Stop tracking, and leave the run in MLflow as it is."""
        self._is_on = False
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    @property
    def _answer_s(self) -> float:
        return stores.ANSWER_S if self._wait_s is None else self._wait_s

    @property
    def _client(self) -> Any:
        return client_of(self._uri)

    # ── calls of the thread ──────────────────────────────────────────────────────────────────────────────

    def _open(
        self,
        experiment_id: str | None,
        run_name: str,
        params: Mapping[str, object] | None,
        tags: Mapping[str, str],
        resume: str | None,
    ) -> None:
        run = None if resume is None else self._find(resume)
        if run is not None:
            self._reopen(run, params or {}, tags)
        elif params is not None:
            self._create(experiment_id, run_name, params, tags)
        else:
            raise ConnectionError(f"has no run {resume}")

    def _find(self, run_id: str) -> Any:
        """Return a run of the store, a deleted one too; None if it has none of this id."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _create(
        self, experiment_id: str | None, run_name: str, params: Mapping[str, object], tags: Mapping[str, str]
    ) -> None:
        tags = {_name(key): value[:_TAG_LENGTH] for key, value in tags.items()}
        run_id = self._client.create_run(experiment_id, tags=tags, run_name=run_name).info.run_id
        self._log_params(run_id, params)
        self.run_id = run_id

    def _log_params(self, run_id: str, params: Mapping[str, object], known: Sequence[str] = ()) -> None:
        from mlflow.entities import Param

        named = {_name(key): value[:_PARAM_LENGTH] for key, value in flat_text(params).items()}
        rows = [Param(key, value) for key, value in named.items() if key not in known]
        for start in range(0, len(rows), _PARAMS_PER_BATCH):
            batch = rows[start : start + _PARAMS_PER_BATCH]
            self._client.log_batch(run_id, params=batch, synchronous=True)

    def _reopen(self, run: Any, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        run_id, client = run.info.run_id, self._client
        if run.info.lifecycle_stage == "deleted":
            client.restore_run(run_id)
        self._steps = {
            key: {point.step for point in client.get_metric_history(run_id, key)} for key in run.data.metrics
        }
        self._log_params(run_id, params, list(run.data.params))
        for key, value in tags.items():
            if key != PARENT and _name(key) not in run.data.tags:
                client.set_tag(run_id, _name(key), value[:_TAG_LENGTH])
        client.update_run(run_id, status="RUNNING")
        self.run_id = run_id

    def _set_tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.run_id, key, value)

    def _save_model(self, module: nn.Module, folder: Path) -> None:
        """Save a module as MLflow keeps it; leave no folder if that fails."""
        try:
            save_module(module, folder, self.run_id)
        except Exception as error:
            self._warn(f"MLflow gets no model, for it cannot be saved: {one_line(str(error))}")
            rmtree(folder, ignore_errors=True)

    def _log_model(self, folder: Path) -> None:
        log_model(self._client, str(self.run_id), folder)

    def _ship(self, file: Path, to: str | None) -> None:
        self._client.log_artifact(self.run_id, str(file), to)

    # ── what becomes of them ─────────────────────────────────────────────────────────────────────────────

    def _submit(self, call: Callable[[], object]) -> Future[None]:
        """Queue a call for the thread; it is made if the ones before it have all gone well."""

        def guarded() -> None:
            if self._is_on:
                try:
                    reach(self._uri)
                    call()
                except Exception as error:
                    self._give_up(str(error))

        assert self._lane is not None
        return self._lane.submit(guarded)

    def _await(self, future: Future[None], seconds: float) -> None:
        if not wait([future], seconds).done:
            self._give_up(f"did not answer within {seconds:.0f} s")

    def _give_up(self, reason: str) -> None:
        if self._is_on:
            self._is_on = False
            self._warn(f"MLflow {named(self._uri, reason)}; tracking is off for the rest of this run")

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        logger.warning(text)


def parent_run(
    store: Store,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, object],
    resume: str | None = None,
) -> str | None:
    """Start the run that a sweep's trials belong to, or continue it; return its id.

    None where nothing is tracked.
    """
    tracker = MLflowTracker(store, run_name=name, params=params, tags=tags, resume=resume)
    tracker.close()
    return tracker.run_id


def finish_parent(
    store: Store,
    run_id: str | None,
    status: RunStatus,
    artifacts: Sequence[Path] = (),
    tags: Mapping[str, str] | None = None,
    report: RoundReport | None = None,
) -> bool:
    """End a run in MLflow, with artifacts, and with tags and metrics of its outcome.

    Returns:
        Whether MLflow took all of it.
    """
    if run_id is None:
        return False
    tracker = MLflowTracker(store, run_name="", params=None, tags={}, resume=run_id)
    tracker.tag(tags or {})
    if report is not None:
        tracker.log_round(report)
    tracker.finish(status, artifacts)
    return tracker.is_complete


def _files(paths: Sequence[Path]) -> Iterator[tuple[Path, str | None]]:
    """Yield each file with the folder where it goes among the artifacts, None for the top."""
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    yield file, file.parent.relative_to(path.parent).as_posix()
        elif path.is_file():
            yield path, None


def _name(key: str) -> str:
    """Return `key` if MLflow accepts it as a name; otherwise an accepted name that no other key gets."""
    clean = re.sub(r"[^\w.\- :/]", "_", key)
    norm = posixpath.normpath(clean)
    if clean == key and norm == key != "." and not key.startswith(("/", "..")) and len(key) <= _NAME_LENGTH:
        return key
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{re.sub(r'^[.]+|/', '_', clean)[: _NAME_LENGTH - 9]}-{digest}"
