"""`cluster.yaml` is one that `ray up` takes, and client actors really run on another node."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster.yaml"
TEXT = CLUSTER.read_text(encoding="utf-8")

START_S, END_S, DRIVER_S = 120.0, 15.0, 180.0
"""How long a node may take to start and to end, and how long the driver may run, in seconds."""

Tree = dict[str, Any]


@pytest.fixture
def cluster() -> Tree:
    tree: Tree = yaml.safe_load(TEXT)
    return tree


# ── the file


def elsewhere(call: str, env: Mapping[str, str], given: Any = None) -> Any:
    """Return what a function of this file prints as JSON, run in a process of its own.

    Nothing here touches the Ray of the test process, not even by an import.
    """
    done = subprocess.run(
        [sys.executable, "-c", f"from tests.test_cluster import *; {call}"],
        cwd=ROOT,
        env=env,
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=DRIVER_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def read_as_ray_up() -> None:
    """Fill in and validate cluster files, offline; print each, or what is wrong. Private API, only here."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    def answer(tree: Tree) -> Tree | str:
        try:
            filled: Tree = prepare_config(tree)
            validate_config(filled)
        except Exception as error:
            return str(error)
        return filled

    print(json.dumps([answer(tree) for tree in json.load(sys.stdin)]))  # noqa: T201


def test_ray_takes_the_file_and_refuses_a_wrong_one(cluster):
    other_key, other_node_key, other_head = deepcopy(cluster), deepcopy(cluster), deepcopy(cluster)
    other_key["idle_timeout"] = 5
    other_node_key["available_node_types"]["cpu"]["idle_timeout"] = 5
    other_head["head_node_type"] = "server"
    filled, *refused = elsewhere(
        "read_as_ray_up()", os.environ, [cluster, other_key, other_node_key, other_head]
    )
    assert isinstance(filled, dict), filled
    assert filled["available_node_types"] == cluster["available_node_types"], "no limit is left to a default"
    assert filled["head_setup_commands"] == cluster["setup_commands"] + cluster["head_setup_commands"]
    assert "'idle_timeout' was unexpected" in refused[0]
    assert "'idle_timeout' was unexpected" in refused[1]
    assert "`head_node_type` must be one of" in refused[2]


def test_node_types_fit_each_other(cluster):
    types = dict(cluster["available_node_types"])
    head = types.pop(cluster["head_node_type"])
    assert head["max_workers"] == 0, "the head is no worker type"
    assert set(types) == {"cpu", "cpu_spot", "gpu"}
    for name, node in types.items():
        assert node["min_workers"] == 0, f"{name}: costs nothing before it is asked for"
        assert 0 < node["max_workers"] <= cluster["max_workers"]
    labels = [tuple(node["labels"].items()) for node in (head, *types.values())]
    assert len(set(labels)) == 4, "a label selector can tell all types apart"
    assert types["cpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["cpu_spot"]["labels"]["market"] == "spot"
    assert len({node["node_config"]["ImageId"] for node in (head, *types.values())}) == 1, "one Python"


def test_resources_are_what_the_docs_place_by(cluster):
    docs = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    for name, node in cluster["available_node_types"].items():
        for resource in node["resources"]:
            assert f"`{resource}`" in docs, f"{name} offers {resource}"
        shown = ", ".join(f"{key}: {value}" for key, value in node["labels"].items())
        assert f"| `{name}` | `{shown}` |" in docs


def test_what_is_mounted_is_there(cluster):
    local = [path for path in cluster["file_mounts"].values() if not path.startswith("~")]
    assert [path for path in local if not (ROOT / path).exists()] == []
    assert {"fedray", "rllib_pruner", "pyproject.toml", "requirements.lock", "Makefile"} <= set(local)
    assert all(remote.startswith("~/") for remote in cluster["file_mounts"])


def test_all_nodes_have_the_token_and_insist_on_it(cluster, tmp_path):
    assert cluster["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}

    def shell(command: str) -> str:
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def set_up(commands: str) -> None:
        for command in cluster[commands]:
            if ".bashrc" in command:
                shell(command)

    set_up("setup_commands")
    assert shell("source ~/.bashrc; echo $RAY_AUTH_MODE ${RAY_ADDRESS-unset}") == "token unset"
    assert shell("source ~/.bashrc; echo $PATH").startswith(f"{tmp_path}/fedray/.venv/bin:")
    set_up("head_setup_commands")
    assert shell("source ~/.bashrc; echo $RAY_AUTH_MODE $RAY_ADDRESS") == "token auto"
    assert re.fullmatch(r"http://.*:5000", shell("source ~/.bashrc; echo $MLFLOW_TRACKING_URI"))
    once = (tmp_path / ".bashrc").read_text(encoding="utf-8")
    set_up("setup_commands")
    set_up("head_setup_commands")
    assert (tmp_path / ".bashrc").read_text(encoding="utf-8") == once, "`ray up` may be repeated"


def test_commands_are_ones_that_a_shell_can_read(cluster):
    commands = [c for section, value in cluster.items() if section.endswith("_commands") for c in value]
    assert len(commands) > 8
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_opens_with_its_commands_and_names_no_package_registry():
    assert TEXT.startswith("# ray up cluster.yaml\n")
    commands = [line for line in TEXT.splitlines() if re.match(r"#   \w", line)]
    for command in (
        "ray up cluster.yaml",
        "ray exec cluster.yaml",
        "ray job submit",
        "ray down cluster.yaml",
    ):
        assert any(line[4:].startswith(command) for line in commands), command
    hosts = re.findall(r"https?://([^\s/:'\"$]+)", TEXT)
    assert set(hosts) <= {"localhost", "127.0.0.1"}
    assert "index-url" not in TEXT


# ── two nodes on this machine


@dataclass(frozen=True)
class TwoNodes:
    """A head with the label `tier: fast`, and a worker with `tier: slow` and two of the resource `edge`."""

    address: str
    env: dict[str, str]


@contextmanager
def node(arguments: list[str], env: dict[str, str], log: Path, within: Sequence[str] = ()) -> Iterator[str]:
    """Be one node while the context lasts; give what `ray start` printed. `within` starts it, if given.

    It is ended by a signal of its own, not by `ray stop`, which ends every Ray of the machine.
    """
    command = [*within, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    # worker ports at random: two nodes of one machine would share the default range
    command += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000"]
    with open(log, "wb") as out, subprocess.Popen(command, env=env, stdout=out, stderr=out) as process:
        try:
            ends = time.monotonic() + START_S
            # `--block` is said last: by then the address that others join by is printed too
            while "--block" not in (text := log.read_text(encoding="utf-8", errors="replace")):
                if process.poll() is not None or time.monotonic() > ends:
                    raise RuntimeError(f"{' '.join(command)} did not start a node:\n{text}")
                time.sleep(0.1)
            yield text
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            process.kill()


def own_env(token: Path) -> dict[str, str]:
    """Write a token, and return the environment of a cluster that has it."""
    token.write_text("0123456789abcdef" * 2, encoding="utf-8")
    strangers = ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
    return {name: value for name, value in os.environ.items() if name not in strangers} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "110",  # on a busy machine
        "PYTHONPATH": str(ROOT),
    }


def kill_holders(path: Path, name: str = "RAY_AUTH_TOKEN_PATH") -> None:
    """Kill every process that has this path in its environment: those of a test, and their children."""
    mark = f"{name}={path}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # somebody else's, or gone meanwhile
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[TwoNodes]:
    if not Path("/proc/self/environ").exists():
        pytest.skip("finds its processes by /proc, and Ray has several nodes on Linux only")
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="fr"))  # short: sockets' paths end at 107 characters
    token = folder / "token"
    env = own_env(token)
    temp = f"--temp-dir={folder / 'ray'}"
    try:
        head = ["--head", "--port=0", "--num-cpus=1", "--include-dashboard=false", "--labels=tier=fast", temp]
        worker = ["--num-cpus=2", '--resources={"edge": 2}', "--labels=tier=slow,site=a", temp]
        with node(head, env, folder / "head.log") as printed:
            match = re.search(r"--address='([^']+)'", printed)
            assert match is not None, printed
            with node([f"--address={match[1]}", *worker], env, folder / "worker.log"):
                yield TwoNodes(match[1], env)
    finally:
        kill_holders(token)
        rmtree(folder, ignore_errors=True)


def drive(out: str) -> None:
    """Be the driver, in a process of its own: print where client actors ran, and what they came to."""
    import ray

    from fedray import RunConfig, run
    from fedray.experiment.placement import pool_for
    from fedray.federation.pool import ClientPool, RayPool
    from fedray.federation.worker import Workplace

    def asking(**resources: Any) -> RunConfig:
        clients = {"population": 8, "cohort": 4, "actors": 2, "resources": {"cpu": 0.5, **resources}}
        return RunConfig.from_tree({"rounds": 1, "clients": clients, "tracking": {"uri": "none"}})

    configs = {
        "fast": asking(labels={"tier": "fast"}),
        "slow": asking(labels={"tier": "slow"}),
        "edge": asking(custom={"edge": 1}),
    }
    hosts: dict[str, list[str]] = {}

    def watched(kind: str, place: Workplace) -> ClientPool:
        pool = pool_for(configs[kind])(place)
        assert isinstance(pool, RayPool)
        where = lambda _: ray.get_runtime_context().get_node_id()  # noqa: E731
        hosts[kind] = ray.get([actor.__ray_call__.remote(where) for actor in pool.actors])
        return pool

    def all_kinds(place: Workplace) -> ClientPool:
        watched("fast", place).close()
        watched("slow", place).close()
        return watched("edge", place)

    there = run(configs["edge"], out=Path(out) / "there", pool=all_kinds)
    here = run(configs["edge"].override({"clients.actors": 0}), out=Path(out) / "here")
    nodes = {known["NodeID"]: sorted(known["Resources"]) for known in ray.nodes() if known["Alive"]}
    weights = [there.weights_sha256, here.weights_sha256]
    print(json.dumps({"nodes": nodes, "hosts": hosts, "weights": weights}))  # noqa: T201


@pytest.fixture(scope="module")
def report(two_nodes, tmp_path_factory) -> Tree:
    out = tmp_path_factory.mktemp("runs")
    answer: Tree = elsewhere(f"drive({str(out)!r})", two_nodes.env | {"RAY_ADDRESS": two_nodes.address})
    return answer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "resource"), [("fast", "node:__internal_head__"), ("slow", "edge"), ("edge", "edge")]
)
def test_client_actors_run_on_the_node_that_is_asked_for(report, asked, resource):
    assert len(report["nodes"]) == 2
    (wanted,) = [node_id for node_id, resources in report["nodes"].items() if resource in resources]
    assert report["hosts"][asked] == [wanted, wanted]


@pytest.mark.slow
def test_weights_have_the_same_bits_on_another_node(report):
    there, here = report["weights"]
    assert there == here
