"""Seconds that a run loses by a fault: the same run with it and without it.

    python -m benchmarks.chaos_seconds [--times 3] [--actors 0 2] [--out FILE]

Each fault of `benchmarks.chaos`, and each misbehaviour of clients that needs actors, happens alone to a short
run, in process and on actors, at random moments. The seconds are those of all processes that worked on the
run, their starts included, until it has finished with the weights of the undisturbed run. Printed are the
seconds of undisturbed runs, and the difference of the medians for each fault, with the range.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.chaos import played
from benchmarks.chaos_faults import FAULTS, ON_ACTORS
from benchmarks.chaos_judge import WRONG, References
from benchmarks.chaos_run import Schedule, Server, prepared

RUN = "staged"
LEFT_OUT = ("damage",)
"""Faults whose seconds depend on the file."""


def schedules(actors: int) -> Iterator[tuple[str, Schedule]]:
    """Yield what happens, and a schedule in which nothing else does."""
    yield "nothing", Schedule(0, RUN, actors, "none", {}, ())
    yield "nothing, in MLflow", Schedule(0, RUN, actors, "server", {}, ())
    for name, fault in FAULTS.items():
        if (actors or not fault.on_actors) and name not in LEFT_OUT:
            yield name, Schedule(0, RUN, actors, "server" if name == "outage" else "none", {}, (name,))
    for kind in ON_ACTORS if actors else ():
        clients = {f"3 {client}": kind for client in (range(40) if "always" not in kind else [FIRST])}
        yield f"a client {kind}", Schedule(0, RUN, actors, "none", clients, ())


FIRST = 8
"""A client of round 3."""


def main() -> None:
    """Play the schedules and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--actors", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fedray.cli", "fedray.experiment.run"])
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    server, references = Server(work / "mlflow"), References(work)
    try:
        for actors in options.actors:
            usual: dict[str, float] = {}
            for name, schedule in schedules(actors):
                seconds = []
                for time in range(options.times):
                    rng = np.random.default_rng([actors, time])
                    row, _ = played(prepared(work / f"{time}", schedule, rng, server), references)
                    if row["end"].startswith(WRONG):
                        raise SystemExit(f"{name} on {actors}: {row['end']}; kept: {work / str(time)}")
                    seconds.append(row["seconds"])
                    shutil.rmtree(work / f"{time}")
                    if options.out is not None:
                        with options.out.open("a") as file:
                            file.write(json.dumps({"what": name} | row) + "\n")
                median = statistics.median(seconds)
                usual.setdefault(schedule.store, median)
                lost = median - usual[schedule.store]
                told = f"{median:6.1f} s" if name.startswith("nothing") else f"{lost:+6.1f} s"
                print(
                    f"{actors} actors, {name}: {told} ({min(seconds):.1f} to {max(seconds):.1f})", flush=True
                )
    finally:
        server.close()
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
