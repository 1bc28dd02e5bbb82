"""The store of an MLflow: reached, or made ready with its database and its experiment.

`prepare_store` is called once, in the driver; the `Store` that it returns goes to the trials. Nothing here
touches MLflow's global state (tracking URI, active run).
"""

import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from fedray.config.uri import SQLITE, check_uri, database_of, sqlite_uri, take_login, without_password
from fedray.tracking.moved import ARTIFACTS, follow
from fedray.tracking.sender import THREAD, Refused, Sender

logger = logging.getLogger(__name__)

ANSWER_S = 10.0
"""Timeout in seconds for connecting at the start and for flushing at the end."""
END_S = 120.0
"""The longest wait in seconds at the end of a run, while the store answers."""
OPEN_S = 60.0
"""Timeout in seconds for creating or opening an SQLite file; it takes about a second on an idle machine."""
REQUEST = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
QUIET = {"MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
"""MLflow's settings for a server, unless the user has set them. MLflow itself would repeat each request for
minutes, also one that was carried out; we ask the store before we repeat one."""

LOGIN = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD: a password in tracking.uri is not kept"


@dataclass(frozen=True)
class Store:
    """Where runs are tracked. Pickles, so that the driver can hand it to trials.

    Args:
        uri: as MLflow takes it, with an absolute path; `none` tracks nothing.
        experiment_id: None where nothing is tracked, or where the store is out of reach.
        problem: why the store could not be prepared.
        experiment: name of the experiment.
    """

    uri: str
    experiment_id: str | None = None
    problem: str | None = None
    experiment: str = ""


def prepare_store(uri: str, experiment: str) -> Store:
    """Make the store ready: its folder, database and experiment. Once, in the driver, before any trial.

    Calling it again changes nothing. Artifacts of an SQLite store are kept beside the database, in
    `mlartifacts`; those of a server go where the server wants them.

    Args:
        uri: as in `check_uri`; a relative path counts from the working directory.
        experiment: name of the experiment that holds the runs.

    Returns:
        The store; if it could not be prepared, it names its `problem`, and runs try to open it again.

    Raises:
        ConfigError: as `check_uri`.
    """
    if check_uri(uri) == "none":
        return Store(uri)
    if uri.startswith(SQLITE):
        uri = sqlite_uri(database_of(uri).expanduser().resolve())
    uri = take_login(uri)
    import_mlflow(uri)
    found: list[str] = []
    errors: list[Exception] = []
    sender, limit_s = Sender(errors.append, lambda: None), opening_s(uri)
    sender.add(lambda: found.append(open_experiment(uri, experiment, create=True)))
    problem = sender.wait(limit_s, limit_s, grace_s=0.0)
    sender.close()
    if problem is None:
        return Store(uri, found[0], experiment=experiment)
    reason = named(uri, errors[0] if errors else problem)
    problem = f"MLflow {reason}; runs are kept in their own files, and sent when it answers"
    logger.warning(problem)
    return Store(uri, problem=problem, experiment=experiment)


def import_mlflow(uri: str) -> None:
    """Import MLflow, which takes seconds, unless `uri` is none; keep it quiet in our threads."""
    if uri == "none":
        return
    if not uri.startswith(SQLITE):
        for name, value in (REQUEST | QUIET).items():
            os.environ.setdefault(name, value)
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
    """Return for how many seconds a run waits for the store at its start."""
    return OPEN_S if uri.startswith(SQLITE) else ANSWER_S


def client_of(uri: str) -> Any:
    """Return MLflow's client of a store."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


@contextmanager
def refusals() -> Iterator[None]:
    """Turn MLflow's error for a call that it will never take into Refused."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code == "INVALID_PARAMETER_VALUE":
            raise Refused(str(error)) from error
        raise


def reach(uri: str) -> None:
    """Check that a database file is there; MLflow would create it.

    Raises:
        ConnectionError: if it is not, as for a trial on another machine.
    """
    if uri.startswith(SQLITE) and not database_of(uri).is_file():
        raise ConnectionError("is not on this machine; trials on several machines need a server")


def open_experiment(uri: str, name: str, *, create: bool = False) -> str:
    """Return the id of the experiment; create it if it is missing, and the database with `create`."""
    artifacts = None
    if uri.startswith(SQLITE):
        artifacts = (database_of(uri).parent / ARTIFACTS).as_uri()
        if create:
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
    """Make an empty MLflow database, unless there is one. You alone can read it, and the artifacts beside it.

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
        fresh.chmod(0o600)
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        (path.parent / ARTIFACTS).mkdir(mode=0o700, exist_ok=True)  # they are copies of private files, too
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


def named(uri: str, reason: object) -> str:
    """Name a store and its problem, in one line and without the password that a URI may hold."""
    text = without_password(uri, _short(str(reason)))
    hint = f"; {LOGIN}" if "401" in text or "not authenticated" in text else ""
    return f"({without_password(uri)}) {one_line(text)}{hint}"


def _short(text: str) -> str:
    """Return the reason in one of the long messages of MLflow's HTTP client, or the message itself."""
    if found := re.search(r"too many (\d+) error responses", text):
        return f"answers with status {found[1]}"
    if "failed with timeout exception" in text or "Read timed out" in text:
        return "does not answer in time"
    lost = ("NewConnectionError", "Connection refused", "RemoteDisconnected", "Connection aborted")
    return "cannot be reached" if any(word in text for word in lost) else text


def one_line(text: str) -> str:
    """Return a text of any length as one line of at most 300 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"
