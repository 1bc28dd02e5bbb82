"""`storage`: the folder, or the place in an object store, under which runs and sweeps are kept.

    runs · /mnt/shared/runs · file:///mnt/shared/runs           a folder, which all nodes see
    s3://BUCKET/PREFIX?region=… · gs://BUCKET/PREFIX            a place in S3, or in Google's store
    s3://BUCKET/PREFIX?endpoint_override=http://HOST:PORT       any other server that speaks S3

A login in an address (`s3://KEY:SECRET@BUCKET`) is taken out of it, so that it is written nowhere.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from fedray.config.uri import without_password
from fedray.durable import local_path
from fedray.errors import ConfigError, nearest

KEY, SECRET, SESSION = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"
"""Environment variables for the login of S3."""

OPTIONS = {"s3": ("endpoint_override", "region", "scheme"), "gs": ("endpoint_override", "scheme")}
"""Scheme → options that an address may have after its `?`: those of pyarrow's file systems."""

_SAME = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}
_ALLOWED = (
    "a folder, file:///<folder>, s3://<bucket>/<prefix>, gs://<bucket>/<prefix>; for another server that "
    "speaks S3: s3://<bucket>/<prefix>?endpoint_override=http://<host>:<port>"
)


@dataclass(frozen=True)
class Place:
    """A place in an object store.

    Args:
        scheme: `s3` or `gs`.
        bucket: the bucket.
        prefix: what the names of objects begin with, without slashes at its ends.
        options: name → value, of those in `OPTIONS`.
    """

    scheme: str
    bucket: str
    prefix: str = ""
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str, key: str = "storage") -> Self:
        """Read the address of a place; a login in it goes to the environment variables of S3.

        Raises:
            ConfigError: if it is no such address, with the allowed ones.
        """
        scheme, _, _ = text.partition("://")
        scheme = _SAME.get(scheme.lower(), scheme.lower())
        reason = _fault(text, scheme)
        if reason:
            raise ConfigError(f"{key}: {_shown(text)!r}: {reason} Allowed: {_ALLOWED}")
        parts = urlsplit(text)
        login, _, bucket = parts.netloc.rpartition("@")
        if login:
            _take(login)
        options = tuple(sorted(parse_qsl(parts.query)))
        return cls(scheme, bucket, unquote(parts.path).strip("/"), options)

    def below(self, *names: str) -> Self:
        """Return a place below this one."""
        return replace(self, prefix="/".join(part for part in (self.prefix, *names) if part))

    @property
    def name(self) -> str:
        """The last part of its address."""
        return self.prefix.rpartition("/")[2] or self.bucket

    @property
    def key(self) -> str:
        """Bucket and prefix, as pyarrow wants them."""
        return "/".join(part for part in (self.bucket, self.prefix) if part)

    def __str__(self) -> str:
        """Return the address, without a login."""
        query = f"?{urlencode(self.options, safe=':/')}" if self.options else ""
        return f"{self.scheme}://{quote(self.key)}{query}"


def is_place(text: object) -> bool:
    """Tell whether a text is an address (`scheme://…`) and not the path of a folder."""
    return isinstance(text, str) and "://" in text and not text.lower().startswith("file://")


def absolute_place(text: str) -> str:
    """Return `storage` so that it means the same from any directory: an absolute path, or an address.

    Raises:
        ConfigError: if it is neither, with the allowed forms.
    """
    if is_place(text):
        return str(Place.parse(text))
    return str(folder_of(text))


def folder_of(text: str) -> Path:
    """Return the folder that a path or a `file://` address names.

    Raises:
        ConfigError: if it names none.
    """
    if not text.lower().startswith("file:"):
        if text[:4].lower() in ("s3:/", "gs:/"):  # a path that was made of an address lost a slash
            raise ConfigError(f"storage: {_shown(text)!r}: an address needs two slashes. Allowed: {_ALLOWED}")
        if re.match(r"[^/@]*(:|%3a)[^@]*@", text, re.IGNORECASE):
            reason = "an address with a login begins with s3://; a folder with : and @ in its name with ./."
            raise ConfigError(f"storage: {_shown(text)!r}: {reason} Allowed: {_ALLOWED}")
        return local_path(text)
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query:
        reason = "a file address has three slashes and an absolute path, without a host or a ?."
        raise ConfigError(f"storage: {_shown(text)!r}: {reason} Allowed: {_ALLOWED}")
    return local_path(unquote(parts.path))


def _shown(text: str) -> str:
    """Return an address that is refused: without its login and the values of its options."""
    text = re.sub("%40", "@", text, flags=re.IGNORECASE)
    address, mark, options = without_password(text).partition("?")
    names = [f"{option.partition('=')[0]}=…" for option in options.split("&")]
    return address + mark + ("&".join(names) if mark else "")


def _take(login: str) -> None:
    user, _, secret = login.partition(":")
    os.environ[KEY], os.environ[SECRET] = unquote(user), unquote(secret)
    os.environ.pop(SESSION, None)  # it belongs to another login


def _fault(text: str, scheme: str) -> str:
    """Return why a text is no address of a place; empty if it is one."""
    if scheme not in OPTIONS:
        return f"unknown scheme {scheme!r}{nearest(scheme, (*OPTIONS, 'file'))}"
    try:
        parts = urlsplit(text)
        options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        return "it cannot be read: options are NAME=VALUE, with & between them."
    login, at, bucket = parts.netloc.rpartition("@")
    if "@" in text.replace(parts.netloc, "", 1):
        return "an @ that ends no login: in a key or secret write / ? # @ as %2F %3F %23 %40."
    if at and not _is_login(login, scheme):
        return (
            f"its login is KEY:SECRET, both given; or set {KEY} and {SECRET} and leave it out."
            if scheme == "s3"
            else "it takes no login: set GOOGLE_APPLICATION_CREDENTIALS and leave it out."
        )
    return _fault_of_bucket(bucket, parts.path, parts.fragment) or _fault_of_options(scheme, options)


def _is_login(login: str, scheme: str) -> bool:
    user, _, secret = login.partition(":")
    return bool(user and secret) and scheme == "s3"


def _fault_of_bucket(bucket: str, path: str, fragment: str) -> str:
    if not bucket:
        return "it names no bucket."
    if ":" in bucket:
        return "a bucket has no port; the server goes into the options: ?endpoint_override=http://HOST:PORT."
    if fragment or any(part in (".", "..") for part in unquote(path).split("/")):
        return "a prefix has no # and no part that is . or .. in it."
    return ""


def _fault_of_options(scheme: str, options: list[tuple[str, str]]) -> str:
    for name, value in options:
        if name not in OPTIONS[scheme]:
            known = ", ".join(OPTIONS[scheme])
            login = f" A login is taken from {KEY} and {SECRET}." if scheme == "s3" else ""
            return f"unknown option {name!r}{nearest(name, OPTIONS[scheme])} Known: {known}.{login}"
        if not value:
            return f"its option {name} has no value."
        if name == "endpoint_override" and "@" in value:
            return f"its endpoint_override has a login: set {KEY} and {SECRET}, and leave it out."
        if name == "scheme" and value not in ("http", "https"):
            return "its option scheme must be http or https."
    if len({name for name, _ in options}) < len(options):
        return "it gives an option twice."
    return ""
