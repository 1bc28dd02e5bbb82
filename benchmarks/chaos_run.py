"""A run of `python -m benchmarks.chaos`: its directory, the processes that work on it, and what must hold."""

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.chaos_clients import VARIABLE

PLUGIN = Path(__file__).with_name("chaos_clients.py")
BASE: dict[str, Any] = {
    "rounds": 6,
    "checkpoint_every": 2,
    "model": "mlp",
    "data": {"name": "digits", "server_fraction": 0.05},
    "clients": {"population": 40, "cohort": 10, "devices": {"laptop": 1.0}, "max_failed": 0.5},
    "method": {"name": "fedavg", "batch_size": 20},
}
RUNS: dict[str, dict[str, Any]] = {
    "staged": {"method": {"name": "staged", "density": 0.3, "stages": 3}},
    "agent": {"method": {"name": "staged", "density": 0.2, "policy": "agent", "stages": 3}},
    "prunefl": {"method": {"name": "prunefl"}},
    "fedmef": {"method": {"name": "fedmef", "density": 0.3}},
    "ceafl": {"method": {"name": "ceafl"}},
    "frlp": {"method": {"name": "frlp"}},
    "topk": {"clients": {"uplink": {"name": "topk"}}},
    "oort": {"clients": {"sampler": {"name": "oort"}}, "method": {"name": "fedavg", "momentum": 0.5}},
}
"""Runs whose state is more than weights: a method's, its clients', the codec's or the sampler's memory."""
PATIENCE_S = 240.0
"""Seconds that one process may take; longer is a hang."""
CLOCKS = ("wall_s", "server_wall_s")


@dataclass(frozen=True)
class Schedule:
    """What happens in one run.

    Args:
        number: its number; with the seed, all else follows from it.
        run: one of RUNS.
        actors: Ray actors that host the clients.
        stored: whether MLflow tracks it in a file of SQLite.
        clients: "round client" → what the client does there.
        faults: names in FAULTS, one for each process that works on the run until none is left.
    """

    number: int
    run: str
    actors: int
    stored: bool
    clients: dict[str, str]
    faults: tuple[str, ...]


# ── a run, process after process ─────────────────────────────────────────────────────────────────────────


@dataclass
class Play:
    """A run in its directory, and the process that works on it.

    Args:
        folder: of the schedule; the run is `folder/run`.
        rng: draws the moments.
        schedule: what is played.
        processes: every process that was seen below those that worked on the run.
        damaged: files that were damaged.
    """

    folder: Path
    rng: np.random.Generator
    schedule: Schedule
    processes: set[psutil.Process] = field(default_factory=set)
    damaged: list[str] = field(default_factory=list)
    worker: Any = None

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.folder / "run"

    def start(self) -> None:
        """Begin the run, or resume it."""
        began = (self.run / "config.yaml").exists()
        command = (
            ["resume", "run"] if began else ["run", "config.yaml", "--import", str(PLUGIN), "--out", "run"]
        )
        environment = {
            VARIABLE: json.dumps(self.schedule.clients),
            f"{VARIABLE}_DIED": str(self.folder / "died") if self.schedule.actors else "",
            "TMPDIR": str(self.folder / "tmp"),
            "RAY_TMPDIR": "/tmp",
            "RAY_ADDRESS": "local",
        }
        if not began and self.run.exists():
            shutil.rmtree(self.run)  # it died before it had begun
        spawn = multiprocessing.get_context("forkserver")
        self.worker = spawn.Process(target=_work, args=(self.folder, command, environment))
        output = self.folder / "output.txt"
        output.unlink(missing_ok=True)
        self.worker.start()
        while self.worker.is_alive() and not output.exists():  # from then on it takes signals
            time.sleep(0.005)

    def look(self) -> list[psutil.Process]:
        """Return the living processes below the one that works on the run; remember them."""
        try:
            found = list(psutil.Process(self.worker.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []
        self.processes |= set(found)
        return found

    def reach(self) -> None:
        """Wait for a random moment: after a random round has ended, or the process has."""
        line, delay = int(self.rng.integers(0, 7)), float(self.rng.uniform(0, 0.3))
        rounds = self.run / "rounds.jsonl"
        until = time.monotonic() + PATIENCE_S
        while self.worker.is_alive() and time.monotonic() < until:
            if rounds.exists() and rounds.read_bytes().count(b"\n") >= line:
                break
            time.sleep(0.005)
        time.sleep(delay)
        self.look()

    def kill(self) -> None:
        """Kill the process that works on the run."""
        self.look()
        self.worker.kill()
        self.worker.join()

    def end(self) -> int:
        """Wait for the process; return its exit status, or raise TimeoutError."""
        until = time.monotonic() + PATIENCE_S
        while self.worker.is_alive():
            self.look()
            self.worker.join(0.2)
            if time.monotonic() > until:
                raise TimeoutError(f"no end in {PATIENCE_S:.0f} s")
        return int(self.worker.exitcode)

    def said(self) -> str:
        """Return what the last process printed."""
        return (self.folder / "output.txt").read_text(errors="replace")


def _work(folder: Path, command: list[str], environment: dict[str, str]) -> None:
    """Be `fedray COMMAND`, in this new process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["fedray", *command]
    from fedray.cli import main

    main()


def prepared(folder: Path, schedule: Schedule, rng: np.random.Generator) -> Play:
    """Write the config of a schedule into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    changes = RUNS[schedule.run]
    tree = {
        key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in BASE.items()
    }
    tree["clients"] |= {"actors": schedule.actors}
    if schedule.actors:
        tree["clients"] |= {"resources": {"cpu": 0.5}}
    tree["tracking"] = {"uri": f"sqlite:///{folder}/store.db" if schedule.stored else "none"}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return Play(folder, rng, schedule)


def command_of(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


# ── what must hold ───────────────────────────────────────────────────────────────────────────────────────


def figures(run: Path) -> dict[str, Any]:
    """Return all that must be equal: weights, metrics without clocks, client records."""
    import pandas as pd

    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    return {
        "weights": result["weights_sha256"],
        "rounds": [line["round"] for line in rounds],
        "metrics": [
            {k: v for k, v in values.items() if not k.endswith(CLOCKS) and k not in ("checksum", "status")}
            for values in (*(line["metrics"] for line in rounds), result)
        ],
        "clients": pd.read_parquet(run / "clients.parquet").to_csv(index=False),
    }


def problems(play: Play, expected: dict[str, Any], weights: str) -> Iterator[str]:
    """Yield what is wrong with a run that finished."""
    found = figures(play.run)
    lost = {path.split()[1].split("/")[0] for path in play.damaged}
    for name, value in expected.items():
        if found[name] != value and not (name == "clients" and "clients.parquet" in lost):
            yield f"other {name}"
    if found["weights"] != weights:
        yield "other weights than without the clients that misbehave"
    store = play.folder / "store.db"
    if store.exists():
        with sqlite3.connect(store) as connection:
            query = "select key, step from metrics group by run_uuid, key, step having count(*) > 1"
            yield from (f"{key} of step {step} twice in the store" for key, step in connection.execute(query))


def leftovers(play: Play) -> Iterator[str]:
    """Yield processes and token files that are still there some seconds after the end."""
    _, alive = psutil.wait_procs(play.processes, timeout=30)
    yield from (f"left: process {' '.join(command_of(p))[:80]}" for p in alive)
    yield from (f"left: {path.name}" for path in (play.folder / "tmp").glob("fedray-token-*"))
