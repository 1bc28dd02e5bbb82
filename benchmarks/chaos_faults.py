"""The faults of `python -m benchmarks.chaos`, each a short function, and the drawing of schedules."""

import os
import resource
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.chaos_run import RUNS, Play, Schedule

DRAWING = 2
"""Version of what is drawn from a seed and a number; results of another one are not counted."""
MISBEHAVIOUR = ("raises", "NaN", "3e38", "1e12")
ON_ACTORS = {"dies": (0.2, 10), "always dies": (0.05, 3), "sleeps": (0.06, 10), "always sleeps": (0.03, 3)}
"""What clients do only on actors → share of the schedules, and number of the clients: few are in a cohort."""


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
    actors = play.actors()
    if actors:
        actors[int(play.rng.integers(len(actors)))].kill()


def hang_actor(play: Play) -> None:
    """SIGSTOP to one of its actors, once this process has made a round: it knows how long calls take."""
    play.reach(began=1)
    actors = play.actors()
    if actors:
        actors[int(play.rng.integers(len(actors)))].suspend()


def full_disk(play: Play) -> None:
    """No file of the run's process may grow beyond a random size from a random moment on, until it ends."""
    play.reach(began=int(play.schedule.actors > 0))  # Ray's own processes, which inherit it, have started
    limit = int(play.rng.integers(0, 60_000))
    if play.worker.is_alive():
        resource.prlimit(play.worker.pid, resource.RLIMIT_FSIZE, (limit, limit))


def outage(play: Play) -> None:
    """MLflow's server is gone, hangs, fails or loses answers from a random moment on, a while or for ever."""
    assert play.server is not None
    play.reach()
    proxy = play.server.proxy
    proxy.state = str(play.rng.choice(["gone", "hangs", "500", "drops"]))  # type: ignore[assignment]
    seconds = float(play.rng.choice([1.0, 5.0, np.inf]))
    if seconds < np.inf:
        play.timers.append(threading.Timer(seconds, proxy.mend))
        play.timers[-1].start()


def damage(play: Play) -> None:
    """SIGKILL to the process of the run, and damage to one of the files that it left, unless it failed."""
    kill_driver(play)
    if play.worker.exitcode > 0:
        return
    files = sorted(p for p in play.run.rglob("*") if p.is_file() and p.name != ".lock")
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
    """A fault.

    Args:
        happen: lets it happen.
        statuses: with which the process may end because of it, beside 0; if there are any, the next fault
            happens to the next process, otherwise to the same one.
        on_actors: it needs actors.
        weight: how often it is drawn.
    """

    happen: Callable[[Play], None]
    statuses: tuple[int, ...] = ()
    on_actors: bool = False
    weight: float = 1.0


FAULTS = {
    "kill driver": Fault(kill_driver, (-signal.SIGKILL,)),
    "interrupt": Fault(interrupt, (130, 143)),
    "kill actor": Fault(kill_actor, on_actors=True),
    "hang actor": Fault(hang_actor, on_actors=True, weight=0.5),
    "full disk": Fault(full_disk, (1,)),
    "damage": Fault(damage, (-signal.SIGKILL,)),
    "outage": Fault(outage, weight=0.4),
}


def drawn(seed: int, number: int, actors: tuple[int, ...]) -> tuple[Schedule, np.random.Generator]:
    """Return a schedule, and the generator of its moments."""
    rng = np.random.default_rng([seed, number])
    count = int(rng.choice(actors))
    bad = rng.choice(40, int(rng.integers(0, 4)), replace=False)
    clients = {f"{rng.integers(1, 7)} {client}": str(rng.choice(MISBEHAVIOUR)) for client in bad}
    share = rng.random()
    for kind, (part, clients_of_it) in ON_ACTORS.items() if count else ():
        if 0 <= share < part:
            some = rng.choice(40, clients_of_it, replace=False)
            clients |= {f"{rng.integers(2, 7)} {client}": kind for client in some}
        share -= part
    able = [name for name, fault in FAULTS.items() if count or not fault.on_actors]
    weights = np.array([FAULTS[name].weight for name in able])
    chosen = rng.choice(able, int(rng.integers(1, 4)), p=weights / weights.sum())
    faults, run = tuple(str(name) for name in chosen), str(rng.choice(list(RUNS)))
    store = "sqlite" if rng.random() < 0.1 else "none"
    return Schedule(number, run, count, "server" if "outage" in faults else store, clients, faults), rng
