"""A cluster whose autoscaler starts raylets on this machine: a run waits for them, or is refused.

The provider of nodes is the one with which Ray tests its autoscalers.
"""

import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.config.overrides import override_tree
from tests.experiment import tiny
from tests.test_cluster import kill_holders, node, own_env

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes by /proc"),
]

HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
TYPES: dict[str, Any] = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "edge": {
        "resources": {"CPU": 2, "edge": 2},
        "labels": {"tier": "edge"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 1,
    },
}


def config(address: str) -> dict[str, Any]:
    """Return the file of a cluster that grows on this machine."""
    lists = [
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
        "initialization_commands",
        "setup_commands",
    ]
    lists += [
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ]
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {
            # by its name version 2 looks for a file of defaults that Ray's wheel lacks
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "launch_multiple": True,
            "head_node_id": HEAD_ID,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": TYPES,
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }


@pytest.fixture(params=["version 1", "version 2"])
def growing(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, str], int]]:
    """The address of a head without CPUs, the environment of its cluster, and the autoscaler's version."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="fr"))  # short: sockets' paths end at 107 characters
    token, file = folder / "token", folder / "cluster.json"
    version = 2 if request.param.endswith("2") else 1
    env = own_env(token) | {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    head_env = (
        {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID, "RAY_CLOUD_INSTANCE_ID": HEAD_ID}
        if version == 2
        else {}
    )
    if version == 2:
        env["RAY_enable_autoscaler_v2"] = "1"
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        port = s.getsockname()[1]
    ip = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
    file.write_text(json.dumps(config(f"{ip}:{port}")), encoding="utf-8")
    head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    head += [f"--autoscaling-config={file}", f"--temp-dir={folder / 'ray'}"]
    try:
        with node(head, env | head_env, folder / "head.log"):
            yield f"{ip}:{port}", env, version
    finally:
        kill_holders(token)
        rmtree(folder, ignore_errors=True)


def made(folder: Path, env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedray.cli", "run", "x.yaml", *arguments]
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_run_waits_for_nodes_or_is_refused(growing: Any, tmp_path: Path) -> None:
    address, env, version = growing
    (tmp_path / "x.yaml").write_text(yaml_text.dump({"base": override_tree(tiny.TREE, {})}), encoding="utf-8")
    if version == 2:  # version 1 says nothing: it would be waited for 120 s
        begun = time.monotonic()
        asked = [
            "clients.actors=1",
            "clients.resources.custom.nowhere=1",
            "--address",
            address,
            "--out",
            "no",
        ]
        done = made(tmp_path, env, *asked)
        assert done.returncode == 2 and "its autoscaler can start no node for it" in done.stderr, done.stderr
        assert "1 × nowhere for its client actors, but the cluster has 0 × CPU, 0 × GPU" in done.stderr
        assert time.monotonic() - begun < 60 and not (tmp_path / "no").exists()
    labels = ["clients.resources.labels.tier=edge"] if version == 2 else []
    asked = ["clients.actors=2", "clients.resources.custom.edge=1"]
    asked += ["--address", address, "--out", "there"]
    done = made(tmp_path, env, *asked, *labels)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "autoscaler" in line]
    assert len(said) == 1 and re.search(
        "needs 2 × CPU, 2 × edge.*waiting for the cluster's autoscaler", said[0]
    )
    here = made(tmp_path, env, "--out", "here")
    assert here.returncode == 0, here.stderr
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("there", "here")]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
