"""The address of an MLflow store: which ones are allowed, and the file that an SQLite address names."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from fedray.errors import ConfigError, nearest

SQLITE = "sqlite:///"
"""An SQLite address is this and the name of a file."""

USER, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
"""MLflow's environment variables for the login of a server."""

_ALLOWED = (
    "none · sqlite:///<file> (four slashes for an absolute path) · http://<host>:<port> · https://<host>"
)


def check_uri(uri: str) -> str:
    """Return `uri` if it names a store that can be used. Touches neither disk nor network.

    Raises:
        ConfigError: if it does not, with the allowed forms.
    """
    if uri == "none" or (uri.startswith(SQLITE) and _is_file(uri.removeprefix(SQLITE))):
        return uri
    seen = without_password(uri)
    scheme, colon, _ = seen.partition(":")
    if scheme in ("http", "https"):
        reason = _wrong_address(uri)
        if not reason:
            return uri
    elif scheme == "sqlite":
        reason = "sqlite needs three slashes and the name of a file, without ? or %."
    elif seen != uri and "://" not in uri:
        reason = "the address of a server begins with http:// or https://."
    elif scheme == "file" or not colon:
        reason = "MLflow no longer keeps runs in plain folders; name an SQLite file in that folder"
        reason += nearest(seen, ("none",))
    else:
        reason = f"unknown scheme {scheme!r}{nearest(scheme, ('none', 'sqlite', 'http', 'https'))}"
        reason += " For any other database, give the address of an MLflow server in front of it."
    raise ConfigError(f"tracking.uri: {seen!r}: {reason} Allowed: {_ALLOWED}")


def absolute_uri(uri: str) -> str:
    """Return `uri` so that it names the same store from any directory; a relative path counts from this one.

    A login is taken out of it: see `take_login`.

    Raises:
        ConfigError: as `check_uri`.
    """
    if not check_uri(uri).startswith(SQLITE):
        return take_login(uri)
    try:
        return sqlite_uri(database_of(uri).expanduser().absolute())
    except RuntimeError as error:  # the home of an unknown user
        raise ConfigError(f"tracking.uri: {uri!r}: must name a file: {error}") from None


def sqlite_uri(database: Path) -> str:
    """Return the address of a database file."""
    # SQLAlchemy decodes % and cuts at ?
    return SQLITE + str(database).replace("%", "%25").replace("?", "%3F")


def database_of(uri: str) -> Path:
    """Return the file that an SQLite address names; `%25` means %, `%3F` means ?."""
    return Path(uri.removeprefix(SQLITE).replace("%3F", "?").replace("%25", "%"))


def take_login(uri: str) -> str:
    """Return an address without its user and password; MLflow's environment variables hold them from now on.

    So they are written nowhere, and processes that this one starts have them.
    """
    parts = urlsplit(uri) if uri.startswith(("http:", "https:")) else None
    if parts is None or "@" not in parts.netloc:
        return uri
    os.environ[USER], os.environ[PASSWORD] = unquote(parts.username or ""), unquote(parts.password or "")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _is_file(name: str) -> bool:
    rest = name.replace("%25", "").replace("%3F", "")
    return bool(name) and not name.endswith("/") and name != ":memory:" and not set(rest) & set("?%")


def _wrong_address(uri: str) -> str:
    """Return why the address of a server cannot be used; empty if it can."""
    try:
        parts = urlsplit(uri)
        has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        parts, has_host = urlsplit(""), False
    if "@" in uri and "@" not in parts.netloc:
        # most likely a / ? or # of a password, which would become a part of the path and be kept
        return "this address has an @ but no login: in a user or password write / ? # @ as %2F %3F %23 %40."
    if not has_host:
        return "this address has no host, or its port is not a number up to 65535."
    if "@" in parts.netloc and not (parts.username and parts.password):
        both = f"give both, or set {USER} and {PASSWORD} and leave them out."
        return f"this address has a user without a password: {both}"
    return ""


def without_password(uri: str, text: str | None = None) -> str:
    """Return a text without the user and password of an address; by default the address itself."""
    text = uri if text is None else text
    login = _login(uri)
    return text.replace(login, "") if login else text


def _login(uri: str) -> str:
    """Return what stands before the host of an address, with its @; also if it is written wrongly."""
    if re.match(r"(sqlite|file):/(?!/[^/])", uri):
        return ""  # a file
    if not re.search(":|%3a", uri, re.IGNORECASE):
        return uri[: uri.rfind("@") + 1] if "/" not in uri.partition("@")[0] else ""  # a/b@c is a file
    rest = uri.partition("://")[2] or re.sub(r"^https?:/*", "", uri)
    return rest[: rest.rfind("@") + 1]
