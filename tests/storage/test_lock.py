"""The lock of a directory: one process at a time, on this machine and on others; it ends with its process."""

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedray.errors import RunError
from fedray.overview.summary import summary
from fedray.storage import heartbeat
from fedray.storage.directory import LOCK, Lock, check_held, holder_of
from fedray.storage.run_files import RunFiles

ROOT = Path(__file__).parents[2]
ELSEWHERE = {"pid": 77, "host": "far-away", "since": "2026-01-31 12:00:00 UTC", "machine": "another"}


def left(folder: Path, who: dict[str, Any], age_s: float) -> None:
    """Leave the lock of a process that gave its last sign of life some seconds ago."""
    (folder / LOCK).write_text(json.dumps(who) + "\n")
    then = time.time() - age_s
    os.utime(folder / LOCK, (then, then))


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)


def waited(ready: Callable[[], Any]) -> bool:
    until = time.monotonic() + 10
    while not ready() and time.monotonic() < until:
        time.sleep(0.01)
    return bool(ready())


def locking(folder: Path, *, with_locks: bool = True) -> "subprocess.Popen[str]":
    """Start a process that has the lock of a directory until it is killed."""
    code = f"""
import errno, fcntl, time
from pathlib import Path
from fedray.storage.directory import Lock
def refuse(*_):
    raise OSError(errno.ENOLCK, "no locks")
if not {with_locks}:
    fcntl.lockf = refuse
with Lock(Path({str(folder)!r})):
    print("locked", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("age_s", [0.0, 40.0])
def test_a_living_process_of_another_host_keeps_others_out(tmp_path: Path, age_s: float) -> None:
    left(tmp_path, ELSEWHERE, age_s)
    with (
        pytest.raises(
            RunError,
            match=r"still running \(process 77 on far-away, since 2026-01-31 12:00:00 UTC; last sign of life "
            r"\d+ s ago: a process of another host counts as dead after 60 s\); wait for its end",
        ),
        Lock(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / LOCK).read_text()) == ELSEWHERE
    holder = holder_of(tmp_path)
    assert holder is not None and (holder.pid, holder.host, holder.is_here) == (77, "far-away", False)
    (tmp_path / "config.yaml").write_text("rounds: 3\n")
    assert summary(tmp_path).status == "running"
    (tmp_path / "config.yaml").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK]  # no probe is left


def test_a_silent_process_of_another_host_is_taken_over_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left(tmp_path, ELSEWHERE, 75.0)
    assert holder_of(tmp_path) is None
    with caplog.at_level(logging.WARNING), Lock(tmp_path):
        assert holder_of(tmp_path) is not None
    assert (
        "process 77 on far-away, since 2026-01-31 12:00:00 UTC has given no sign of life for 75 s: taken over"
        in (caplog.text)
    )


def test_patience_waits_until_a_process_of_another_host_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "SILENT_S", 0.6)
    left(tmp_path, ELSEWHERE, 0.0)
    with Lock(tmp_path, patience_s=10):
        pass


def test_clocks_of_hosts_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left(tmp_path, ELSEWHERE, 5.0)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86_400)
    with pytest.raises(RunError, match="still running"), Lock(tmp_path):
        pass


@pytest.mark.parametrize(
    "who",
    [
        {"host": "a-container", "machine": heartbeat._machine()},  # another container of this machine
        {"host": os.uname().nodename},  # an earlier version
    ],
    ids=["container", "earlier version"],
)
def test_of_a_dead_process_of_this_machine_nobody_waits_for_the_beats(
    tmp_path: Path, who: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    left(tmp_path, {"pid": 77, "since": "then"} | who, 0.0)
    with caplog.at_level(logging.WARNING), Lock(tmp_path):
        pass
    assert caplog.text == ""


@pytest.mark.parametrize("with_locks", [True, False])
def test_a_process_of_this_machine_keeps_others_out_until_it_dies(
    tmp_path: Path, with_locks: bool, request: pytest.FixtureRequest
) -> None:
    if not with_locks:
        request.getfixturevalue("no_locks")
    process = locking(tmp_path, with_locks=with_locks)
    try:
        with pytest.raises(RunError, match=rf"still running \(process {process.pid} on "), Lock(tmp_path):
            pass
    finally:
        process.kill()
        process.communicate()
    with Lock(tmp_path):
        assert holder_of(tmp_path) is not None
    assert holder_of(tmp_path) is None


def test_an_id_that_another_process_got_since_is_not_the_holder(tmp_path: Path, no_locks: None) -> None:
    me = heartbeat.signature()
    left(tmp_path, me | {"started": "1"}, 0.0)
    with Lock(tmp_path):
        pass
    left(tmp_path, me, 0.0)
    with pytest.raises(RunError, match="still running"), Lock(tmp_path):
        pass


def test_a_lock_beats_while_it_is_held_and_leaves_no_signature(tmp_path: Path, fast: None) -> None:
    with Lock(tmp_path):
        left(tmp_path, json.loads((tmp_path / LOCK).read_text()), 100.0)
        assert waited(lambda: time.time() - (tmp_path / LOCK).stat().st_mtime < 50)
    assert (tmp_path / LOCK).read_bytes() == b""


def test_who_was_taken_over_writes_nothing_more(tmp_path: Path, fast: None) -> None:
    """A suspended machine wakes up after another one has taken its run."""
    files = RunFiles.create(tmp_path / "run")
    with Lock(files.path):
        files.warn(["before"])
        check_held(files.path)
        left(files.path, ELSEWHERE, 0.0)
        with pytest.raises(RunError, match=r"far-away, since .* has taken it over, since this"):
            waited(lambda: check_held(files.path))
        with pytest.raises(RunError, match="nothing more is written"):
            files.warn(["after"])
    assert (files.path / "warnings.txt").read_text() == "before\n"
    assert json.loads((files.path / LOCK).read_text()) == ELSEWHERE  # it is the other's
    check_held(files.path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[1]", b'{"pid": 1}', b"\xff\xfe", b'{"pid":"x","host":1,"since":2}']
)
def test_a_lock_file_that_says_nothing_keeps_nobody_out_for_long(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK).write_bytes(content)
    os.utime(tmp_path / LOCK, (1, 1))
    holder_of(tmp_path)
    with Lock(tmp_path):
        pass
