"""Runs to which everything happens: each ends as an undisturbed one, or with its stated error.

    python -m benchmarks.chaos [--schedules 200] [--seed 0] [--actors 0 0 1 2] [--out chaos.jsonl]

A schedule is drawn from its seed and number: a short run of a stateful method, in process or on actors;
clients that raise, send NaN or huge weights, kill their process or never return; and faults that come one
after the other, each at a random moment of a process that works on the run. `fedray resume` continues it
until it has finished. The run must end

    equal      with the weights, metrics and client records of a run in process to which nothing but its
               clients happened, and with the weights that it has if these clients send nothing; with each
               metric in its store once
    refused    only where files were damaged: with exit status 1 or 2, a message that names the damaged file,
               and nothing changed

and each process before with the status that its fault has: 130 or 143 after a signal; 1 on a full disk, with
the file and the last checkpoint. A process whose Ray cannot start, as on a busy machine, is started again,
and counted. No process and no token file is left. Results are added to a file of JSON
lines; schedules that are there are not played again, unless they were drawn differently. Exit status 1 if a
schedule ended otherwise; its directory is kept and named.

Two processes share the schedules by `--part 0/2` and `--part 1/2`, each with its `--out`; to count them
together: `--out FILE --also FILE…`. `--again NUMBER…` plays some anew; the last result counts.
"""

import argparse
import json
import multiprocessing
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos_faults import DRAWING, FAULTS, drawn
from benchmarks.chaos_judge import AGENTS_S, WRONG, References, ended, leftovers
from benchmarks.chaos_run import Play, Server, prepared

Row = dict[str, Any]
TOO_BUSY, AGAIN = "Ray cannot start on this machine", 5
"""What a run says whose Ray could not start, here because of other work; such a process is started again."""


def played(play: Play, references: References) -> tuple[Row, list[psutil.Process]]:
    """Play a schedule; return how it ended, and Ray's agents that have not ended yet."""
    schedule, faults, processes, busy = play.schedule, list(play.schedule.faults), 0, 0
    references.of(schedule), references.without(schedule)
    started, end = time.monotonic(), None
    while end is None:
        play.start()
        processes += 1
        happened: list[str] = []
        while faults and not (happened and FAULTS[happened[-1]].statuses):
            happened.append(faults.pop(0))
            FAULTS[happened[-1]].happen(play)
        try:
            status = play.end()
        except TimeoutError as error:
            play.kill()
            end = f"{WRONG}: {error}"
            break
        if status == 1 and TOO_BUSY in play.said() and busy < AGAIN:
            busy, faults = busy + 1, happened + faults
        else:
            end = ended(play, status, happened, references)
    seconds = time.monotonic() - started
    play.mend()
    left, agents = leftovers(play)
    if left:
        end = f"{WRONG}: {'; '.join(left[:3])}"
    ending = {"end": end, "damaged": play.damaged, "processes": processes, "seconds": round(seconds, 2)}
    ending |= {"busy": busy} if busy else {}
    return asdict(schedule) | ending, agents


# ── the results ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Results:
    """The file of results, and what it says of each schedule.

    Args:
        path: of the file.
        given: what all its rows must have: seed, actors, version of the drawing.
        also: further files, which are only read.
    """

    path: Path
    given: Row
    also: tuple[Path, ...] = ()
    rows: dict[int, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in (*self.also, self.path):
            for line in path.read_text().splitlines() if path.exists() else ():
                row = json.loads(line)
                if {key: row.get(key) for key in self.given} == self.given:
                    self.rows[row["number"]] = row

    def add(self, row: Row) -> None:
        """Add a row, which replaces an earlier one of its schedule."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[row["number"]] = row


def summary(rows: list[Row]) -> str:
    """Return counts of ends, and the median seconds of schedules with one fault."""
    ends = Counter(row["end"].split(":")[0] for row in rows)
    good = len(rows) - ends[WRONG]
    told = ", ".join(f"{n} {e}" for e, n in ends.items())
    lines = [f"{good} of {len(rows)} schedules ended as they should: {told}"]
    processes, seconds = (sum(row[key] for row in rows) for key in ("processes", "seconds"))
    on_actors = sum(row["actors"] > 0 for row in rows)
    lines.append(f"{on_actors} on actors; {processes} processes, {seconds:,.0f} s")
    for fault in FAULTS:
        count = sum(list(row["faults"]).count(fault) for row in rows)
        alone = [row for row in rows if list(row["faults"]) == [fault]]
        lines.append(f"  {fault}: {count} times{_medians(alone)}")
    if busy := sum(row.get("busy", 0) for row in rows):
        lines.append(f"  {busy} processes were started again, since Ray could not start on the busy machine")
    commits = Counter(row["commit"] for row in rows)
    lines.append("played at " + ", ".join(f"{commit} ({n})" for commit, n in commits.items()))
    return "\n".join(lines)


def _medians(rows: list[Row]) -> str:
    """Return the median seconds of schedules, starts included, in process and on actors."""
    parts = []
    for where, some in (
        ("in process", [row["seconds"] for row in rows if not row["actors"]]),
        ("on actors", [row["seconds"] for row in rows if row["actors"]]),
    ):
        parts += [f"{statistics.median(some):.1f} s {where} ({len(some)})"] if some else []
    return f"; alone: {', '.join(parts)} in the median" if parts else ""


def commit() -> str:
    """Return the commit of this checkout; with a mark if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--schedules", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--actors", type=int, nargs="+", default=[0, 0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("chaos.jsonl"))
    parser.add_argument("--also", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--part", default="0/1", metavar="PART/PARTS")
    parser.add_argument("--again", type=int, nargs="+", default=[], metavar="NUMBER")
    return parser.parse_args()


def numbers(options: argparse.Namespace, known: Iterable[int]) -> list[int]:
    """Return the numbers of the schedules to play."""
    part, parts = (int(number) for number in options.part.split("/"))
    missing = set(range(options.schedules)) - set(known)
    return sorted(number for number in missing | set(options.again) if number % parts == part)


def play_all(options: argparse.Namespace, results: Results, work: Path, server: Server) -> None:
    """Play schedules; add their results and print a line for each."""
    references, late = References(work), list[tuple[float, Row, list[psutil.Process]]]()
    given = results.given | {"commit": commit()}
    for number in numbers(options, results.rows):
        schedule, rng = drawn(options.seed, number, tuple(options.actors))
        folder = work / f"schedule-{number}"
        row, agents = played(prepared(folder, schedule, rng, server), references)
        row = given | row
        results.add(row)
        late.append((time.monotonic(), row, agents))
        print(
            f"{number}: {row['run']} on {row['actors']}, {', '.join(row['faults'])}: {row['end']}", flush=True
        )
        if row["end"].startswith(WRONG):
            print(f"   kept: {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    for since, row, agents in late:
        _, alive = psutil.wait_procs(agents, timeout=max(0.0, since + AGENTS_S - time.monotonic()))
        if alive:
            results.add(row | {"end": f"{WRONG}: {len(alive)} of Ray's agents are left"})


def main() -> int:
    """Play schedules that the file of results lacks; print counts; return the exit status."""
    options = arguments()
    given = {"seed": options.seed, "among": options.actors, "drawing": DRAWING}
    results = Results(options.out, given, tuple(options.also))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fedray.cli", "fedray.experiment.run"])
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    server = Server(work / "mlflow")
    try:
        play_all(options, results, work, server)
    finally:
        server.close()
        shutil.rmtree(work / "mlflow", ignore_errors=True)
    wanted = [row for number, row in results.rows.items() if number < options.schedules]
    print(summary(wanted))
    if not any(work.iterdir()):
        work.rmdir()
    return int(any(row["end"].startswith(WRONG) for row in wanted))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended
    sys.exit(main())
