"""Sweeps on real raylets with a token: addresses, labels, nodes that join, submitted jobs, two at once.

Every command is run as a user runs it, in a process of its own; the weights are those of runs in process.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from tests.experiment import tiny
from tests.test_cluster import ROOT, kill_holders, node, own_env

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes by /proc"),
]

WHERE = '''"""FedAvg that notes the node of each process, and takes its time."""

import time
from dataclasses import dataclass
from pathlib import Path

from fedray.federation.method import Method
from fedray.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Where(Method[None]):
    """FedAvg that takes its time.

    Args:
        pause_s: seconds of each client.
    """

    citation = "none"
    pause_s: float = 0.0

    def setup(self, state, ctx):
        note("trial")
        return super().setup(state, ctx)

    def client_update(self, task, client):
        note("client")
        time.sleep(self.pause_s)
        return super().client_update(task, client)


def note(kind):
    import ray

    if ray.is_initialized():
        (Path(FOLDER) / f"{kind}-{ray.get_runtime_context().get_node_id()}").touch()


METHODS["where"] = Where
'''

DRIVE_S = 240.0
"""Seconds that a sweep may take."""


@dataclass
class Raylets:
    """A cluster that was started by hand, and the folder of its files."""

    address: str
    dashboard: str
    env: dict[str, str]
    folder: Path
    nodes: ExitStack

    def join(self, name: str, *arguments: str) -> None:
        """Start one more raylet."""
        options = [f"--address={self.address}", f"--temp-dir={self.folder / 'ray'}", *arguments]
        self.nodes.enter_context(node(options, self.env, self.folder / f"{name}.log"))

    def ask(self, what: str) -> Any:
        """Return the value of an expression in a process that is connected."""
        code = f"import json, ray; ray.init({self.address!r}, log_to_driver=False); print(json.dumps({what}))"
        done = subprocess.run(
            [sys.executable, "-c", code], env=self.env, capture_output=True, text=True, timeout=60, check=True
        )
        return json.loads(done.stdout.splitlines()[-1])

    def node_with(self, resource: str) -> str:
        """Return the id of the node that has a resource."""
        found = f"[n['NodeID'] for n in ray.nodes() if n['Alive'] and {resource!r} in n['Resources']]"
        (only,) = self.ask(found)
        return str(only)


@pytest.fixture
def raylets() -> Iterator[Raylets]:
    """A head with one CPU and a dashboard; tests add workers."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="fr"))  # short: sockets' paths end at 107 characters
    token = folder / "token"
    env = own_env(token)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    head = ["--head", "--port=0", "--num-cpus=1", "--labels=tier=fast", f"--temp-dir={folder / 'ray'}"]
    head += ["--include-dashboard=true", f"--dashboard-port={port}"]
    try:
        with ExitStack() as nodes:
            printed = nodes.enter_context(node(head, env, folder / "head.log"))
            match = re.search(r"--address='([^']+)'", printed)
            assert match is not None, printed
            yield Raylets(match[1], f"http://127.0.0.1:{port}", env, folder, nodes)
    finally:
        kill_holders(token)
        rmtree(folder, ignore_errors=True)


# ── sweeps


def write(
    folder: Path, seeds: Sequence[int], changes: Mapping[str, Any], concurrent: int | None = None
) -> None:
    """Write `where.py` and the file of a sweep over seeds into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "notes").mkdir(exist_ok=True)
    text = WHERE.replace("FOLDER", repr(str(folder / "notes")))
    (folder / "where.py").write_text(text, encoding="utf-8")
    base = {"method.name": "where", "clients.actors": "auto", "method.pause_s": 0.2} | dict(changes)
    tree = {
        "base": override_tree(tiny.TREE, base),
        "space": {"seed": {"grid": list(seeds)}},
        "tune": {"max_failures": 0, "concurrent": concurrent},
    }
    (folder / "s.yaml").write_text(yaml_text.dump(tree), encoding="utf-8")


def command(folder: Path, *arguments: str) -> list[str]:
    """Return `fedray sweep` of the file in a folder."""
    files = [str(folder / "s.yaml"), "--import", str(folder / "where.py")]
    return [sys.executable, "-m", "fedray.cli", "sweep", *files, "--out", str(folder / "out"), *arguments]


def started(raylets: Raylets, folder: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, *arguments),
        env=raylets.env | env,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def weights(folder: Path) -> dict[int, str]:
    """Return the digest of the weights of each finished trial, by seed."""
    results = [path for path in (folder / "out" / "trials").glob("*/result.json")]
    found = {}
    for path in results:
        seed = re.search(r"seed=(\d+)", path.parent.name)
        assert seed is not None
        found[int(seed[1])] = json.loads(path.read_text(encoding="utf-8"))["weights_sha256"]
    return found


def alone(folder: Path, seeds: Sequence[int]) -> dict[int, str]:
    """Return the digests that runs in a process of their own have, without Ray."""
    found = {}
    for seed in seeds:
        arguments = [
            str(folder / "s.yaml"),
            "--import",
            str(folder / "where.py"),
            "--json",
            "clients.actors=0",
        ]
        arguments += [f"seed={seed}", "method.pause_s=0", "--out", str(folder / f"alone-{seed}")]
        done = subprocess.run(
            [sys.executable, "-m", "fedray.cli", "run", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        result = json.loads((folder / f"alone-{seed}" / "result.json").read_text(encoding="utf-8"))
        found[seed] = result["weights_sha256"]
    return found


def notes(folder: Path, kind: str) -> set[str]:
    return {path.name.removeprefix(f"{kind}-") for path in (folder / "notes").glob(f"{kind}-*")}


def unfinished(folder: Path) -> int:
    """Return how many trials have begun and have no result."""
    trials = list((folder / "out" / "trials").glob("*/config.yaml"))
    return sum(not (path.parent / "result.json").exists() for path in trials)


def wait_for(what: str, ready: Any) -> None:
    ends = time.monotonic() + DRIVE_S
    while not ready():
        assert time.monotonic() < ends, what
        time.sleep(0.2)


def test_a_node_that_joins_during_a_sweep_is_used(raylets: Raylets, tmp_path: Path) -> None:
    write(tmp_path, range(4), {"rounds": 4, "method.pause_s": 0.4})
    running = started(raylets, tmp_path, "--address", raylets.address)
    wait_for("the first trial has begun", lambda: notes(tmp_path, "trial"))
    raylets.join("worker", "--num-cpus=2", '--resources={"edge": 2}')
    wait_for("two trials run at once", lambda: unfinished(tmp_path) > 1)  # one did, on one CPU
    said, _ = running.communicate(timeout=DRIVE_S)
    assert running.returncode == 0, said
    there = {raylets.node_with("node:__internal_head__"), raylets.node_with("edge")}
    assert notes(tmp_path, "trial") == there, "trials ran on both nodes"
    assert weights(tmp_path) == alone(tmp_path, range(4))


def test_trials_and_their_actors_go_where_labels_say(raylets: Raylets, tmp_path: Path) -> None:
    raylets.join("worker", "--num-cpus=2", '--resources={"edge": 2}', "--labels=tier=slow,site=a")
    placed: dict[str, Any] = {"clients.actors": 2, "clients.resources.cpu": 0.5, "method.pause_s": 0.0}
    write(tmp_path, [0, 1], placed | {"clients.resources.labels": {"tier": "slow"}})
    running = started(raylets, tmp_path, RAY_ADDRESS=raylets.address)
    said, _ = running.communicate(timeout=DRIVE_S)
    assert running.returncode == 0, said
    assert notes(tmp_path, "client") == {raylets.node_with("edge")}
    assert weights(tmp_path) == alone(tmp_path, [0, 1])
    # a group of actors for one device, elsewhere
    devices: dict[str, Any] = {"clients.devices": {"phone": 1.0, "jetson_nano": 1.0}}
    by_device = {"jetson_nano": {"cpu": 0.5, "labels": {"tier": "fast"}}}
    other = tmp_path / "by_device"
    write(other, [0], placed | devices | {"clients.resources.by_device": by_device})
    write_labels = ["clients.resources.labels.tier=slow"]
    running = started(raylets, other, *write_labels, "clients.cohort=6", RAY_ADDRESS="auto")
    said, _ = running.communicate(timeout=DRIVE_S)
    assert running.returncode == 0, said
    assert notes(other, "client") == {raylets.node_with("edge"), raylets.node_with("node:__internal_head__")}
    # labels that no node has, and more than the nodes with a label hold
    for arguments, why in (
        (["clients.resources.labels.tier=gpu"], "on nodes with the labels tier=gpu"),
        (["clients.resources.labels.tier=fast", "clients.actors=3"], "the nodes have room for 2 of them"),
    ):
        third = tmp_path / f"refused-{why[-4:]}"
        write(third, [0], placed)
        done = started(raylets, third, *arguments, "--address", "auto")
        said, _ = done.communicate(timeout=60)
        assert done.returncode == 2 and why in said, said
        assert not (third / "out").exists()


def test_a_sweep_is_submitted_as_a_job(raylets: Raylets, tmp_path: Path) -> None:
    raylets.join("worker", "--num-cpus=1", '--resources={"edge": 1}')
    write(tmp_path, [0, 1], {"method.pause_s": 0.0})
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", raylets.dashboard]
    done = subprocess.run(
        [*submit, "--", *command(tmp_path)], env=raylets.env, capture_output=True, text=True, timeout=DRIVE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert weights(tmp_path) == alone(tmp_path, [0, 1])
    wrong = raylets.env | {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "f" * 32}
    refused = subprocess.run(
        [*submit, "--", "true"], env=wrong, capture_output=True, text=True, timeout=60, check=False
    )
    assert refused.returncode != 0


def test_two_sweeps_do_not_disturb_each_other(raylets: Raylets, tmp_path: Path) -> None:
    raylets.join("worker", "--num-cpus=3")
    first, second = tmp_path / "first", tmp_path / "second"
    store: dict[str, Any] = {"tracking.uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    write(first, [0, 1], store | {"rounds": 300, "method.pause_s": 0.4}, concurrent=2)
    write(second, [2, 3], store | {"rounds": 6}, concurrent=2)
    one, two = (started(raylets, where, "--address", raylets.address) for where in (first, second))
    wait_for("both have begun", lambda: unfinished(first) and unfinished(second))
    one.kill()
    said, _ = two.communicate(timeout=DRIVE_S)
    assert two.returncode == 0, said
    assert weights(second) == alone(second, [2, 3])
    assert one.wait() == -signal.SIGKILL and weights(first) == {}
    free = "ray.available_resources().get('CPU') == ray.cluster_resources()['CPU']"
    wait_for("the killed sweep holds nothing", lambda: raylets.ask(free))
    parents = [json.loads((where / "out" / "mlflow.json").read_text())["run_id"] for where in (first, second)]
    children = {
        json.loads(path.read_text())["run_id"] for path in tmp_path.glob("*/out/trials/*/mlflow.json")
    }
    assert len({*parents, *children}) == 6
