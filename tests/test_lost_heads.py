"""The head of a cluster dies or hangs: one message in time, nothing lost, the same weights after `resume`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.raylets import DRIVE_S, Raylets, alone, command, unfinished, wait_for, weights, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes by /proc"),
]

END_S = 58.0
"""Seconds in which a command ends after its head was lost; Ray would end it after 60 s, without a word."""


def begun(arguments: list[str], raylets: Raylets, folder: Path, **env: str) -> subprocess.Popen[bytes]:
    """Start a command that writes what it says into `said`."""
    with open(folder / "said", "w") as said:
        return subprocess.Popen(arguments, env=raylets.env | env, cwd=folder, stdout=said, stderr=said)


def of_a_run(folder: Path, seed: int) -> list[str]:
    """Return `fedray run` of the base of the sweep in a folder."""
    arguments = command(folder, f"seed={seed}")
    arguments[3] = "run"
    return arguments


def rounds_of(path: Path) -> int:
    file = path / "rounds.jsonl"
    return len(file.read_text(encoding="utf-8").splitlines()) if file.exists() else 0


def resumed(folder: Path, *arguments: str) -> str:
    """Resume what is in a folder, without a cluster."""
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "fedray.cli", "resume", "out", *arguments],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=DRIVE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_end(running: subprocess.Popen[bytes], folder: Path, since: float) -> None:
    """Check that a command ends in time with one message."""
    status = running.wait(END_S)
    said, seconds = (folder / "said").read_text(), time.monotonic() - since
    print(f"{seconds:.1f} s, status {status}\n{said}")  # noqa: T201
    assert status == 1, said
    assert said.count("failed: the head of the Ray cluster at ") == 1
    assert "did not answer for 30 s" in said and "`fedray resume out`" in said
    for noise in ("Traceback", "GCS may have been killed", "rpc_client.h"):
        assert noise not in said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_run_whose_head_is_lost_ends_in_time_and_is_resumed(raylets: Raylets, tmp_path: Path, how) -> None:
    raylets.join("worker", "--num-cpus=1")
    write(tmp_path, [0], {"clients.actors": 2, "rounds": 20, "method.pause_s": 0.3, "checkpoint_every": 3})
    running = begun(of_a_run(tmp_path, 0), raylets, tmp_path, RAY_ADDRESS=raylets.address)
    wait_for("some rounds are done", lambda: rounds_of(tmp_path / "out") > 4)
    (gcs,) = raylets.processes("gcs_server")
    os.kill(gcs, how)
    check_end(running, tmp_path, time.monotonic())
    done = rounds_of(tmp_path / "out")
    assert done < 21 and list((tmp_path / "out" / "checkpoints").glob(f"*{done - 1}.checkpoint"))
    resumed(tmp_path, "clients.actors=0")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert {0: result["weights_sha256"]} == alone(tmp_path, [0])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "hangs"])
def test_a_sweep_whose_head_is_lost_ends_in_time_and_is_resumed(
    raylets: Raylets, tmp_path: Path, how
) -> None:
    changes: dict[str, Any] = {"clients.actors": 1, "rounds": 12, "method.pause_s": 0.3}
    write(tmp_path, [0, 1], changes, concurrent=1)
    running = begun(command(tmp_path), raylets, tmp_path, RAY_ADDRESS=raylets.address)
    wait_for("a trial has rounds", lambda: any(rounds_of(p) > 3 for p in tmp_path.glob("out/trials/*")))
    (gcs,) = raylets.processes("gcs_server")
    os.kill(gcs, how)
    check_end(running, tmp_path, time.monotonic())
    assert unfinished(tmp_path) == 1
    resumed(tmp_path)
    assert weights(tmp_path) == alone(tmp_path, [0, 1])


# ── submitted jobs


@pytest.mark.parametrize("lost", ["the driver", "the head"])
def test_a_submitted_sweep_that_is_lost_is_resumed(raylets: Raylets, tmp_path: Path, lost: str) -> None:
    """Its files are there, in the folder that all nodes see."""
    write(tmp_path, [0, 1], {"clients.actors": 1, "rounds": 12, "method.pause_s": 0.3}, concurrent=1)
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", raylets.dashboard]
    running = begun([*submit, "--", *command(tmp_path)], raylets, tmp_path)
    wait_for("a trial has rounds", lambda: any(rounds_of(p) > 3 for p in tmp_path.glob("out/trials/*")))
    drivers = [pid for pid in raylets.processes("fedray.cli sweep") if pid != running.pid]
    for pid in drivers if lost == "the driver" else raylets.processes("gcs_server"):
        os.kill(pid, signal.SIGKILL)
    since = time.monotonic()
    status = running.wait(2 * END_S)
    said = (tmp_path / "said").read_text()
    print(f"{time.monotonic() - since:.1f} s, status {status}\n{said[-3000:]}")  # noqa: T201
    assert status != 0
    wait_for("no driver is left", lambda: not raylets.processes("fedray.cli sweep"))
    assert unfinished(tmp_path) == 1
    if lost == "the driver":  # the cluster is there: once more as a job
        again = [*submit, "--", sys.executable, "-m", "fedray.cli", "resume", str(tmp_path / "out")]
        done = subprocess.run(again, env=raylets.env, capture_output=True, text=True, timeout=DRIVE_S)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        resumed(tmp_path)
    assert weights(tmp_path) == alone(tmp_path, [0, 1])


# ── the start


@pytest.mark.parametrize("address", ["auto", "by its address"])
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_head_that_hangs_is_one_message_within_30_s(
    raylets: Raylets, tmp_path: Path, kind: str, address: str
) -> None:
    write(tmp_path, [0], {"clients.actors": 1})
    (gcs,) = raylets.processes("gcs_server")
    os.kill(gcs, signal.SIGSTOP)
    given = "auto" if address == "auto" else raylets.address
    arguments = of_a_run(tmp_path, 0) if kind == "run" else command(tmp_path)
    began = time.monotonic()
    running = begun([*arguments, "--address", given], raylets, tmp_path)
    assert running.wait(60) == 1
    seconds, said = time.monotonic() - began, (tmp_path / "said").read_text()
    os.kill(gcs, signal.SIGCONT)
    print(f"{seconds:.1f} s\n{said}")  # noqa: T201
    assert seconds < 30
    assert (
        f"failed: no Ray cluster at --address {given!r}: something listens there, but did not answer" in said
    )
    assert not (tmp_path / "out").exists() and "Traceback" not in said
