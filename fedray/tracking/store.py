"""The store of an MLflow: reached, or made ready with its database and its experiment.

`prepare_store` is called once, in the driver; the `Store` that it returns goes to the trials. Nothing here
touches MLflow's global state (tracking URI, active run).
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedray.config.uri import SQLITE, check_uri, database_of, sqlite_uri, without_password
from fedray.tracking.lane import THREAD, Lane
from fedray.tracking.moved import ARTIFACTS, follow

logger = logging.getLogger(__name__)

ANSWER_S = 10.0
"""Timeout in seconds for connecting at the start and for flushing at the end."""
OPEN_S = 60.0
"""Timeout in seconds for creating or opening an SQLite file; it takes about a second on an idle machine."""
PROBE_S = 3.0
"""Timeout in seconds for a server's first answer."""


@dataclass(frozen=True)
class Store:
    """Where runs are tracked. Pickles, so that the driver can hand it to trials.

    Args:
        uri: as MLflow takes it, with an absolute path; `none` tracks nothing.
        experiment_id: None where nothing is tracked.
        problem: why nothing is tracked although it was asked for.
    """

    uri: str
    experiment_id: str | None = None
    problem: str | None = None


def prepare_store(uri: str, experiment: str) -> Store:
    """Make the store ready: its folder, database and experiment. Once, in the driver, before any trial.

    Calling it again changes nothing. Artifacts of an SQLite store are kept beside the database, in
    `mlartifacts`; those of a server go where the server wants them.

    Args:
        uri: as in `check_uri`; a relative path counts from the working directory.
        experiment: name of the experiment that holds the runs.

    Returns:
        The store; if it could not be prepared, a store that tracks nothing and names its `problem`.

    Raises:
        ConfigError: as `check_uri`.
    """
    if check_uri(uri) == "none":
        return Store(uri)
    artifacts = None
    if uri.startswith(SQLITE):
        database = database_of(uri).expanduser().resolve()
        uri, artifacts = sqlite_uri(database), (database.parent / ARTIFACTS).as_uri()
    import_mlflow(uri)
    lane, limit_s = Lane(), opening_s(uri)
    try:
        experiment_id = lane.submit(lambda: _open_experiment(uri, experiment, artifacts)).result(limit_s)
    except Exception as error:
        reason = f"did not answer within {limit_s:.0f} s" if isinstance(error, TimeoutError) else str(error)
        problem = f"MLflow {named(uri, reason)}; runs are kept in their own files only"
        logger.warning(problem)
        return Store(uri, problem=problem)
    finally:
        lane.close()
    return Store(uri, experiment_id)


def import_mlflow(uri: str) -> None:
    """Import MLflow, which takes seconds, unless `uri` is none; keep it quiet in our threads."""
    if uri == "none":
        return
    import_quietly("mlflow.store.tracking.sqlalchemy_store" if uri.startswith(SQLITE) else "mlflow")
    for name in ("mlflow.store.db.utils", "mlflow.pytorch", "urllib3.connectionpool"):
        logging.getLogger(name).addFilter(_is_not_ours)


def import_quietly(*modules: str) -> None:
    """Import modules of MLflow 3.17 without its import warnings. Call from the main thread only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*Any type hint is inferred as AnyType", UserWarning)
        for module in modules:
            import_module(module)


def _is_not_ours(record: logging.LogRecord) -> bool:
    """Drop MLflow's log records in our threads: we report a failure once."""
    return record.threadName != THREAD


def opening_s(uri: str) -> float:
    return OPEN_S if uri.startswith(SQLITE) else ANSWER_S


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def reach(uri: str) -> None:
    """Check that the store answers; MLflow itself would retry a dead server for four minutes.

    Raises:
        ConnectionError: if it is not.
    """
    if uri.startswith(SQLITE):
        if not database_of(uri).is_file():
            # or a trial on another machine would quietly create another database there
            raise ConnectionError("is not on this machine; trials on several machines need a server")
        return
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    probe = {"max_retries": 0, "raise_on_status": False, "timeout": PROBE_S}
    status = http_request(get_default_host_creds(uri), "/health", "GET", **probe).status_code
    if status >= 500:
        raise ConnectionError(f"answers with status {status}")


def _open_experiment(uri: str, name: str, artifacts: str | None) -> str:
    """Return the id of the experiment; create it if it is missing."""
    if artifacts is not None:
        _create_database(database_of(uri), artifacts)
        follow(database_of(uri))
    reach(uri)
    client = client_of(uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except Exception:
            # another process may have created it in between
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    if found.lifecycle_stage != "active":
        raise ConnectionError(f"has deleted the experiment {name!r}; restore it, or set tracking.experiment")
    return str(found.experiment_id)


def _create_database(path: Path, artifacts: str) -> None:
    """Make an empty MLflow database, unless there is one.

    It is made under another name and then linked into place, whole: two processes in MLflow's migration of
    the same fresh file leave it broken for good.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{uuid4().hex}.{path.name}")
    try:
        with _no_syncs(fresh):
            SqlAlchemyStore(sqlite_uri(fresh), artifacts).engine.dispose()
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        try:
            os.link(fresh, path)
        except FileExistsError:
            pass  # another process was faster; its database is as good
        except OSError:
            fresh.replace(path)  # a file system without hard links
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def _no_syncs(path: Path) -> Iterator[None]:
    """Let SQLite write a new database without waiting for the disk after each of some hundred statements."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    def connected(connection: Any, record: object) -> None:
        if any(file == str(path) for _, _, file in connection.execute("PRAGMA database_list")):
            connection.execute("PRAGMA synchronous=OFF")
            connection.execute("PRAGMA journal_mode=MEMORY")

    event.listen(Engine, "connect", connected)
    try:
        yield
    finally:
        event.remove(Engine, "connect", connected)


def named(uri: str, reason: str) -> str:
    """Name a store and its problem, in one line and without the password that a URI may hold."""
    return f"({without_password(uri)}) {one_line(without_password(uri, reason))}"


def one_line(text: str) -> str:
    """Return a text of any length as one line of at most 300 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"
