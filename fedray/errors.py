"""All errors of fedray, as one tree.

FedrayError
├── ConfigError         a config, an override or a command line that cannot be run (exit status 2)
├── DataError           a data set that is missing, unreadable or does not fit (exit status 2)
├── WireError           bytes that are no payload of fedray, or for another mask than the receiver's
├── MethodError         a method used something that it did not declare, or returned something malformed
├── ClientError         a client's code raised; carries the client's id and the round
└── RunError            a run that cannot continue or be resumed
"""

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches

_LOGIN = re.compile(r"""(\w:/{1,2})(?!/)[^\s'"/@]*(?::|%3A)[^\s'"]*@""", re.IGNORECASE)
_BARE_LOGIN = re.compile(r"""[^\s'"/@]+(?::(?!/)|%3A)[^\s'"]*@(?=\w)""", re.IGNORECASE)  # without http://


_SECRET = re.compile(r"(?:.*_)?(?:PASSWORD|PASSWD|SECRET|TOKEN|KEY|CREDENTIALS?)", re.IGNORECASE)
"""Names of environment variables that hold a secret; `…_KEY_ID`, `…_TOKEN_PATH` and such hold none."""
_SHORTEST = 6
"""Characters of a secret, at least: a shorter text also stands where it is none."""


def without_secrets(text: str) -> str:
    """Return a text without logins in addresses (`http://me:…@host`) and without secrets of the environment.

    Exceptions and tracebacks of a user's code may quote either; these texts are written to files and sent to
    trackers.
    """
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET.fullmatch(name):
            text = text.replace(value, f"<{name}>")
    return _LOGIN.sub(r"\1", text)


class FedrayError(Exception):
    """Anything that fedray raises on purpose. Its message has no secrets: see `without_secrets`."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(without_secrets(a) if isinstance(a, str) else a for a in arguments))


class ConfigError(FedrayError):
    """A config, an override or a command line that cannot be run.

    Its message quotes what was given; a user and password in an address are left out.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_BARE_LOGIN.sub("", without_secrets(message)))


class DataError(FedrayError):
    """A data set that is missing, unreadable or does not fit the rest of the config."""


class WireError(FedrayError):
    """Bytes that are no payload of fedray, or for another mask than the receiver's."""


class MethodError(FedrayError):
    """A method used something that it did not declare, or returned something malformed."""


class ClientError(FedrayError):
    """A client's code raised.

    Args:
        client: id of the client.
        round: round in which it happened.
        cause: the exception of the client's code, as text.
    """

    def __init__(self, client: int, round: int, cause: str) -> None:
        super().__init__(f"client {client} failed in round {round}: {cause}")
        self.client, self.round, self.cause = client, round, cause

    def __reduce__(self) -> tuple[type["ClientError"], tuple[int, int, str]]:
        """Rebuild from the three parts: exceptions cross process borders by pickle."""
        return type(self), (self.client, self.round, self.cause)


class RunError(FedrayError):
    """A run that cannot continue or be resumed."""


def nearest(given: str, allowed: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest allowed name, or a full stop if none is close."""
    match = get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else "."


def unknown(what: str, given: str, allowed: Iterable[str]) -> str:
    """Return the message for a name that a table lacks: the given name, the nearest one, and all."""
    names = sorted(allowed)
    return f"unknown {what} {given!r}{nearest(given, names)} Known: {', '.join(names)}"
