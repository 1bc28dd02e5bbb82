"""Two nodes on this machine, of which the second has another disk where the first has its files."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.experiment import tiny
from tests.test_cluster import ROOT, kill_holders, node, own_env

RATES = [0.05, 0.1, 0.2]


def plan(storage: str, **tune: Any) -> dict[str, Any]:
    base = tiny.config({"storage": storage, "rounds": 4, "clients.actors": "auto"}).to_tree()
    return {"base": base, "space": {"method.lr": {"grid": RATES}}, "tune": {"concurrent": 1, **tune}}


def weights_of(path: Path) -> set[str]:
    return {json.loads(file.read_text())["weights_sha256"] for file in path.glob("trials/*/result.json")}


def fedray(*arguments: object, within: list[str] | None = None, **options: Any) -> "subprocess.Popen[str]":
    """Start a command; `within` starts it, if given."""
    command = [*(within or []), sys.executable, "-m", "fedray.cli", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def home(tmp_path: Path, name: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Return where and how a command of a node runs."""
    (tmp_path / name).mkdir()
    cache = {"XDG_CACHE_HOME": str(tmp_path / f"cache-{name}"), "PYTHONPATH": str(ROOT)}
    return {"cwd": tmp_path / name, "env": (env or dict(os.environ)) | cache}


@dataclass(frozen=True)
class Apart:
    """Two nodes of one CPU.

    Args:
        address: of the head.
        driver: where and how commands run on the first node.
        other: the same of the second node, which has another disk where the first has its working directory.
        disk: what starts a command so that it sees the second node's disk.
    """

    address: str
    driver: dict[str, Any]
    other: dict[str, Any]
    disk: list[str]


@contextmanager
def two_nodes(tmp_path: Path) -> Iterator[Apart]:
    """Start them; the second has another disk where the first has the folder `a`."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a second disk needs the right to mount one")
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="fr"))  # short: sockets' paths end at 107 characters
    token = folder / "token"
    env = own_env(token)
    driver, other = home(tmp_path, "a", env), home(tmp_path, "other", env)
    temp = f"--temp-dir={folder / 'ray'}"
    disk = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path / "a")]
    try:
        head = ["--head", "--port=0", "--num-cpus=1", "--include-dashboard=false", temp]
        with node(head, driver["env"], folder / "head.log") as printed:
            match = re.search(r"--address='([^']+)'", printed)
            assert match is not None, printed
            worker = [f"--address={match[1]}", "--num-cpus=1", temp]
            with node(worker, other["env"], folder / "worker.log", disk):
                yield Apart(match[1], driver, other, disk)
    finally:
        kill_holders(token)
        shutil.rmtree(folder, ignore_errors=True)
