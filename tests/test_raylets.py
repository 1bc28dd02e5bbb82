"""Sweeps on real raylets with a token: addresses, labels, nodes that join, submitted jobs, two at once.

The weights are those of runs in process.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.raylets import (
    DRIVE_S,
    Raylets,
    alone,
    command,
    notes,
    started,
    unfinished,
    wait_for,
    weights,
    write,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes by /proc"),
]


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


HOLD = """
import pathlib, ray, sys, time
ray.init(sys.argv[1], log_to_driver=False)

@ray.remote(num_cpus=1)
def hold(file):
    pathlib.Path(file).touch()
    while pathlib.Path(file).exists():
        time.sleep(0.1)

ray.get(hold.remote(sys.argv[2]))
"""
"""A job that holds a CPU as long as a file exists."""


def test_a_run_and_a_sweep_wait_for_other_work_and_say_so(raylets: Raylets, tmp_path: Path) -> None:
    write(tmp_path, [0], {"method.pause_s": 0.0, "clients.actors": 1})
    held = tmp_path / "held"
    other = subprocess.Popen([sys.executable, "-c", HOLD, raylets.address, str(held)], env=raylets.env)
    wait_for("the CPU is held", lambda: held.exists() or other.poll() is not None)
    assert other.poll() is None
    commands = [command(tmp_path), command(tmp_path, "seed=1")]
    commands[1][3:4] = ["run"]
    commands[1][commands[1].index("--out") + 1] = str(tmp_path / "run")
    waiting = []
    for number, one in enumerate(commands):
        with open(tmp_path / f"said-{number}", "w") as said:
            env = raylets.env | {"RAY_ADDRESS": raylets.address}
            waiting.append(subprocess.Popen(one, env=env, cwd=tmp_path, stdout=said, stderr=said))
    texts = [(tmp_path / f"said-{number}").read_text for number in range(2)]
    wait_for("both say so", lambda: all("for room: one needs 1 × CPU" in text() for text in texts))
    assert "the cluster has 1 × CPU, 0 × GPU, free are 0 × CPU, 0 × GPU, and other work holds" in texts[0]()
    held.unlink()
    assert [process.wait(DRIVE_S) for process in (*waiting, other)] == [0, 0, 0], [text() for text in texts]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert weights(tmp_path) | {1: result["weights_sha256"]} == alone(tmp_path, [0, 1])


def test_two_sweeps_do_not_disturb_each_other(raylets: Raylets, tmp_path: Path) -> None:
    raylets.join("worker", "--num-cpus=1")
    first, second = tmp_path / "first", tmp_path / "second"
    store: dict[str, Any] = {"tracking.uri": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    # a CPU for each trial: with `auto`, a trial takes the whole cluster, and the other sweep waits
    write(first, [0], store | {"clients.actors": 1, "rounds": 300, "method.pause_s": 0.4})
    write(second, [2], store | {"clients.actors": 1, "rounds": 6})
    one, two = (started(raylets, where, "--address", raylets.address) for where in (first, second))
    tracked = [(where / "out" / "trials").glob for where in (first, second)]
    wait_for("both have begun", lambda: all(list(find("*/mlflow.json")) for find in tracked))
    one.kill()
    said, _ = two.communicate(timeout=DRIVE_S)
    assert two.returncode == 0, said
    assert weights(second) == alone(second, [2])
    one.communicate()
    assert one.returncode == -signal.SIGKILL and weights(first) == {}
    free = "ray.available_resources().get('CPU') == ray.cluster_resources()['CPU']"
    wait_for("the killed sweep holds nothing", lambda: raylets.ask(free))
    parents = [json.loads((where / "out" / "mlflow.json").read_text())["run_id"] for where in (first, second)]
    children = {
        json.loads(path.read_text())["run_id"] for path in tmp_path.glob("*/out/trials/*/mlflow.json")
    }
    assert len({*parents, *children}) == 4
