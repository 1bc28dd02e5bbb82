"""What must hold of the runs of `python -m benchmarks.chaos`: how they may end, and what they must equal."""

import json
import re
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.chaos_faults import FAULTS, MISBEHAVIOUR
from benchmarks.chaos_run import Play, Schedule, command_of, prepared

WRONG = "WRONG"
EARLY = ("always dies", "always sleeps")
"""What clients do instead of training; it has the effect of raising an error at once."""
CLOCKS = ("wall_s", "server_wall_s")
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
AGENTS_S = 90.0
"""Seconds after which Ray's two agents must be gone. After SIGKILL of their raylet they tell the driver of it
for 61 s, in vain."""
FULL = re.compile(r"/\S+: cannot be written: .*; free space, then `fedray resume", re.DOTALL)


class References:
    """Figures of undisturbed runs in process, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, schedule: Schedule) -> dict[str, Any]:
        """Return the figures of a run in which only clients misbehave."""
        clients = {k: "fails first" if v in EARLY else v for k, v in schedule.clients.items()}
        return self._of(schedule.run, {k: v for k, v in clients.items() if v not in ("dies", "sleeps")})

    def without(self, schedule: Schedule) -> str:
        """Return the SHA-256 of the weights of a run to which these clients send nothing."""
        clients = {k: v for k, v in schedule.clients.items() if v in EARLY or v in MISBEHAVIOUR}
        return str(self._of(schedule.run, dict.fromkeys(clients, "silent"))["weights"])

    def _of(self, run: str, clients: dict[str, str]) -> dict[str, Any]:
        key = json.dumps([run, clients], sort_keys=True)
        if key not in self._known:
            folder = self.folder / f"reference-{len(self._known)}"
            play = prepared(folder, Schedule(-1, run, 0, "none", clients, ()), np.random.default_rng(0))
            play.start()
            if play.end():
                raise RuntimeError(f"an undisturbed run failed:\n{play.said()}")
            self._known[key] = figures(play.run)
            shutil.rmtree(folder)
        return self._known[key]


# ── how a process ended ──────────────────────────────────────────────────────────────────────────────────


def ended(play: Play, status: int, happened: list[str], references: References) -> str | None:
    """Return how a schedule ended with a process; None if the run must be resumed.

    Args:
        play: the schedule.
        status: exit status of its last process.
        happened: the faults that happened to that process.
        references: undisturbed runs.
    """
    if "Traceback" in play.said():
        return f"{WRONG}: a traceback"
    if status == 0:
        is_news = len(play.damaged) > play.seen
        return None if is_news else _told(problems(play, references)) or "equal"
    if status not in {one for name in happened for one in FAULTS[name].statuses}:
        if not play.seen or status not in (1, 2):
            return f"{WRONG}: status {status}: {play.said()[-300:]}"
        return _told(wrong_refusal(play), play.said()) or "refused"
    if status != 1:
        return None
    if play.seen and not any(wrong_refusal(play)):
        return "refused"
    return _told(wrong_end_of_space(play), play.said())


def _told(wrong: Iterator[str], said: str = "") -> str | None:
    """Return that a schedule ended as it should not, if something is wrong."""
    parts = list(wrong)
    return f"{WRONG}: {'; '.join(parts[:3])} {said[-300:]}".rstrip() if parts else None


def wrong_refusal(play: Play) -> Iterator[str]:
    """Yield what is wrong with a refused resume: it names a damaged file, and has changed nothing."""
    said = "".join(play.said().split())  # it may have been folded
    names = [part for how in play.damaged for part in how.split(maxsplit=1)[1].split("/")]
    is_gone = any(how.startswith("remove checkpoints/") for how in play.damaged)
    if not any(name in said for name in names if name != "checkpoints" or (is_gone and "isempty" in said)):
        yield "it names no damaged file"
    now = play.content()
    changed = [
        name for name in sorted(now.keys() | play.found.keys()) if now.get(name) != play.found.get(name)
    ]
    if changed:
        yield f"it changed {', '.join(changed)}"


def wrong_end_of_space(play: Play) -> Iterator[str]:
    """Yield what is wrong with a process that a full disk ended: it says which file, and how to continue."""
    said = play.said()
    if FULL.search(said) is None:
        yield "it names no file that is too large"
    if any((play.run / "checkpoints").glob("round-*")) and "the last checkpoint" not in " ".join(
        said.split()
    ):
        yield "it names no last checkpoint"


# ── what a finished run must equal ───────────────────────────────────────────────────────────────────────


def figures(run: Path) -> dict[str, Any]:
    """Return all that must be equal: weights, metrics without clocks, client records."""
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    return {
        "weights": result["weights_sha256"],
        "rounds": [line["round"] for line in rounds],
        "metrics": [
            {k: v for k, v in values.items() if not k.endswith(CLOCKS) and k not in ("checksum", "status")}
            for values in (*(line["metrics"] for line in rounds), result)
        ],
        "clients": client_rows(run),
    }


def client_rows(run: Path) -> list[str]:
    """Return the clients' records as lines; none if they cannot be read."""
    import pandas as pd

    try:
        return list(pd.read_parquet(run / "clients.parquet").to_csv(index=False).splitlines())
    except (OSError, ValueError):
        return []


def problems(play: Play, references: References) -> Iterator[str]:
    """Yield what is wrong with a run that finished."""
    found, expected = figures(play.run), references.of(play.schedule)
    lost = {how.split(maxsplit=1)[1].split("/")[0] for how in play.damaged}
    for name, value in expected.items():
        if found[name] == value:
            continue
        if name == "clients" and "clients.parquet" in lost and set(found[name]) <= set(value):
            if "clients" not in play.said() + _warnings(play.run):
                yield "clients' rows are lost in silence"
        else:
            yield f"other {name}"
    if found["weights"] != references.without(play.schedule):
        yield "other weights than without the clients that misbehave"
    if play.schedule.store != "none":
        yield from _store_problems(play, lost)


def _warnings(run: Path) -> str:
    path = run / "warnings.txt"
    return path.read_text(errors="replace") if path.exists() else ""


def _store_problems(play: Play, lost: set[str]) -> Iterator[str]:
    """Yield what is wrong with the metrics in the store; if the run says that it lacks some, sync first."""
    database = play.folder / "store.db"
    if play.schedule.store == "server":
        assert play.server is not None
        play.mend()
        database = play.server.folder / "mlflow.db"
    if "fedray sync" in play.said():
        play.start(("sync", "run"))
        if play.end():
            yield f"sync ends with {play.worker.exitcode}: {play.said()[-300:]}"
            return
    with closing(sqlite3.connect(database)) as store:
        query = "select run_uuid, status from runs join experiments e using (experiment_id) where e.name = ?"
        runs = store.execute(query, [play.folder.name]).fetchall()
        if [status for _, status in runs] != ["FINISHED"]:
            if lost.isdisjoint({"mlflow.json", "mlflow-sent.jsonl"}):  # without them, another run begins
                yield f"runs in the store: {[status for _, status in runs]}"
            return
        points = Counter(store.execute("select key, step from metrics where run_uuid = ?", runs[0][:1]))
    twice = [point for point, count in points.items() if count > 1]
    if twice and "mlflow-sent.jsonl" not in lost:
        yield f"{len(twice)} point(s) twice in the store: {twice[:3]}"
    expected = wanted_points(play.run)
    if points.keys() != expected:
        missing, more = sorted(expected - points.keys()), sorted(points.keys() - expected)
        yield f"the store lacks {missing[:3]}, and has {more[:3]} too much"


def wanted_points(run: Path) -> set[tuple[str, int]]:
    """Return key and step of each point that the store must have of a finished run."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    last = {
        (name, lines[-1]["round"]) for name, v in result.items() if "/" in name and type(v) in (int, float)
    }
    return last | {
        (name, line["round"])
        for line in lines
        for name, value in line["metrics"].items()
        if value is not None
    }


# ── what is left ─────────────────────────────────────────────────────────────────────────────────────────


def leftovers(play: Play) -> tuple[list[str], list[psutil.Process]]:
    """Return what is left some seconds after the end, and those of Ray's agents that still have time to end.

    Processes that were stopped are woken first: until then they cannot notice that their run is over.
    """
    play.wake()
    until = time.monotonic() + 30.0
    alive = list(play.processes)
    while time.monotonic() < until:
        _, alive = psutil.wait_procs(alive, timeout=0.2)
        if all(is_agent(p) for p in alive):
            break
    agents = [p for p in alive if is_agent(p)]
    left = [f"left: process {' '.join(command_of(p))[:80]}" for p in alive if p not in agents]
    return left + [f"left: {path.name}" for path in (play.folder / "tmp").glob("fedray-token-*")], agents


def is_agent(process: psutil.Process) -> bool:
    """Tell whether a process is one of Ray's agents without its raylet."""
    try:
        return process.cmdline()[0].strip() in AGENTS and process.ppid() == 1
    except (psutil.Error, IndexError):
        return False
