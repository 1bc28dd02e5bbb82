"""A folder that two nodes see as `storage`: what one began, the other resumes, with the same weights."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedray.config import yaml_text
from fedray.experiment.run import run
from tests.experiment import tiny
from tests.publishing.nodes import Apart, fedray, plan, weights_of
from tests.raylets import WHERE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def kill_once(command: Any, is_time: Callable[[], bool]) -> None:
    """Kill a process by SIGKILL as soon as it is time."""
    ends = time.monotonic() + 240
    while not is_time():
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < ends
        time.sleep(0.02)
    command.send_signal(signal.SIGKILL)
    command.communicate()


def on(where: dict[str, Any], address: str) -> dict[str, Any]:
    return {"cwd": where["cwd"], "env": where["env"] | {"RAY_ADDRESS": address}}


def rounds_of(path: Path) -> list[int]:
    lines = (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["round"] for line in lines]


def test_a_sweep_of_two_nodes_is_resumed_from_the_other_one(tmp_path: Path, apart: Apart, weights) -> None:
    """Trials run on both nodes; the driver is killed with a point finished, and the second node resumes."""
    tree = plan(str(tmp_path / "shared"), concurrent=2)
    tree["base"]["method"] |= {"name": "where", "pause_s": 0.1}
    (tmp_path / "x.yaml").write_text(yaml_text.dump(tree))
    (tmp_path / "notes").mkdir()
    (tmp_path / "where.py").write_text(WHERE.replace("FOLDER", repr(str(tmp_path / "notes"))))
    path = tmp_path / "shared" / "x-001"
    command = ["sweep", tmp_path / "x.yaml", "--import", tmp_path / "where.py"]
    with fedray(*command, **on(apart.driver, apart.address)) as driver:
        kill_once(driver, lambda: any(path.glob("trials/*/result.json")))
    assert len(weights_of(path)) < 3
    with fedray("resume", path, within=apart.disk, **on(apart.other, apart.address)) as again:
        said, _ = again.communicate()
    assert again.returncode == 0, said
    assert weights_of(path) == weights
    assert len(list((tmp_path / "notes").glob("trial-*"))) == 2, "trials ran on both nodes"
    assert not (tmp_path / "a" / "runs").exists() and not (tmp_path / "other" / "runs").exists()


def test_a_run_on_actors_of_two_nodes_is_resumed_from_the_other_one(tmp_path: Path, apart: Apart) -> None:
    changes = {"storage": str(tmp_path / "shared"), "rounds": 30, "clients.actors": 2, "checkpoint_every": 2}
    config = tiny.config(changes)
    (tmp_path / "x.yaml").write_text(yaml_text.dump({"base": config.to_tree()}))
    alone = run(config.override({"clients.actors": 0, "storage": None}), out=tmp_path / "alone")
    with fedray("run", tmp_path / "x.yaml", **on(apart.driver, apart.address)) as driver:
        (path,) = found(tmp_path / "shared", driver)
        kill_once(driver, lambda: (path / "rounds.jsonl").exists() and len(rounds_of(path)) > 5)
    assert not (path / "result.json").exists()
    with fedray("resume", path, within=apart.disk, **on(apart.other, apart.address)) as again:
        said, _ = again.communicate()
    assert again.returncode == 0, said
    assert json.loads((path / "result.json").read_text())["weights_sha256"] == alone.weights_sha256
    assert rounds_of(path) == list(range(31))


def found(folder: Path, command: Any) -> list[Path]:
    """Return the directories in a folder once there is one."""
    ends = time.monotonic() + 120
    while not (paths := [path for path in folder.glob("*") if path.is_dir()]):
        assert command.poll() is None, command.communicate()[0]
        assert time.monotonic() < ends
        time.sleep(0.05)
    return paths
