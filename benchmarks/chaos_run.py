"""A run of `python -m benchmarks.chaos`: its directory, and the processes that work on it in turn."""

import atexit
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from tests.tracking.servers import Proxy, mlflow_server

PLUGIN = Path(__file__).with_name("chaos_clients.py")
"""Never imported by name: the run's process would take that module, and its actors none."""
VARIABLE = "FEDRAY_CHAOS"
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
ON_ACTORS: dict[str, Any] = {"resources": {"cpu": 0.5}, "patience": 2}
"""Keys of `clients` in runs on actors. With so little patience, the limit of a call is its floor of 30 s."""
PATIENCE_S = 600.0
"""Seconds that one process may take; longer is a hang."""


@dataclass(frozen=True)
class Schedule:
    """What happens in one run.

    Args:
        number: its number; with the seed, all else follows from it.
        run: one of RUNS.
        actors: Ray actors that host the clients.
        store: what tracks it: none, a file of SQLite, or MLflow's server.
        clients: "round client" → what the client does there.
        faults: names in FAULTS, in the order in which they happen.
    """

    number: int
    run: str
    actors: int
    store: str
    clients: dict[str, str]
    faults: tuple[str, ...]


class Server:
    """MLflow's real server behind a proxy that fails; started when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = ExitStack()

    @cached_property
    def proxy(self) -> Proxy:
        """The proxy."""
        self.folder.mkdir()
        return Proxy(self._open.enter_context(mlflow_server(self.folder)))

    def close(self) -> None:
        """End the server."""
        self._open.close()


# ── a run, process after process ─────────────────────────────────────────────────────────────────────────


@dataclass
class Play:
    """A run in its directory, and the process that works on it.

    Args:
        folder: of the schedule; the run is `folder/run`.
        rng: draws the moments.
        schedule: what is played.
        server: MLflow's.
        processes: every process that was seen below those that worked on the run.
        damaged: "how path" of files that were damaged.
        seen: how many of them the last process found.
        found: path → content of the run's files when the last process began, once files are damaged.
        timers: end outages of the server.
    """

    folder: Path
    rng: np.random.Generator
    schedule: Schedule
    server: Server | None = None
    processes: set[psutil.Process] = field(default_factory=set)
    damaged: list[str] = field(default_factory=list)
    seen: int = 0
    found: dict[str, bytes] = field(default_factory=dict)
    timers: list[threading.Timer] = field(default_factory=list)
    worker: Any = None

    @property
    def run(self) -> Path:
        """The run's directory."""
        return self.folder / "run"

    def content(self) -> dict[str, bytes]:
        """Return path → content of the run's files."""
        files = {str(p.relative_to(self.run)): p for p in self.run.rglob("*") if p.is_file()}
        return {name: path.read_bytes() for name, path in files.items() if name != ".lock"}

    def start(self, command: tuple[str, ...] = ("resume", "run")) -> None:
        """Resume the run, or begin it; or do another command."""
        if not (self.run / "config.yaml").exists() and not self.damaged:
            command = ("run", "config.yaml", "--import", str(PLUGIN), "--out", "run")
            if self.run.exists():
                shutil.rmtree(self.run)  # it died before it had begun
        self.seen = len(self.damaged)
        self.found = self.content() if self.damaged else {}
        environment = {
            VARIABLE: json.dumps(self.schedule.clients),
            f"{VARIABLE}_MARKS": str(self.folder / "marks") if self.schedule.actors else "",
            "TMPDIR": str(self.folder / "tmp"),
            "RAY_TMPDIR": "/tmp",
            "RAY_ADDRESS": "local",
        }
        ready, self._pipe = self.folder / "ready", self.folder / "pipe"
        ready.unlink(missing_ok=True)
        self._pipe.unlink(missing_ok=True)
        os.mkfifo(self._pipe)
        # a pipe: a full disk must not swallow what the process says
        source = os.open(self._pipe, os.O_RDONLY | os.O_NONBLOCK)
        output = (self.folder / "output.txt").open("wb", buffering=0)  # nobody reads what the last one said
        self._reader = threading.Thread(target=_copy, args=(source, output), daemon=True)
        spawn = multiprocessing.get_context("forkserver")
        self.worker = spawn.Process(target=_work, args=(self.folder, command, environment))
        self.worker.start()
        while self.worker.is_alive() and not ready.exists():  # from then on it takes signals
            time.sleep(0.005)
        self._reader.start()

    def look(self) -> list[psutil.Process]:
        """Return the living processes below the one that works on the run; remember them."""
        try:
            found = list(psutil.Process(self.worker.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []
        self.processes |= set(found)
        return found

    def reach(self, began: int = 0) -> None:
        """Wait for a random moment: after a random round has ended, or the process has.

        Args:
            began: rounds that this process itself must have made by then.
        """
        line, delay = int(self.rng.integers(0, 7)), float(self.rng.uniform(0, 0.3))
        rounds = self.run / "rounds.jsonl"
        self.wait(lambda: rounds.exists() and rounds.read_bytes().count(b"\n") >= line)
        self.wait(lambda: began == 0 or len(re.findall(r"round \d+ of", self.said())) >= began)
        time.sleep(delay)
        self.look()

    def wait(self, there: Callable[[], bool]) -> None:
        """Wait until something is there, or the process has ended."""
        until = time.monotonic() + PATIENCE_S
        while self.worker.is_alive() and time.monotonic() < until and not there():
            time.sleep(0.005)

    def actors(self) -> list[psutil.Process]:
        """Return the client actors."""
        return [p for p in self.look() if "ClientActor" in " ".join(command_of(p))]

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
        self._reader.join(2)
        return int(self.worker.exitcode)

    def said(self) -> str:
        """Return what the last process printed."""
        return (self.folder / "output.txt").read_text(errors="replace")

    def mend(self) -> None:
        """End an outage of the server."""
        for timer in self.timers:
            timer.cancel()
        if self.server is not None and self.schedule.store == "server":
            self.server.proxy.mend()

    def wake(self) -> None:
        """Let the processes continue that were stopped."""
        for process in self.processes:
            with suppress(psutil.Error):
                if process.status() == psutil.STATUS_STOPPED:
                    process.resume()


def _copy(source: int, file: Any) -> None:
    """Copy what arrives in a pipe to a file, until nobody writes to it."""
    os.set_blocking(source, True)
    with file, os.fdopen(source, "rb", buffering=0) as pipe:
        while part := pipe.read(65536):
            file.write(part)


def _work(folder: Path, command: tuple[str, ...], environment: dict[str, str]) -> None:
    """Be `fedray COMMAND`, in this new process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.dont_write_bytecode = True  # Python 3.11 does not notice that a disk takes half a file
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None
    output = os.open("pipe", os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.argv = ["fedray", *command]
    from fedray.cli import main

    Path("ready").touch()
    try:
        main()
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them


def prepared(
    folder: Path, schedule: Schedule, rng: np.random.Generator, server: Server | None = None
) -> Play:
    """Write the config of a schedule into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("tmp", "marks"):
        (folder / name).mkdir(parents=True)
    changes = RUNS[schedule.run]
    tree = {
        key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in BASE.items()
    }
    tree["clients"] |= {"actors": schedule.actors} | (ON_ACTORS if schedule.actors else {})
    uri = {"none": "none", "sqlite": f"sqlite:///{folder}/store.db"}.get(schedule.store)
    if uri is None:
        assert server is not None
        uri = server.proxy.uri
    tree["tracking"] = {"uri": uri, "experiment": folder.name}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return Play(folder, rng, schedule, server)


def command_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process; nothing if it is gone."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []
