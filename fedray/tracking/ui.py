"""The command that shows a store in the browser."""

import sys

from fedray.config.uri import SQLITE, check_uri, database_of, sqlite_uri, without_password
from fedray.errors import ConfigError
from fedray.tracking.moved import ARTIFACTS, follow


def ui_command(uri: str, port: int) -> list[str]:
    """Return the command that shows a store in the browser, at http://127.0.0.1:<port>.

    Args:
        uri: an SQLite store; a server has its own UI.
        port: in [1, 65535].

    Raises:
        ConfigError: if the store is a server, `none` or does not exist yet.
    """
    if not check_uri(uri).startswith(SQLITE):
        hint = "nothing is tracked" if uri == "none" else "that server shows its runs itself, at its address"
        raise ConfigError(f"tracking.uri: {without_password(uri)!r}: {hint}; the UI needs an SQLite store")
    database = database_of(uri).expanduser().resolve()
    if not database.is_file():
        raise ConfigError(f"tracking.uri: {uri!r}: there is no {database}; run something first")
    follow(database)
    # otherwise it starts eight worker processes for jobs that we never submit, about 1 GB in all
    command = ["env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", sys.executable, "-m", "mlflow", "server"]
    command += ["--backend-store-uri", sqlite_uri(database)]
    command += ["--artifacts-destination", (database.parent / ARTIFACTS).as_uri()]
    return [*command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
