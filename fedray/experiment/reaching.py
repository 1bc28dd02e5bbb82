"""The address of a Ray cluster: where it is given, and whether a Ray is there that takes us.

The server is asked with a deadline before Ray connects: `ray.init` waits minutes for a missing cluster.
"""

import json
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from fedray.errors import ConfigError, RunError

ASK_S = 5.0
"""Seconds that a cluster has to answer."""
LOOK_S = 5.0
"""Seconds that a cluster has to answer to a process that is connected to it."""
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
    return given_address() != "local"


def given_address() -> str:
    """Return the address of the cluster to connect to, or `local`."""
    return os.environ.get("RAY_ADDRESS", "").strip() or "local"


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


def connected_address() -> str | None:
    """Return HOST:PORT of the GCS to which this process is connected; None through Ray's client."""
    from ray._private import worker

    return None if worker._global_node is None else str(worker._global_node.gcs_address)


def answers(address: str) -> bool:
    """Tell whether the GCS at HOST:PORT answers within `LOOK_S`; one that refuses our token does."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services
    from ray.exceptions import AuthenticationError

    channel = init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)])
    try:
        services.NodeInfoGcsServiceStub(channel).CheckAlive(messages.CheckAliveRequest(), timeout=LOOK_S)
        return True
    except AuthenticationError:
        return True
    except grpc.RpcError as error:
        return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    finally:
        channel.close()


def check_connected() -> None:
    """Make sure that the Ray to which this process is connected is the one whose address is given, if one is.

    Raises:
        RunError: if an address of another Ray is given, or no Ray answers there.
    """
    from ray._private import worker

    address, node = os.environ.get("RAY_ADDRESS", "").strip(), worker._global_node
    if not address or worker.global_worker.mode not in (None, worker.SCRIPT_MODE):
        return  # a trial or an actor works in its cluster, whatever its variables are
    if node is None:
        ours = _of_client()
        where, is_same = f"the Ray at {ours!r}", address.rstrip("/") in (ours, ours.removesuffix(":10001"))
    elif node.is_head():
        where, is_same = "a Ray that it started", address == "local"
    else:
        where, is_same = f"the Ray at {node.gcs_address!r}", _session_at(address) == node.session_name
    if not is_same:
        given = f"{OPTION} " if address == _of_option else "RAY_ADDRESS="
        raise RunError(
            f"{given}{address!r}: this process is connected to {where}, and uses one Ray at a time. "
            "Call ray.shutdown() first, unset RAY_ADDRESS to keep that Ray, or start another process"
        )


def _of_client() -> str:
    """Return the address of the server to which Ray's client in this process is connected."""
    from ray.util import client

    return f"ray://{client.ray.get_context().client_worker._conn_str}"


def _session_at(address: str) -> str | None:
    """Return the name of the session of the Ray at an address; None for one that has no HOST:PORT.

    Raises:
        RunError: if no Ray answers there.
    """
    if address == "local" or address.startswith("ray://"):
        return None
    resolved = reached(address)
    with _channel(address, resolved) as channel:
        return _kept(channel, b"session_name", b"session").decode()


def _kept(channel: Any, key: bytes, namespace: bytes) -> bytes:
    """Return a value that the GCS keeps; empty if it has none."""
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services

    asked = messages.InternalKVGetRequest(key=key, namespace=namespace)
    return bytes(services.InternalKVGcsServiceStub(channel).InternalKVGet(asked, timeout=ASK_S).value)


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
            raise no_cluster(address, "no Ray runs on this machine") from None
    scheme, host, port = _parsed(address)
    try:
        socket.getaddrinfo(host, port)
    except OSError:
        raise no_cluster(address, f"there is no host {host!r}") from None
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
        raise no_cluster(address, f"unknown scheme {scheme!r}; {_FORMS}")
    return scheme, host, port


def _knock(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), timeout=ASK_S).close()
    except TimeoutError:
        raise no_cluster(address, f"{host}:{port} did not answer within {ASK_S:.0f} s") from None
    except OSError as error:
        raise no_cluster(address, f"{host}:{port}: {error.strerror or error}") from None


def _host_and_port(address: str, rest: str, default: int | None = None) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{rest}")
        host, port = parts.hostname, parts.port or default
    except ValueError:
        host, port = None, None
    if not host or port is None:
        raise no_cluster(address, _FORMS)
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
        about = _kept(channel, b"CLUSTER_METADATA", b"cluster")
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
        raise no_cluster(address, _why(error.code(), grpc.StatusCode, error.details())) from None
    except AuthenticationError as error:
        raise no_cluster(address, str(error).split(".")[0]) from None
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


def no_cluster(address: str, why: str) -> RunError:
    if address == _of_option:
        given, instead = f"{OPTION} ", INSTEAD.format(give=f"give {OPTION}", leave=f"leave out {OPTION}")
    else:
        given = "RAY_ADDRESS="
        instead = INSTEAD.format(give="set RAY_ADDRESS to", leave="unset RAY_ADDRESS")
    return RunError(f"no Ray cluster at {given}{address!r}: {why.rstrip('.')}. {instead}")
