"""Runs to which everything happens: each ends as an undisturbed one, or with its stated error.

    python -m benchmarks.chaos [--schedules 200] [--seed 0] [--actors 0 1 2] [--out chaos.jsonl]

A schedule is drawn from its seed and number: a short run of a stateful method, in process or on actors;
clients that raise, send NaN or huge weights, or kill their process; and faults that come one after the other,
each at a random moment of a process that works on the run. After each fault `fedray resume` continues. The
run must end

    equal      with the weights, metrics and client records of a run in process to which nothing but its
               clients happened, and with the weights that it has if these clients send nothing
    refused    with exit status 1 or 2 and a message that names the run, only where files were damaged

without a process, a token file or a second copy of a metric in the store left behind. Results are added to a
file of JSON lines; schedules that are there are not run again. Exit status 1 if a schedule ended otherwise;
its directory is kept and named.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos_run import RUNS, Play, Schedule, command_of, figures, leftovers, prepared, problems

MISBEHAVIOUR = ("raises", "NaN", "3e38", "1e12")
WRONG = "WRONG"


def drawn(seed: int, number: int, actors: tuple[int, ...]) -> tuple[Schedule, np.random.Generator]:
    """Return a schedule, and the generator of its moments."""
    rng = np.random.default_rng([seed, number])
    count = int(rng.choice(actors))
    bad = rng.choice(40, int(rng.integers(0, 4)), replace=False)
    clients = {f"{rng.integers(1, 7)} {client}": str(rng.choice(MISBEHAVIOUR)) for client in bad}
    if count and rng.random() < 0.3:
        clients |= {f"{rng.integers(1, 7)} {client}": "dies" for client in rng.choice(40, 10, replace=False)}
    able = [name for name, fault in FAULTS.items() if count or not fault.on_actors]
    able = [name for name in able if not (count and FAULTS[name].in_process)]
    faults = tuple(str(rng.choice(able)) for _ in range(int(rng.integers(1, 4))))
    run, stored = str(rng.choice(list(RUNS))), bool(rng.random() < 0.1)
    return Schedule(number, run, count, stored, clients, faults), rng


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────


def kill_driver(play: Play) -> None:
    """SIGKILL to the process of the run."""
    play.reach()
    play.kill()


def interrupt(play: Play) -> None:
    """SIGINT or SIGTERM to it."""
    play.reach()
    if play.worker.is_alive():
        os.kill(play.worker.pid, int(play.rng.choice([signal.SIGINT, signal.SIGTERM])))


def kill_actor(play: Play) -> None:
    """SIGKILL to one of its actors."""
    play.reach()
    actors = [p for p in play.look() if "ClientActor" in " ".join(command_of(p))]
    if actors:
        actors[int(play.rng.integers(len(actors)))].kill()


def full_disk(play: Play) -> None:
    """No file may grow beyond a random size from a random moment on, until the process ends."""
    play.reach()
    limit = int(play.rng.integers(0, 60_000))
    if play.worker.is_alive():
        resource.prlimit(play.worker.pid, resource.RLIMIT_FSIZE, (limit, limit))


def damage(play: Play) -> None:
    """SIGKILL to the process of the run, and damage to one of the files that it left."""
    kill_driver(play)
    files = sorted(
        p for p in play.run.rglob("*") if p.is_file() and p.name not in (".lock", "chaos_clients.py")
    )
    if not files:
        return
    path = files[int(play.rng.integers(len(files)))]
    content = bytearray(path.read_bytes())
    how = str(play.rng.choice(["flip", "cut", "zero", "remove"]))
    place = int(play.rng.integers(len(content))) if content else 0
    if how == "flip" and content:
        content[place] ^= 1 << int(play.rng.integers(8))
    elif how == "cut":
        del content[place:]
    elif how == "zero":
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    path.write_bytes(content) if how != "remove" else path.unlink()
    play.damaged.append(f"{how} {path.relative_to(play.run)}")


@dataclass(frozen=True)
class Fault:
    """A fault: what it does, and whether it needs actors or a run without them."""

    happen: Callable[[Play], None]
    on_actors: bool = False
    in_process: bool = False


FAULTS = {
    "kill driver": Fault(kill_driver),
    "interrupt": Fault(interrupt),
    "kill actor": Fault(kill_actor, on_actors=True),
    "full disk": Fault(full_disk, in_process=True),
    "damage": Fault(damage),
}


class References:
    """Figures of undisturbed runs in process, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, dict[str, Any]] = {}

    def of(self, run: str, clients: dict[str, str]) -> dict[str, Any]:
        """Return the figures of a run in which only clients misbehave."""
        clients = {key: kind for key, kind in clients.items() if kind != "dies"}
        key = json.dumps([run, clients], sort_keys=True)
        if key not in self._known:
            folder = self.folder / f"reference-{len(self._known)}"
            play = prepared(folder, Schedule(-1, run, 0, False, clients, ()), np.random.default_rng(0))
            play.start()
            if play.end():
                raise RuntimeError(f"an undisturbed run failed:\n{play.said()}")
            self._known[key] = figures(play.run)
            shutil.rmtree(folder)
        return self._known[key]


def played(play: Play, references: References) -> dict[str, Any]:
    """Play a schedule; return how it ended."""
    schedule, started, processes = play.schedule, time.monotonic(), 0
    expected = references.of(schedule.run, schedule.clients)
    silent = {key: "silent" if kind in MISBEHAVIOUR else kind for key, kind in schedule.clients.items()}
    weights, end = references.of(schedule.run, silent)["weights"], f"{WRONG}: it never finished"
    started = time.monotonic()
    for fault in (*schedule.faults, None, None):
        play.start()
        processes += 1
        if fault is not None:
            FAULTS[fault].happen(play)
        try:
            status = play.end()
        except TimeoutError as error:
            play.kill()
            end = f"{WRONG}: {error}"
            break
        if status == 0 or (fault is None and status > 0):
            end = ended(play, status, expected, weights)
            break
        if "Traceback" in play.said():
            end = f"{WRONG}: a traceback"
            break
    seconds = time.monotonic() - started
    left = list(leftovers(play))
    if left:
        end = f"{WRONG}: {'; '.join(left[:3])}"
    return asdict(schedule) | {
        "end": end,
        "damaged": play.damaged,
        "processes": processes,
        "seconds": round(seconds, 2),
    }


def ended(play: Play, status: int, expected: dict[str, Any], weights: str) -> str:
    """Return how a run ended whose last process ended by itself."""
    if status == 0:
        wrong = list(problems(play, expected, weights))
        return f"{WRONG}: {'; '.join(wrong[:3])}" if wrong else "equal"
    if "Traceback" in play.said():
        return f"{WRONG}: a traceback"
    return "refused" if play.damaged else f"{WRONG}: status {status}: {play.said()[-200:]}"


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────


def summary(rows: list[dict[str, Any]]) -> str:
    """Return counts of ends, and the median seconds of schedules with one fault, by fault."""
    ends = Counter(row["end"].split(":")[0] for row in rows)
    good = len(rows) - ends[WRONG]
    lines = [
        f"{good} of {len(rows)} schedules ended as they should: "
        + ", ".join(f"{n} {e}" for e, n in ends.items())
    ]
    lines.append(
        f"{sum(row['processes'] for row in rows)} processes, {sum(row['seconds'] for row in rows):,.0f} s"
    )
    for fault in FAULTS:
        alone = [row["seconds"] for row in rows if row["faults"] == [fault] or row["faults"] == (fault,)]
        count = sum(list(row["faults"]).count(fault) for row in rows)
        median = f", {statistics.median(alone):.1f} s in the median where it was alone" if alone else ""
        lines.append(f"  {fault}: {count} times{median}")
    return "\n".join(lines)


def main() -> int:
    """Play schedules that the file of results lacks; print counts; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--actors", type=int, nargs="+", default=[0, 0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("chaos.jsonl"))
    options = parser.parse_args()
    given = {"seed": options.seed, "among": options.actors}
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    rows = [row for row in rows if {key: row[key] for key in given} == given]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fedray.cli", "fedray.experiment.run"])
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    references = References(work)
    for number in sorted(set(range(options.schedules)) - {row["number"] for row in rows}):
        schedule, rng = drawn(options.seed, number, tuple(options.actors))
        folder = work / f"schedule-{number}"
        row = given | played(prepared(folder, schedule, rng), references)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(
            f"{number}: {row['run']} on {row['actors']}, {', '.join(row['faults'])}: {row['end']}", flush=True
        )
        if row["end"].startswith(WRONG):
            print(f"   kept: {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    wanted = [row for row in rows if row["number"] < options.schedules]
    print(summary(wanted))
    if not any(work.iterdir()):
        work.rmdir()
    return int(any(row["end"].startswith(WRONG) for row in wanted))


if __name__ == "__main__":
    sys.exit(main())
