"""A run as MLflow sees it: one parent for a sweep, one child for each trial, its metrics round by round.

Each trial opens an `MLflowTracker` on the driver's `Store`. A run's own files are the truth and are written
elsewhere; tracking never stops a run, and a run never waits for a round to arrive. A thread sends what the
store lacks, in order, and again after an outage (`sender`). Each point arrives once, also if an answer was
lost (`sent`).

Nothing here touches MLflow's global state (active run): client and run id are explicit.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import nn

from fedray.config.trees import flat_text
from fedray.tracking import store as stores
from fedray.tracking.logged_model import log_model, save_module
from fedray.tracking.points import MOST_IN_A_CALL, Group, Points
from fedray.tracking.sender import Refused, Sender
from fedray.tracking.sent import SENT, SentPoints
from fedray.tracking.shipping import files_of, name_of
from fedray.tracking.store import (
    Store,
    client_of,
    import_mlflow,
    import_quietly,
    named,
    one_line,
    open_experiment,
    opening_s,
    reach,
    refusals,
)
from fedray.types import RoundReport

logger = logging.getLogger(__name__)

SHIPPED_BYTES_PER_S = 1e6
"""Artifacts lengthen the wait at the end by their size over this rate."""

PARENT = "mlflow.parentRunId"
"""MLflow's tag for the run that another belongs to."""
MARK = "fedray.mark"
"""Tag by which a run is found whose creation was not answered."""

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
OnOpen = Callable[[str, str], None]
"""Called in the thread with the ids of the experiment and the run once the store has the run."""

_PARAM_LENGTH, _TAG_LENGTH, _PARAMS_PER_BATCH = 6000, 5000, 100  # MLflow's limits


class MLflowTracker:
    """One run in MLflow. Where nothing is tracked, every method does nothing.

    While the store fails, calls wait in a queue; the first failure leaves a warning, which is dropped if the
    store takes everything before the end. Rounds that wait together are sent together.

    Args:
        store: from `prepare_store`.
        run_name: the run's name in the UI.
        params: nested config; logged once, under dotted names such as `method.density`. None: only a run that
            is there is continued, and none is made.
        tags: see `provenance.run_tags`.
        parent_run_id: the sweep that the run belongs to.
        resume: id of a run to continue instead of starting one, if the store has it; if it is deleted, it is
            restored. Its params and tags stay, missing ones are added, and no point is logged twice.
        answer_s: how long to wait for an answer at the start and at the end, in seconds; None: ANSWER_S.
        folder: directory where points are noted before they are sent; None: nowhere.
        on_open: see `OnOpen`.
        is_running: whether the run has rounds to come, so that MLflow shows it as RUNNING.

    Attributes:
        run_id: None until MLflow has given one.
        is_complete: whether the run has ended and the store has taken everything.
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
        folder: Path | None = None,
        on_open: OnOpen | None = None,
        is_running: bool = True,
    ) -> None:
        self.run_id: str | None = None
        self.is_complete = False
        self._told: list[str] = []
        self._store, self._uri, self._wait_s = store, store.uri, answer_s
        self._outage: str | None = store.problem
        self._sender: Sender | None = None
        self._points: Points | None = None
        if store.uri == "none":
            return
        import_mlflow(self._uri)
        if parent_run_id is not None:
            tags = {**tags, PARENT: parent_run_id}
        self._sent = SentPoints(folder / SENT if folder is not None else None)
        self._is_uncertain = not self._sent.is_new and resume is None
        self._on_open, self._is_running = on_open, is_running
        self._points = Points(self._send, self._steps_of, self._sent)
        self._sender = Sender(self._on_failure, self._on_answer)
        self._resume = resume
        self._sender.add(partial(self._open, run_name, params, tags))
        if store.problem is None:
            limit_s = answer_s or opening_s(self._uri)
            problem = self._sender.wait(limit_s, limit_s, grace_s=0.0)
            if problem is not None and self._outage is None:
                self._on_failure(ConnectionError(problem))

    @property
    def warnings(self) -> list[str]:
        """Warnings on the run, for its readers."""
        return self._told if self._outage is None or self.is_complete else [*self._told, self._outage]

    @property
    def points(self) -> int:
        """How many metric values were logged."""
        return 0 if self._points is None else self._points.count

    def log_round(self, report: RoundReport) -> None:
        """Queue the finite metrics of a round, with the round as step. Does not wait."""
        if self._sender is None or self._points is None:
            return
        metrics = {name_of(key): float(v) for key, v in report.metrics.items() if math.isfinite(v)}
        keys = list(metrics)
        for start in range(0, len(keys), MOST_IN_A_CALL):
            part = {key: metrics[key] for key in keys[start : start + MOST_IN_A_CALL]}
            if self._points.add(Group(report.round, part)):
                self._call(self._points.send)

    def log_inputs(self, inputs: Sequence[Any]) -> None:
        """Name the data sets of the run. Does not wait."""
        if inputs:
            self._call(lambda: self._client.log_inputs(self.run_id, datasets=list(inputs)))

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags, new ones and others. Does not wait."""
        for key, value in tags.items():
            self._call(partial(self._set_tag, name_of(key), value[:_TAG_LENGTH]))

    def finish(
        self,
        status: RunStatus,
        artifacts: Sequence[Path] = (),
        model: Callable[[], nn.Module] | None = None,
    ) -> None:
        """End the run, and ship the artifacts and the model.

        Waits as long as the store answers, each time within ANSWER_S, but at most END_S and the time of the
        artifacts.

        Args:
            status: how it ended.
            artifacts: files, and folders with all that is in them; those that do not exist are passed over.
            model: called only for a tracked run; `mlflow.pytorch.load_model` loads the module from
                `runs:/<run_id>/model`.
        """
        if self._sender is not None:
            self._end(self._sender, status, artifacts, model)
        self.close()

    def _end(
        self,
        sender: Sender,
        status: RunStatus,
        artifacts: Sequence[Path],
        model: Callable[[], nn.Module] | None,
    ) -> None:
        with TemporaryDirectory() as folder:
            saved = Path(folder, "model")
            self._call(partial(self._terminate, status))
            if model is not None:
                import_quietly("mlflow.pyfunc", "mlflow.pytorch")
                self._call(partial(self._save_model, model, saved))
            shipped_bytes = sum(file.stat().st_size for file, _ in files_of(artifacts))
            for file, to in files_of(artifacts):
                self._call(partial(self._ship, file, to))
            if model is not None:
                self._call(partial(self._log_model, saved))
            most_s = stores.END_S if self._wait_s is None else 10 * self._wait_s
            problem = sender.wait(self._answer_s, most_s + shipped_bytes / SHIPPED_BYTES_PER_S)
            self.is_complete = problem is None and not sender.refused
            if problem is not None and self._outage is None:
                self._on_failure(ConnectionError(problem))
            if self.is_complete:
                self._sent.remove()

    def settle(self) -> None:
        """Wait until the store has taken what was queued, as at the end of a run."""
        if self._sender is not None:
            self._sender.wait(self._answer_s, stores.END_S)

    def close(self) -> None:
        """Stop tracking, and leave the run in MLflow as it is."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    @property
    def _answer_s(self) -> float:
        return stores.ANSWER_S if self._wait_s is None else self._wait_s

    @property
    def _client(self) -> Any:
        return client_of(self._uri)

    # ── calls of the thread ──────────────────────────────────────────────────────────────────────────────

    def _call(self, call: Callable[[], object]) -> None:
        """Queue a call that may be repeated."""
        if self._sender is not None:
            self._sender.add(partial(self._made, call))

    def _made(self, call: Callable[[], object]) -> None:
        if self.run_id is None:
            return  # it could not be opened, which was told
        reach(self._uri)
        with refusals():
            call()

    def _open(
        self,
        run_name: str,
        params: Mapping[str, object] | None,
        tags: Mapping[str, str],
    ) -> None:
        reach(self._uri)
        experiment_id = self._store.experiment_id or open_experiment(self._uri, self._store.experiment)
        found = self._find(self._resume) if self._resume is not None else None
        if found is None and self._is_uncertain:
            found = next(iter(self._marked(experiment_id)), None)
        if found is None and params is None:
            raise Refused(f"has no run {self._resume}")
        if found is None:
            was_uncertain, self._is_uncertain = self._is_uncertain, True
            found = self._create(experiment_id, run_name, tags)
            self._is_uncertain = was_uncertain  # the store has answered
        self._resume = str(found.info.run_id)  # if a later request fails, this run is found again
        self._reopen(found, params or {}, tags)
        assert self._points is not None
        # with steps; `run.data.metrics` has values only
        self._points.latest = {metric.key: int(metric.step) for metric in found.data._metric_objs}
        self.run_id = str(found.info.run_id)
        if self._on_open is not None and self._sender is not None:
            self._sender.unless_closed(partial(self._on_open, str(found.info.experiment_id), self.run_id))

    def _find(self, run_id: str) -> Any:
        """Return a run of the store, a deleted one too; None if it has none of this id."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _marked(self, experiment_id: str) -> list[Any]:
        """Return the runs that carry this run's mark, the oldest first."""
        found = self._client.search_runs([experiment_id], f"tags.`{MARK}` = '{self._sent.mark}'")
        return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def _create(self, experiment_id: str, run_name: str, tags: Mapping[str, str]) -> Any:
        own = {name_of(key): value[:_TAG_LENGTH] for key, value in tags.items()} | {MARK: self._sent.mark}
        return self._client.create_run(experiment_id, tags=own, run_name=run_name)

    def _log_params(self, run_id: str, params: Mapping[str, object], known: Sequence[str] = ()) -> None:
        from mlflow.entities import Param

        named = {name_of(key): value[:_PARAM_LENGTH] for key, value in flat_text(params).items()}
        rows = [Param(key, value) for key, value in named.items() if key not in known]
        for start in range(0, len(rows), _PARAMS_PER_BATCH):
            batch = rows[start : start + _PARAMS_PER_BATCH]
            self._client.log_batch(run_id, params=batch, synchronous=True)
            self._beat()

    def _reopen(self, run: Any, params: Mapping[str, object], tags: Mapping[str, str]) -> None:
        """Add the params and tags that a run lacks."""
        run_id, client = run.info.run_id, self._client
        if run.info.lifecycle_stage == "deleted":
            client.restore_run(run_id)
        self._log_params(run_id, params, list(run.data.params))
        for key, value in tags.items():
            if key != PARENT and name_of(key) not in run.data.tags:
                client.set_tag(run_id, name_of(key), value[:_TAG_LENGTH])
                self._beat()
        if self._is_running and run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")

    def _send(self, rows: Sequence[tuple[int, str, float, int]]) -> None:
        """Log points given as step, key, value and time in milliseconds."""
        from mlflow.entities import Metric

        if self._sender is None:
            raise ConnectionError("the run has ended")
        batch = [Metric(key, value, time_ms, step) for step, key, value, time_ms in rows]
        with refusals():
            self._client.log_batch(self.run_id, metrics=batch, synchronous=True)
        self._beat()

    def _steps_of(self, key: str) -> set[int]:
        found = {int(point.step) for point in self._client.get_metric_history(self.run_id, key)}
        self._beat()
        return found

    def _set_tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.run_id, key, value)

    def _terminate(self, status: RunStatus) -> None:
        if self._is_uncertain:  # its creation may have been carried out twice
            run = self._find(str(self.run_id))
            for other in self._marked(run.info.experiment_id):
                if other.info.run_id != self.run_id:
                    self._client.delete_run(other.info.run_id)
        self._client.set_terminated(self.run_id, status)

    def _save_model(self, model: Callable[[], nn.Module], folder: Path) -> None:
        try:
            save_module(model(), folder, self.run_id)
        except Exception as error:
            self._warn(f"MLflow gets no model, for it cannot be saved: {one_line(str(error))}")
            rmtree(folder, ignore_errors=True)

    def _log_model(self, folder: Path) -> None:
        if folder.is_dir():
            log_model(self._client, str(self.run_id), folder, self._beat)

    def _ship(self, file: Path, to: str | None) -> None:
        try:
            self._client.log_artifact(self.run_id, str(file), to)
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            # a disk that fails while it is read names no file
            raise type(error)(error.errno, error.strerror, str(file)) from error

    # ── outages ──────────────────────────────────────────────────────────────────────────────────────────

    def _beat(self) -> None:
        if self._sender is not None:
            self._sender.beat()

    def _on_failure(self, error: Exception) -> None:
        reason = f"MLflow {named(self._uri, error)}"
        if isinstance(error, Refused):
            self._warn(reason)
            return
        text = f"{reason}; what it lacks is sent when it answers again"
        (logger.warning if self._outage is None else logger.info)(text)
        self._outage = self._outage or text

    def _on_answer(self) -> None:
        logger.info("MLflow (%s) answers again", self._uri)

    def _warn(self, text: str) -> None:
        self._told.append(text)
        logger.warning(text)
