"""`fedray plan`: its estimates beside a real run; it leaves nothing behind, and names what does not fit."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedray
from fedray import cli
from fedray.config import yaml_text
from fedray.experiment.room import Autoscaler, Node
from fedray.experiment.run import run
from fedray.sweeps import planning
from fedray.sweeps.planning import plan
from tests.experiment import tiny


def test_a_plan_is_near_the_real_run_and_leaves_nothing(in_tmp: Path) -> None:
    config = tiny.config(rounds=20)
    found = plan([config], None, sweeps=False, measures=True)
    assert tiny.listing(in_tmp) == []
    real = run(config, out=in_tmp / "r").result
    for name, value in {
        "total/bytes/up": found.up_bytes,
        "total/bytes/down": found.down_bytes,
        "total/flops/clients": found.flops,
    }.items():
        assert value == pytest.approx(real[name], rel=0.35), name  # which clients drop out is chance
    size = sum(file.stat().st_size for file in (in_tmp / "r").rglob("*") if file.is_file())
    assert found.disk_bytes == pytest.approx(size, rel=0.6)
    assert (found.rounds, found.trials, found.problems) == (20, 1, ())
    assert found.wall_s and found.memory_bytes


def test_without_a_measure_it_only_counts() -> None:
    found = plan([tiny.config(), tiny.config(seed=1)], 1, sweeps=True, measures=False)
    assert (found.trials, found.rounds, found.concurrent, found.wall_s) == (2, 2 * tiny.ROUNDS, 1, None)


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = tiny.config({"clients.actors": 3, "clients.resources.cpu": 1000})
    found = plan([config], None, sweeps=False, measures=False)
    assert any("client actors need 3000 CPUs" in problem for problem in found.problems)


GIB = 2.0**30
NODES = [Node({"CPU": 4.0, "memory": 2 * GIB}), Node({"CPU": 2.0, "GPU": 1.0, "memory": 8 * GIB})]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of two nodes, to which this process is connected."""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(planning, "start_ray", lambda: None)
    monkeypatch.setattr(planning, "cluster_nodes", lambda: NODES)
    monkeypatch.setattr(planning, "cluster_cpus", lambda **_: 6.0)
    monkeypatch.setattr(planning, "autoscaler", lambda: None)


def test_with_an_address_the_plan_is_of_the_cluster(cluster: None) -> None:
    found = plan([tiny.config()] * 9, None, sweeps=True, measures=False)
    assert (found.concurrent, found.problems) == (6, ())
    assert found.where == "the Ray cluster at 10.0.0.1:6379 (2 nodes, 6 CPUs)"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"clients.actors": 7, "clients.resources.cpu": 1}, "the run needs 7 × CPU for its client actors"),
        ({"clients.actors": 1, "clients.resources.cpu": 5}, "but no node of the cluster has that much"),
        ({"clients.actors": 2, "clients.resources.gpu": 1}, "needs 2 × CPU, 2 × GPU|needs 2 × GPU"),
    ],
)
def test_what_does_not_fit_the_cluster_is_named(cluster: None, changes: dict[str, Any], problem: str) -> None:
    found = plan([tiny.config(changes)] * 1, None, sweeps=False, measures=False)
    assert len(found.problems) == 1 and re.search(problem, found.problems[0])


def test_a_plan_does_not_wait_for_an_autoscaler(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "autoscaler", Autoscaler)
    config = tiny.config({"clients.actors": 2, "clients.resources.gpu": 1})
    (problem,) = plan([config], None, sweeps=False, measures=False).problems
    assert problem.endswith("1 × GPU; it waits for the cluster's autoscaler")


def test_memory_is_that_of_the_nodes(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    none = (0.0,) * len(planning.COSTS)

    def of(memory: float) -> tuple[str, ...]:
        small = planning.Measure(1.0, 1.0, none, none, 1, int(memory))
        monkeypatch.setattr(planning, "measure", lambda config: small)
        return plan([tiny.config()] * 6, None, sweeps=True, measures=True).problems

    assert of(GIB) == ()
    assert "6 processes need about 12 GiB of memory, and the Ray cluster" in of(2 * GIB)[0]
    assert "no node of the Ray cluster at 10.0.0.1:6379 (2 nodes, 6 CPUs) has more than 8" in of(9 * GIB)[0]


def test_a_cluster_that_is_not_there_is_one_message(in_tmp: Path) -> None:
    (in_tmp / "x.yaml").write_text(yaml_text.dump(tiny.TREE))
    # a new process: this one may be connected to the Ray of an earlier test
    command = [sys.executable, "-m", "fedray", "plan", "x.yaml", "--address", "127.0.0.1:1"]
    paths = os.pathsep.join([str(Path(fedray.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"RAY_ADDRESS": "", "PYTHONPATH": paths}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("failed: no Ray cluster at --address '127.0.0.1:1'")
    assert (done.stdout, done.stderr.count("\n")) == ("", 1)
    assert tiny.listing(in_tmp) == ["x.yaml"]


def test_the_command_plans_a_sweep(in_tmp: Path) -> None:
    (in_tmp / "s.yaml").write_text(
        yaml_text.dump({"base": tiny.TREE, "space": {"method.name": {"grid": ["fedavg", "snip"]}}})
    )
    done = CliRunner().invoke(cli.app, ["plan", "s.yaml", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert (told["trials"], told["rounds"]) == (2, 2 * tiny.ROUNDS) and told["up_bytes"] > 0
    assert tiny.listing(in_tmp) == ["s.yaml"]
