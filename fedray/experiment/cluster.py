"""The Ray that clients train on: a cluster by its address, or a local one that ends with this process.

    address → is it a Ray of our version, and does it take our token? → ray.init, watched → connected

Ray itself waits minutes for a missing cluster, and then ends the process. So the address is
asked first, with a deadline, and `ray.init` is watched from outside: every failure is one RunError.
"""

import atexit
import logging
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fedray.errors import RunError, without_secrets
from fedray.experiment.interrupt import handle_again
from fedray.experiment.reaching import check_connected, given_address, no_cluster, reached

CONNECT_S = 20.0
"""Seconds that connecting may take after the answer."""
START_S = 120.0
"""Seconds that a local Ray has to start, as long as its processes live; a few on an idle machine."""
_DEAD_S = 2.0


def start_ray(meanwhile: Callable[[], object] = lambda: None) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start a local Ray that ends with this process; once.

    Args:
        meanwhile: called while a local Ray starts, which leaves this process idle for seconds.

    Raises:
        RunError: if it cannot be reached or started, within 30 s for a cluster that does not answer; or if
            this process is connected to another one than RAY_ADDRESS says.
    """
    ray = import_ray()
    if ray.is_initialized():
        check_connected()
        return
    address = given_address()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        start = partial(_init_alone, include_dashboard=False, **quiet)
        _watched(start, START_S, _cannot_start, meanwhile)
        return
    resolved = reached(address)
    _watched(partial(_init, resolved, **quiet), CONNECT_S, lambda why: no_cluster(address, why))


def _init_alone(**options: Any) -> None:
    """Start a local Ray with the processes that runs use, and connect to it."""
    with without_extras():
        _init("local", **options)


def _init(address: str, **options: Any) -> None:
    """Connect to a Ray. It keeps the command line of its driver, in which an address may have a password."""
    import ray
    from ray._private import utils, worker

    entrypoint = getattr(utils, "get_entrypoint_name", str)
    hook = getattr(worker, "custom_excepthook", None)
    if sys.excepthook is hook:  # it tells the head of an error first, and waits for it
        sys.excepthook = worker.normal_excepthook
    with _exchanged([(utils, "get_entrypoint_name", lambda: without_secrets(entrypoint()))]):
        ray.init(address, **options)


@contextmanager
def without_extras() -> Iterator[None]:
    """Let Ray start no autoscaler, no log monitor and no server of the dashboard, and a small agent, inside.

    And let its processes listen on loopback only, as Ray does by itself on macOS and Windows.

    A local Ray does not grow, prints nothing of its actors and has no dashboard. Without them it takes 180 MB
    less, and half the seconds to start. `ray.init` has no options for them, so the functions that start them
    are exchanged; one that a version of Ray does not have is left alone.
    """
    from ray._private import ray_constants, utils
    from ray._private.node import Node

    def nothing(*_: object, **__: object) -> None:
        """Start no process."""

    def no_packages() -> ImportError:
        """Say that the driver and the agent must do without the packages of the dashboard."""
        return ImportError("fedray starts Ray without its dashboard")

    wanted: list[tuple[Any, str, Any]] = [(utils, "get_dashboard_dependency_error", no_packages)]
    wanted.append((ray_constants, "ENABLE_RAY_CLUSTER", False))
    wanted += [(Node, name, nothing) for name in ("start_monitor", "start_log_monitor", "start_api_server")]
    with _exchanged(wanted):
        yield


@contextmanager
def _exchanged(wanted: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Let names in Ray's modules and classes stand for other objects inside; those that are missing do not.

    Args:
        wanted: owner, name, new object.
    """
    exchanged = [(owner, name, new) for owner, name, new in wanted if hasattr(owner, name)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in exchanged]
    try:
        for owner, name, new in exchanged:
            setattr(owner, name, new)
        yield
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)


def import_ray() -> Any:
    """Import Ray, after setting the variables that it reads on import; return the module."""
    if given_address() == "local" and "ray" not in sys.modules:
        _private_token()
    import ray

    return ray


def leave_ray(status: int | None = None) -> None:
    """Do not disconnect from Ray at the end of this process: its processes may be gone, and it would wait.

    Args:
        status: the exit status, where a thread still waits for Ray; the end of the interpreter would be a
            SIGSEGV then, so the process leaves it out. The other functions of `atexit` are called.
    """
    import ray

    atexit.unregister(ray.shutdown)
    registry = sys.modules.get("ray.tune.registry")
    if registry is not None:  # it deletes its entries at Ray
        atexit.unregister(registry._unregister_all)
    if status is not None:
        atexit.register(_leave_process, status)  # the last one is called first


def _leave_process(status: int) -> None:
    """Call the functions of `atexit`, and end this process without the end of the interpreter."""
    atexit.unregister(_leave_process)
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a terminal that is gone
                stream.flush()
    finally:
        os._exit(status)


def _private_token() -> None:
    """Give a local Ray a token, unless one is configured: by default Ray writes one into the home.

    Only processes of this user can read the variables of a process.
    """
    if any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    # Ray's processes inherit it; a file would be left behind by SIGKILL
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


# ── ray.init, watched ────────────────────────────────────────────────────────────────────────────────────


def _cannot_start(why: str) -> RunError:
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    with suppress(OSError):
        raylet = (folder / "ray" / "session_latest" / "logs" / "raylet.out").read_text(errors="replace")
        if "Timed out waiting for file" in raylet:
            why += ": one of Ray's processes waited 15 s for another in vain, since the machine is too busy"
    return RunError(
        f"Ray cannot start on this machine: {why.rstrip('.')}. It keeps its sockets and logs below {folder} "
        "(RAY_TMPDIR: a short path, writable, with space left) and its objects in /dev/shm; its logs are in "
        f"{folder}/ray/session_latest/logs. A run without Ray: clients.actors=0"
    )


def _watched(
    init: Callable[[], object],
    limit_s: float,
    failed: Callable[[str], RunError],
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Call `ray.init` in a separate thread, and stop waiting when it takes too long or its processes die.

    In the main thread it could not be interrupted, and would replace our handler of SIGTERM.

    Raises:
        RunError: as `failed` words the reason; by then the started processes have ended.
    """
    for name in ("node", "services", "worker"):  # they log the tracebacks of exceptions that they raise
        logging.getLogger(f"ray._private.{name}").setLevel(logging.CRITICAL)
    start = _Start(init)
    try:
        meanwhile()
        why = start.wait(limit_s)
    except BaseException:
        start.end()
        raise
    finally:
        handle_again()
    if why is not None:
        start.end()
        raise failed(why) from start.error


class _Start:
    """A call of `ray.init` in a thread, and the processes that it starts."""

    def __init__(self, init: Callable[[], object]) -> None:
        import psutil  # comes with Ray

        self.error: BaseException | None = None
        self._is_over = threading.Event()
        self._psutil, self._init, self._me = psutil, init, psutil.Process()
        self._others = {child.pid for child in self._me.children()}
        self._dead_since: float | None = None
        threading.Thread(target=self._call, name="fedray-ray-init", daemon=True).start()

    def wait(self, limit_s: float) -> str | None:
        """Wait until Ray is ready, at most `limit_s` seconds; return the reason of a failure, or None."""
        end = time.monotonic() + limit_s
        while not self._is_over.wait(0.1):
            name = self._dead()
            if name is not None and not self._is_over.is_set():
                return f"its process {name} ended while it started"
            if time.monotonic() > end:
                return f"it was not ready within {limit_s:.0f} s"
        return None if self.error is None else _line(self.error)

    def end(self) -> None:
        """End the started processes, and do not let them delay the end of this process."""
        import ray

        for child in self._started():
            below: list[Any] = []
            with suppress(self._psutil.NoSuchProcess):
                below = child.children(recursive=True)
                child.kill()
            for process in below:
                with suppress(self._psutil.NoSuchProcess):
                    process.kill()
        if not self._is_over.is_set():
            leave_ray()  # it would wait for the thread
        else:
            ray.shutdown()

    def _call(self) -> None:
        try:
            self._init()
        except BaseException as error:
            self.error = error
        self._is_over.set()
        if self.error is None:
            threading.Event().wait()  # the kernel ends Ray's processes with the thread that started them

    def _started(self) -> list[Any]:
        """Return the children that started since. Processes below an older child are not ours to end."""
        return [child for child in self._me.children() if child.pid not in self._others]

    def _dead(self) -> str | None:
        """Return the name of a process that ended some time ago and that Ray has not noticed."""
        dead = [child.name() for child in self._started() if self._is_dead(child)]
        now = time.monotonic()
        self._dead_since = (self._dead_since or now) if dead else None
        return dead[0] if self._dead_since is not None and now - self._dead_since > _DEAD_S else None

    def _is_dead(self, process: Any) -> bool:
        try:
            return bool(process.status() == self._psutil.STATUS_ZOMBIE)
        except self._psutil.NoSuchProcess:
            return False


def _line(error: BaseException) -> str:
    """Return an error's own words in a line: its last cause says most."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
