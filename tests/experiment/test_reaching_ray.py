"""Ray that cannot be reached or started is one message, soon, and nothing is left behind.

Clusters are stand-ins: sockets that do not answer, and gRPC servers that answer as Ray's does.
"""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import fedray
from fedray.errors import ConfigError, RunError
from fedray.experiment import cluster, reaching, room
from tests.experiment import tiny

# before any test sets RAY_ADDRESS: a local Ray of this process settles its token here
ray = cluster.import_ray()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaching, "ASK_S", 1.0)


@contextmanager
def listening() -> Iterator[str]:
    """A socket that takes connections and says nothing."""
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        s.listen(5)
        yield f"127.0.0.1:{s.getsockname()[1]}"


@contextmanager
def web_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("0.0.0.0", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextmanager
def gcs(
    ray_version: str = "", python_version: str = "", *, refuses: bool = False, session: str = "session_1"
) -> Iterator[str]:
    """A server that answers the three questions as Ray's GCS does."""
    import json
    import platform

    import grpc
    from ray.core.generated import gcs_service_pb2 as messages
    from ray.core.generated import gcs_service_pb2_grpc as services

    about = {"python_version": python_version or platform.python_version()}

    class Nodes(services.NodeInfoGcsServiceServicer):  # type: ignore[misc]  # generated, without types
        def CheckAlive(self, request: Any, context: Any) -> Any:
            if refuses:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: Authentication token")
            return messages.CheckAliveReply(ray_version=ray_version or ray.__version__)

    class Store(services.InternalKVGcsServiceServicer):  # type: ignore[misc]
        def InternalKVGet(self, request: Any, context: Any) -> Any:
            kept = {(b"CLUSTER_METADATA", b"cluster"): json.dumps(about).encode()}
            kept[b"session_name", b"session"] = session.encode()
            return messages.InternalKVGetReply(value=kept[request.key, request.namespace])

    server = grpc.server(ThreadPoolExecutor(2))
    services.add_NodeInfoGcsServiceServicer_to_server(Nodes(), server)
    services.add_InternalKVGcsServiceServicer_to_server(Store(), server)
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@contextmanager
def client_server(refuses: bool) -> Iterator[str]:
    """A server that answers as that of Ray's client does; it may refuse the token."""
    import grpc
    from ray.core.generated import ray_client_pb2 as messages
    from ray.core.generated import ray_client_pb2_grpc as services

    class Driver(services.RayletDriverServicer):  # type: ignore[misc]  # generated, without types
        def ClusterInfo(self, request: Any, context: Any) -> Any:
            if refuses:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: Authentication token")
            return messages.ClusterInfoResponse(json="{}")

    server = grpc.server(ThreadPoolExecutor(2))
    services.add_RayletDriverServicer_to_server(Driver(), server)
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    yield f"ray://127.0.0.1:{port}"
    server.stop(None)


def said(address: str) -> str:
    """Return the one message about an address, which must come soon."""
    started = time.monotonic()
    with pytest.raises(RunError) as caught:
        reaching.reached(address)
    assert time.monotonic() - started < 10
    assert repr(address) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("ray://127.0.0.1:1", "Connection refused"),
        ("no-such-host.invalid:6379", "there is no host"),
        ("localhost", "HOST:PORT"),
        ("127.0.0.1:port", "HOST:PORT"),
        ("127.0.0.1:99999", "HOST:PORT"),
        (":6379", "HOST:PORT"),
        ("http://127.0.0.1:8265", "unknown scheme 'http'"),
    ],
)
def test_an_address_where_no_ray_is(address: str, says: str) -> None:
    message = said(address)
    assert says in message
    for way in ("ray start --head", "unset RAY_ADDRESS", "clients.actors=0"):
        assert way in message


def test_auto_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: None)
    assert "no Ray runs on this machine" in said("auto")


def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object, timeout: float) -> None:
        assert timeout == 1.0
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    assert "did not answer within 1 s" in said("10.255.255.1:6379")


def test_what_listens_but_does_not_answer_and_what_answers_something_else() -> None:
    with listening() as address:
        assert "did not answer within 1 s" in said(address)
        assert "did not answer within 1 s" in said(f"ray://{address}")
    with web_server() as address:
        assert "not a Ray" in said(address)
        assert "not a Ray" in said(f"ray://{address}")


def test_a_server_of_rays_client_is_asked_too() -> None:
    with client_server(refuses=True) as address:
        assert "refuses our token" in said(address)
    with client_server(refuses=False) as address:
        assert reaching.reached(address) == address


def test_a_cluster_that_refuses_our_token() -> None:
    with gcs(refuses=True) as address:
        message = said(address)
    assert "refuses our token" in message and "RAY_AUTH_TOKEN_PATH" in message


@pytest.mark.parametrize("theirs", [("2.9.0", ""), ("", "3.9.1"), ("2.9.0", "3.9.1")])
def test_a_cluster_of_another_version(theirs: tuple[str, str]) -> None:
    with gcs(*theirs) as address:
        message = said(address)
    for version in (*theirs, ray.__version__):
        assert version in message


def test_a_cluster_like_ours_is_taken() -> None:
    with gcs() as address:
        assert reaching.reached(address).rpartition(":")[2] == address.rpartition(":")[2]


@pytest.mark.parametrize("is_head", [False, True])
def test_another_address_than_that_of_the_connected_ray_is_refused(
    monkeypatch: pytest.MonkeyPatch, is_head: bool
) -> None:
    """The process is connected to a Ray that it started, or to that of the first server."""
    from ray._private import worker

    with gcs() as ours, gcs(session="session_2") as other:
        node = SimpleNamespace(gcs_address=ours, session_name="session_1", is_head=lambda: is_head)
        node.node_ip_address = "127.0.0.1"
        monkeypatch.setattr(worker, "_global_node", node)
        monkeypatch.setattr(worker.global_worker, "mode", worker.SCRIPT_MODE)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("it is connected"))
        where = "a Ray that it started" if is_head else f"the Ray at {ours!r}"
        for address in (None, "", "local", ours, other, f"ray://{ours}", "127.0.0.1:1"):
            monkeypatch.delenv("RAY_ADDRESS", raising=False)
            if address is not None:
                monkeypatch.setenv("RAY_ADDRESS", address)
            if not address or address == ("local" if is_head else ours):
                cluster.start_ray()
                continue
            with pytest.raises(RunError) as caught:
                cluster.start_ray()
            assert f"RAY_ADDRESS={address!r}" in str(caught.value)
            if is_head or address != "127.0.0.1:1":
                assert f"connected to {where}, and uses one Ray at a time. Call ray.shutdown() first" in str(
                    caught.value
                )
        monkeypatch.setattr(worker.global_worker, "mode", worker.WORKER_MODE)
        monkeypatch.setenv("RAY_ADDRESS", other)
        cluster.start_ray()  # a trial works in its cluster


def test_a_cluster_without_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9})
    with pytest.raises(RunError, match="has no CPUs"):
        room.cluster_cpus()
    assert room.cluster_cpus(at_least_one=False) == 0


# ── the option --address ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaching, "_of_option", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # to be restored


@pytest.mark.parametrize("address", ["127.0.0.1:1", " 127.0.0.1:1 ", "ray://127.0.0.1:1"])
def test_the_option_counts_and_is_named(no_option: None, address: str) -> None:
    reaching.use(address)
    assert os.environ["RAY_ADDRESS"] == address.strip() and reaching.has_address()
    message = said(address.strip())
    assert message.startswith(f"no Ray cluster at --address {address.strip()!r}: ")
    assert "give --address its address" in message and "leave out --address" in message
    assert "RAY_ADDRESS" not in message


def test_local_is_a_ray_of_the_commands_own(no_option: None) -> None:
    reaching.use(None)
    assert reaching.has_address()
    reaching.use("local")
    assert not reaching.has_address()


@pytest.mark.parametrize(
    "address", ["", " ", "somewhere", "http://127.0.0.1:8265", "127.0.0.1:0x1", "ray://"]
)
def test_an_option_that_is_no_address_is_refused(no_option: None, address: str) -> None:
    with pytest.raises(ConfigError, match=r"^no Ray cluster at --address .*HOST:PORT"):
        reaching.use(address)
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"


# ── nothing is left behind ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, in_tmp: Path) -> Path:
    """RAY_ADDRESS is of no Ray, and no test before has connected; return an empty working directory."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    return in_tmp


def test_a_run_leaves_nothing_and_the_next_try_works(unreachable: Path) -> None:
    config = tiny.config({"clients.actors": 1})
    for out in ("r", None):
        with pytest.raises(RunError, match="Connection refused"):
            fedray.run(config, out=out)
        assert tiny.listing(unreachable) == []
    assert fedray.run(config.override({"clients.actors": 0}), out="r").result["status"] == "finished"


def test_a_resumed_run_keeps_what_it_has(unreachable: Path) -> None:
    with pytest.raises(RuntimeError):
        fedray.run(tiny.config(), out="r", on_round=tiny.ending(2, RuntimeError))
    rounds = (unreachable / "r" / "rounds.jsonl").read_text()
    with pytest.raises(RunError, match="Connection refused"):
        fedray.resume("r", ["clients.actors=1"])
    assert (unreachable / "r" / "rounds.jsonl").read_text() == rounds


def test_a_sweep_and_trainings_leave_nothing(unreachable: Path) -> None:
    from fedray.config import yaml_text
    from fedray.sweeps.space import Sweep
    from fedray.sweeps.sweep import sweep
    from rllib_pruner.config import Plan
    from rllib_pruner.training import train
    from rllib_pruner.trials import train_all

    file = unreachable / "sweep.yaml"
    file.write_text(yaml_text.dump({"base": tiny.TREE, "space": {"seed": {"grid": [0, 1]}}}))
    with pytest.raises(RunError, match="Connection refused"):
        sweep(Sweep.load(file), out="s")
    shipped = Path(fedray.__file__).parents[1] / "tune_configs" / "rl_rate_search.yaml"
    plan = Plan.load(shipped, ["tracking.uri=none"])
    with pytest.raises(RunError, match="Connection refused"):
        train(next(iter(plan.trials.values())), unreachable / "t")
    with pytest.raises(RunError, match="Connection refused"):
        train_all(plan, unreachable / "t", lambda *_: None)
    assert tiny.listing(unreachable) == ["sweep.yaml"]


# ── starting is watched ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def shutdowns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append("shutdown"))
    return calls


def test_a_start_that_fails_is_told_in_its_own_words(shutdowns: list[str]) -> None:
    def init() -> None:
        raise ConnectionError("Failed to connect") from OSError("AF_UNIX path length\ncannot exceed 107")

    with pytest.raises(RunError, match=r"cannot start.*AF_UNIX path length\. .*RAY_TMPDIR"):
        cluster._watched(init, 10, cluster._cannot_start)
    assert shutdowns == ["shutdown"]


@pytest.mark.parametrize(
    ("command", "says"),
    [(["false"], "process false ended while it started"), (["sleep", "60"], "not ready within 2 s")],
)
def test_a_start_that_hangs_is_ended_with_its_processes(
    command: list[str], says: str, shutdowns: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_DEAD_S", 0.5)
    started: list[subprocess.Popen[bytes]] = []
    goes_on = threading.Event()

    def init() -> None:
        started.append(subprocess.Popen(command))
        goes_on.wait(30)

    with pytest.raises(RunError, match=says):
        cluster._watched(init, 2, cluster._cannot_start)
    assert started[0].wait(5) != 0 and not shutdowns  # a shutdown would wait for ever
    goes_on.set()


def test_what_runs_below_an_older_child_is_left_alone() -> None:
    """A Ray that this process started earlier has such grandchildren: the agents of its raylet."""
    import psutil  # comes with Ray

    forking = "import subprocess; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", forking], stdout=subprocess.PIPE, text=True) as older:
        assert older.stdout is not None
        grandchild = psutil.Process(int(older.stdout.readline()))
        try:
            with pytest.raises(RunError, match="not ready within 1 s"):
                cluster._watched(lambda: time.sleep(5), 1, cluster._cannot_start)
            assert older.poll() is None and grandchild.status() != psutil.STATUS_ZOMBIE
        finally:
            grandchild.kill()


def test_a_start_that_works_keeps_its_thread(shutdowns: list[str]) -> None:
    done: list[int] = []
    cluster._watched(lambda: done.append(1), 10, cluster._cannot_start)
    assert done == [1] and not shutdowns
    assert "fedray-ray-init" in {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RAY_TMPDIR": "LONG"}, "AF_UNIX"),
        ({"RAY_TMPDIR": "/proc/nothing"}, "No such file"),
        ({"RAY_ADDRESS": "127.0.0.1:1"}, "Connection refused"),
    ],
)
def test_the_command_says_it_once_and_ends(env: dict[str, str], says: str, tmp_path: Path) -> None:
    from fedray.config import yaml_text

    long = tmp_path / ("x" * 100)
    long.mkdir()
    (tmp_path / "x.yaml").write_text(yaml_text.dump({"base": tiny.TREE}))
    done = subprocess.run(
        [sys.executable, "-m", "fedray.cli", "run", "x.yaml", "clients.actors=1", "--out", "r"],
        cwd=tmp_path,
        env=os.environ | {name: value.replace("LONG", str(long)) for name, value in env.items()},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("failed:") and says in lines[0]
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "sweep"])
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_command_tells_of_a_silent_address_within_30_s(command: str, scheme: str, tmp_path: Path) -> None:
    from fedray.config import yaml_text

    (tmp_path / "x.yaml").write_text(yaml_text.dump({"base": tiny.TREE}))
    with listening() as address:
        started = time.monotonic()
        arguments = [command, "x.yaml", "clients.actors=1", "--address", f"{scheme}{address}"]
        done = subprocess.run(
            [sys.executable, "-m", "fedray.cli", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert time.monotonic() - started < 30
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("failed: no Ray cluster at --address"), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


# ── what a local Ray starts ──────────────────────────────────────────────────────────────────────────────


def test_ray_starts_without_what_no_run_uses() -> None:
    """The names are Ray's: if a version renames one, its process (50 to 80 MB) would start again."""
    from ray._private import utils
    from ray._private.node import Node

    names = ("start_monitor", "start_log_monitor", "start_api_server")
    before = [getattr(Node, name) for name in names]
    with pytest.raises(ZeroDivisionError), cluster.without_extras():
        assert [getattr(Node, name)(None) for name in names] == [None] * 3
        assert isinstance(utils.get_dashboard_dependency_error(), ImportError)
        raise ZeroDivisionError
    assert [getattr(Node, name) for name in names] == before
    assert utils.get_dashboard_dependency_error() is None


PROCESSES = """
from fedray.experiment.cluster import import_ray, start_ray
import_ray()
import psutil
start_ray()
print(*(" ".join(p.cmdline()[:3]) for p in psutil.Process().children(recursive=True)), sep="\\n")
"""


@pytest.mark.slow
def test_a_local_ray_is_a_store_a_node_and_its_two_agents() -> None:
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", PROCESSES], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert "gcs_server" in done.stdout and "raylet/raylet" in done.stdout
    for name in ("dashboard/dashboard.py", "monitor.py", "log_monitor.py"):
        assert name not in done.stdout
