"""Clusters of real raylets on this machine, with a token, and sweeps and runs on them.

Every command is run as a user runs it, in a process of its own.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from tests.experiment import tiny
from tests.test_cluster import ROOT, kill_holders, node, own_env

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

DRIVE_S = 400.0
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

    def processes(self, word: str) -> list[int]:
        """Return the ids of the cluster's processes, and of those that were started for it, with a word."""
        mark = f"RAY_AUTH_TOKEN_PATH={self.env['RAY_AUTH_TOKEN_PATH']}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # gone meanwhile
                is_ours = mark in (process / "environ").read_bytes().split(b"\0")
                if is_ours and word.encode() in (process / "cmdline").read_bytes().replace(b"\0", b" ")[:400]:
                    found.append(int(process.name))
        return found

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


@contextmanager
def started_raylets() -> Iterator[Raylets]:
    """Start a head with one CPU and a dashboard; tests add workers."""
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
