"""Objects in a store (S3, Google's), through pyarrow's file systems: whole, within a time limit, one error.

A name has its old contents or its new ones, never a part: S3 and Google's store show an object when its
upload is complete, and list it from then on.
"""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from fedray.config.places import KEY, SECRET, Place
from fedray.errors import RunError

ANSWER_S = 20.0
"""Seconds that a store has for one answer; for each `PIECE` of a large object."""

PIECE = 8_000_000
"""Bytes that are read, sent and received at once."""

CONNECT_S, TRIES = 5.0, 2

T = TypeVar("T")


class StoreError(RunError):
    """A store that does not answer, or refuses."""


class Missing(StoreError):
    """An object, or a bucket, that is not there."""


@dataclass(frozen=True)
class Found:
    """An object of a listing.

    Args:
        name: below the place that was listed.
        size: in bytes.
        written_at: seconds, by the store's clock.
    """

    name: str
    size: int
    written_at: float


class Objects:
    """The objects below a place.

    Args:
        place: where they are.
        system: pyarrow's file system; None: that of the place.
        answer_s: seconds for one answer.
    """

    def __init__(self, place: Place, system: Any = None, answer_s: float = ANSWER_S) -> None:
        self.place, self.answer_s = place, answer_s
        self._system = system

    def below(self, *names: str) -> "Objects":
        """Return the objects below a place that is below this one."""
        return Objects(self.place.below(*names), self._opened(), self.answer_s)

    def check(self) -> None:
        """Ask the store whether it can be used.

        Raises:
            StoreError: if it does not answer, has no such bucket, or the place is an object.
        """
        with self._answering():
            bucket = self._within(lambda: self._info(self.place.bucket))
            if bucket.type.name == "NotFound":
                raise Missing(f"{self.place}: there is no bucket {self.place.bucket!r} that we may see")
            if self.place.prefix and self._within(lambda: self._info(self.place.key)).is_file:
                raise StoreError(f"{self.place}: is an object, not a place where objects can be put")

    def put(self, name: str, contents: bytes | Path, size: int | None = None) -> None:
        """Write an object.

        Args:
            name: below the place.
            contents: bytes, or a file to read them from.
            size: bytes of the file to read, from its start; None: all.

        Raises:
            StoreError: if the store did not take all of it; then it has the old contents.
            OSError: if the file cannot be read.
        """
        with self._answering(name):
            stream = self._within(lambda: self._opened().open_output_stream(self._key(name)))
            for piece in _pieces(contents, size):
                self._within(lambda piece=piece: stream.write(piece))  # type: ignore[misc]
            self._within(stream.close)

    def get(self, name: str) -> bytes:
        """Return the contents of a small object.

        Raises:
            Missing: if it is not there.
            StoreError: if the store does not give it.
        """
        return b"".join(self.pieces(name))

    def pieces(self, name: str) -> Iterator[bytes]:
        """Yield the contents of an object, some megabytes at a time.

        Raises:
            Missing: if it is not there.
            StoreError: if the store does not give it.
        """
        with self._answering(name):
            stream = self._within(lambda: self._opened().open_input_stream(self._key(name)))
        while True:
            with self._answering(name):
                piece = self._within(lambda: stream.read(PIECE))
            if not piece:
                return
            yield piece

    def find(self, name: str) -> Found | None:
        """Return an object, without its contents; None if it is not there.

        Raises:
            StoreError: if the store does not answer.
        """
        with self._answering(name):
            info = self._within(lambda: self._info(self._key(name)))
        return _found(info, name) if info.is_file else None

    def listed(self, folder: str) -> list[Found]:
        """Return the objects below a name, in order; none if there are none.

        Raises:
            StoreError: if the store does not answer.
        """
        from pyarrow.fs import FileSelector

        top = self._key(folder)
        selector = FileSelector(top, recursive=True, allow_not_found=True)
        with self._answering(folder):
            infos = self._within(lambda: self._opened().get_file_info(selector))
        found = [_found(info, info.path.removeprefix(f"{top}/")) for info in infos if info.is_file]
        return sorted(found, key=lambda one: one.name)

    def folders(self) -> list[str]:
        """Return the names right below the place that have objects below them, in order.

        Raises:
            StoreError: if the store does not answer.
        """
        from pyarrow.fs import FileSelector

        selector = FileSelector(self.place.key, allow_not_found=True)
        with self._answering():
            infos = self._within(lambda: self._opened().get_file_info(selector))
        return sorted(info.base_name for info in infos if not info.is_file)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there.

        Raises:
            StoreError: if the store refuses.
        """
        try:
            with self._answering(name):
                self._within(lambda: self._opened().delete_file(self._key(name)))
        except Missing:
            pass

    # ── calls
    # ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _key(self, name: str) -> str:
        return f"{self.place.key}/{name}"

    def _info(self, key: str) -> Any:
        (info,) = self._opened().get_file_info([key])
        return info

    def _opened(self) -> Any:
        if self._system is None:
            self._system = _system(self.place)
        return self._system

    def _within(self, call: Callable[[], T]) -> T:
        return within(self.answer_s, call)

    @contextmanager
    def _answering(self, name: str = "") -> Iterator[None]:
        where = f"{self.place}: {name}: " if name else f"{self.place}: "
        try:
            yield
        except FileNotFoundError as error:
            raise Missing(f"{where}is not there") from error
        except TimeoutError as error:
            raise StoreError(f"{self.place}: no answer within {self.answer_s:g} s") from error
        except OSError as error:
            text = str(error)
            kind = Missing if "NO_SUCH_BUCKET" in text else StoreError
            raise kind(f"{self.place}: {_reason(text, self.place)}") from error


def within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` returns in another thread, so that a signal can interrupt the wait for it.

    Raises:
        TimeoutError: after so many seconds; then the call is left behind.
    """
    done = threading.Event()
    outcome: list[T] = []
    raised: list[BaseException] = []

    def work() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            raised.append(error)
        done.set()

    threading.Thread(target=work, name="fedray-store", daemon=True).start()
    if not done.wait(seconds):
        raise TimeoutError
    if raised:
        raise raised[0]
    return outcome[0]


def _system(place: Place) -> Any:
    """Return pyarrow's file system of a place."""
    from pyarrow import fs

    options: dict[str, Any] = dict(place.options)
    if place.scheme == "gs":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=CONNECT_S), **options)
    return fs.S3FileSystem(
        connect_timeout=CONNECT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=TRIES),
        allow_delayed_open=True,  # a small object is a single PUT
        background_writes=False,
        **options,
    )


def _pieces(contents: bytes | Path, size: int | None) -> Iterator[bytes]:
    if isinstance(contents, bytes):
        yield contents
        return
    left = contents.stat().st_size if size is None else size
    with open(contents, "rb") as file:
        while left > 0 and (piece := file.read(min(PIECE, left))):
            left -= len(piece)
            yield piece


def _found(info: Any, name: str) -> Found:
    return Found(name, int(info.size or 0), float((info.mtime_ns or 0) / 1e9))


_REASONS = (
    ("NO_SUCH_BUCKET", "there is no such bucket"),
    ("NETWORK_CONNECTION", "the store does not answer"),
    ("INVALID_ACCESS_KEY_ID", "the store refuses our login"),
    ("SIGNATURE_DOES_NOT_MATCH", "the store refuses our login"),
    ("ACCESS_DENIED", "the store refuses our login, or forbids this"),
)


def _reason(text: str, place: Place) -> str:
    """Return why a store refused, in few words, from pyarrow's message."""
    detail = re.sub(r"\s+", " ", text.partition("AWS Error ")[2] or text)
    detail = re.sub(r" \(Request ID: [^)]*\)|; Details: .*$", "", detail)
    for word, reason in _REASONS:
        if word in text:
            login = f"; {KEY} and {SECRET} hold the login" if "login" in reason else ""
            return f"{reason} ({detail.partition(': ')[2] or detail}){login}"
    return detail
