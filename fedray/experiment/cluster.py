"""The Ray that clients train on: a cluster by its address, or a local one that ends with this process.

    address → is it a Ray of our version, and does it take our token? → ray.init, watched → connected

Ray itself waits minutes for a missing cluster, and then ends the process. So the address is
asked first, with a deadline, and `ray.init` is watched from outside: every failure is one RunError.
"""

import atexit
import json
import logging
import os
import platform
import secrets
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedray.errors import ConfigError, RunError

ASK_S = 5.0
"""Seconds that a cluster has to answer."""
CONNECT_S = 20.0
"""Seconds that connecting may take after the answer."""
START_S = 120.0
"""Seconds that a local Ray has to start, as long as its processes live; a few on an idle machine."""
_DEAD_S = 2.0
_FORMS = "an address is HOST:PORT, e.g. 127.0.0.1:6379, or ray://HOST:PORT, or auto"

INSTEAD = (
    "Start a cluster with `ray start --head` and {give} its address, {leave} to start a local Ray, or make a "
    "run without Ray: clients.actors=0"
)
OPTION = "--address"
"""Option of commands: the address of a cluster, instead of that of RAY_ADDRESS."""

_of_option: str | None = None


def use(address: str | None) -> None:
    """Let this process and its children use the cluster at an address.

    Args:
        address: HOST:PORT, ray://HOST:PORT, auto, or local: a Ray that ends with this process; None changes
            nothing.

    Raises:
        ConfigError: if it is empty or has another form.
    """
    global _of_option
    if address is None:
        return
    _of_option = address.strip()
    try:
        if _of_option not in ("auto", "local"):
            _parsed(_of_option)
    except RunError as error:
        raise ConfigError(str(error)) from None
    os.environ["RAY_ADDRESS"] = _of_option


def has_address() -> bool:
    """Tell whether this process is to connect to a cluster that is there."""
    return _address() != "local"


def start_ray(meanwhile: Callable[[], object] = lambda: None) -> None:
    """Connect to the cluster of RAY_ADDRESS, or start a local Ray that ends with this process; once.

    Args:
        meanwhile: called while a local Ray starts, which leaves this process idle for seconds.

    Raises:
        RunError: if it cannot be reached or started; within 30 s for a cluster that does not answer.
    """
    ray = import_ray()
    if ray.is_initialized():
        return
    address = _address()
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        start = partial(_init_alone, include_dashboard=False, **quiet)
        _watched(start, START_S, _cannot_start, meanwhile)
        return
    resolved = reached(address)
    _watched(lambda: ray.init(resolved, **quiet), CONNECT_S, lambda why: _no_cluster(address, why))


def _init_alone(**options: Any) -> None:
    """Start a local Ray with the processes that runs use, and connect to it."""
    import ray

    with without_extras():
        ray.init("local", **options)


@contextmanager
def without_extras() -> Iterator[None]:
    """Let Ray start no autoscaler, no log monitor and no server of the dashboard, and a small agent, inside.

    A local Ray does not grow, prints nothing of its actors and has no dashboard. Without them it takes 180 MB
    less, and half the seconds to start. `ray.init` has no options for them, so the functions that start them
    are exchanged; one that a version of Ray does not have is left alone.
    """
    from ray._private import utils
    from ray._private.node import Node

    def nothing(*_: object, **__: object) -> None:
        """Start no process."""

    def no_packages() -> ImportError:
        """Say that the driver and the agent must do without the packages of the dashboard."""
        return ImportError("fedray starts Ray without its dashboard")

    wanted: list[tuple[Any, str, Any]] = [(utils, "get_dashboard_dependency_error", no_packages)]
    wanted += [(Node, name, nothing) for name in ("start_monitor", "start_log_monitor", "start_api_server")]
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
    if _address() == "local" and "ray" not in sys.modules:
        _private_token()
    import ray

    return ray


def cluster_cpus(*, at_least_one: bool = True) -> float:
    """Return the CPUs of the cluster that this process is connected to.

    Raises:
        RunError: if it has none although there must be `at_least_one`.
    """
    import ray

    cpus = float(ray.cluster_resources().get("CPU", 0.0))
    if cpus == 0 and at_least_one:
        raise RunError(
            f"the Ray cluster at {_address()!r} has no CPUs to train on: add a node that has some "
            "(`ray start --address=… --num-cpus=…`), or wait until `ray status` shows them"
        )
    return cpus


def cluster_nodes() -> list[dict[str, float]]:
    """Return the resources of each living node of the cluster that this process is connected to."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _address() -> str:
    return os.environ.get("RAY_ADDRESS", "").strip() or "local"


def _private_token() -> None:
    """Give a local Ray a private token, unless one is configured: by default Ray writes one into the home."""
    if any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    handle, path = tempfile.mkstemp(prefix="fedray-token-")  # readable by this user alone
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    atexit.register(Path(path).unlink, missing_ok=True)  # runs after Ray's own, which is registered later
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": path}


# ── is there a Ray at this address? ──────────────────────────────────────────────────────────────────────


def reached(address: str) -> str:
    """Return the address of a cluster as `ray.init` takes it, after asking the cluster.

    Args:
        address: HOST:PORT, ray://HOST:PORT or auto.

    Raises:
        RunError: if no Ray of our version answers there that takes our token.
    """
    resolved = _resolved(address)
    if not resolved.startswith("ray://"):
        _ask(address, resolved)
    return resolved


def _resolved(address: str) -> str:
    """Return host:port as Ray connects to it, or the address of a Ray client's server.

    Raises:
        RunError: if the address is not one, or nothing listens there.
    """
    from ray._private.services import canonicalize_bootstrap_address

    if address == "auto":
        try:
            return str(canonicalize_bootstrap_address("auto"))
        except ConnectionError:
            raise _no_cluster(address, "no Ray runs on this machine") from None
    scheme, host, port = _parsed(address)
    try:
        socket.getaddrinfo(host, port)
    except OSError:
        raise _no_cluster(address, f"there is no host {host!r}") from None
    if scheme:
        _knock(address, host, port)
        _ask_client_server(address, f"{host}:{port}")
        return address
    resolved = str(canonicalize_bootstrap_address(address))  # loopback becomes this machine's own address
    _knock(address, *_host_and_port(address, resolved))
    return resolved


def _parsed(address: str) -> tuple[str, str, int]:
    """Return the scheme, the host and the port of an address.

    Raises:
        RunError: if it is not one.
    """
    scheme, _, rest = address.rpartition("://")
    host, port = _host_and_port(address, rest, default=10001 if scheme == "ray" else None)
    if scheme not in ("", "ray"):
        raise _no_cluster(address, f"unknown scheme {scheme!r}; {_FORMS}")
    return scheme, host, port


def _knock(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=ASK_S).close()
    except TimeoutError:
        raise _no_cluster(address, f"{host}:{port} did not answer within {ASK_S:.0f} s") from None
    except OSError as error:
        raise _no_cluster(address, f"{host}:{port}: {error.strerror or error}") from None


def _host_and_port(address: str, rest: str, default: int | None = None) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port or default
    except ValueError:
        host, port = None, None
    if not host or port is None:
        raise _no_cluster(address, _FORMS)
    return host, port


def _ask(address: str, resolved: str) -> None:
    """Make sure that a Ray of our version answers, and that it takes our token.

    Raises:
        RunError: if not.
    """
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services

    with _channel(address, resolved) as channel:
        alive = services.NodeInfoGcsServiceStub(channel).CheckAlive(
            messages.CheckAliveRequest(), timeout=ASK_S
        )
        asked = messages.InternalKVGetRequest(key=b"CLUSTER_METADATA", namespace=b"cluster")
        about = services.InternalKVGcsServiceStub(channel).InternalKVGet(asked, timeout=ASK_S).value
    _check_versions(address, alive.ray_version, json.loads(about or b"{}").get("python_version"))


def _ask_client_server(address: str, at: str) -> None:
    """Make sure that a server of Ray's client answers, and that it takes our token.

    Raises:
        RunError: if not.
    """
    from ray.core.generated import ray_client_pb2 as messages
    from ray.core.generated import ray_client_pb2_grpc as services

    with _channel(address, at) as channel:
        ping = messages.ClusterInfoRequest(type=messages.ClusterInfoType.PING)
        services.RayletDriverStub(channel).ClusterInfo(ping, timeout=ASK_S)


@contextmanager
def _channel(address: str, at: str) -> Iterator[Any]:
    """Open a channel on which calls keep their deadlines and say why they fail: that of gRPC for Python.

    Raises:
        RunError: if a call inside fails.
    """
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.exceptions import AuthenticationError

    channel = init_grpc_channel(at, options=[("grpc.enable_http_proxy", 0)])
    try:
        yield channel
    except grpc.RpcError as error:
        raise _no_cluster(address, _why(error.code(), grpc.StatusCode, error.details())) from None
    except AuthenticationError as error:
        raise _no_cluster(address, str(error).split(".")[0]) from None
    finally:
        channel.close()


def _why(code: Any, codes: Any, details: str) -> str:
    if code == codes.UNAUTHENTICATED:
        return (
            "it refuses our token: give this process the token of the cluster "
            "(RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=FILE, the same on all nodes)"
        )
    if code == codes.DEADLINE_EXCEEDED:
        return f"something listens there, but did not answer within {ASK_S:.0f} s"
    return f"what listens there is not a Ray: {details.rpartition(': ')[2]}"


def _check_versions(address: str, ray_version: str, python_version: str | None) -> None:
    import ray

    theirs = {"Ray": ray_version, "Python": python_version or platform.python_version()}
    ours = {"Ray": ray.__version__, "Python": platform.python_version()}
    if theirs != ours:
        said = [" and ".join(f"{what} {version}" for what, version in of.items()) for of in (theirs, ours)]
        raise RunError(
            f"the Ray cluster at {address!r} has {said[0]}, this process {said[1]}: all nodes and the driver "
            "need the same versions of both"
        )


def _no_cluster(address: str, why: str) -> RunError:
    if address == _of_option:
        given, instead = f"{OPTION} ", INSTEAD.format(give=f"give {OPTION}", leave=f"leave out {OPTION}")
    else:
        given = "RAY_ADDRESS="
        instead = INSTEAD.format(give="set RAY_ADDRESS to", leave="unset RAY_ADDRESS")
    return RunError(f"no Ray cluster at {given}{address!r}: {why.rstrip('.')}. {instead}")


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
            atexit.unregister(ray.shutdown)  # it would wait for the thread
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
