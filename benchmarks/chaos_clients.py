"""Clients that misbehave for `python -m benchmarks.chaos`, which gives this file to `--import`.

The environment variable FEDRAY_CHAOS holds a JSON object: "round client" → one of KINDS or EARLY. The
function of such a client runs, and its update is then changed, whatever the method is. EARLY ones act first.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedray.federation.client import Client, ClientFunction
from fedray.federation.exchange import Job, Trained
from fedray.federation.rehearsal import MakeClient
from fedray.federation.wire import Memory, Order
from fedray.federation.worker import Worker
from fedray.types import ClientUpdate, Params, Task

VARIABLE = "FEDRAY_CHAOS"
FIRST_S = 60.0
"""Seconds that the first call of a kind may take here. A run gives it ten minutes."""


def filled(update: ClientUpdate, value: float) -> ClientUpdate:
    """Return an update whose weights are all one number."""
    flat = torch.full_like(update.params.flat, value)
    return replace(update, params=Params(flat, update.params.layout))


def is_first(name: str) -> bool:
    """Tell whether no process of the schedule has called this with that name; never in process."""
    folder = os.environ.get(f"{VARIABLE}_MARKS")
    if not folder:
        return False
    try:
        Path(folder, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die() -> None:
    """Kill the process in which the client trains."""
    os.kill(os.getpid(), signal.SIGKILL)


def sleep() -> None:
    """Never return."""
    while True:
        time.sleep(60)


def fail(update: ClientUpdate | None = None) -> Any:
    """Raise an error."""
    raise ZeroDivisionError("a client that raises")


def die_once(update: ClientUpdate) -> ClientUpdate:
    """Kill the process in which the client trains, unless one did so before."""
    if is_first("died"):
        die()
    return update


def sleep_once(update: ClientUpdate) -> ClientUpdate:
    """Never return, unless one did so before."""
    if is_first("slept"):
        sleep()
    return update


KINDS: dict[str, Callable[[ClientUpdate], Any]] = {
    "silent": lambda update: None,
    "raises": fail,
    "NaN": lambda update: filled(update, float("nan")),
    "3e38": lambda update: filled(update, 3e38),
    "1e12": lambda update: filled(update, 1e12),
    "dies": die_once,
    "sleeps": sleep_once,
}
"""What a client does with its update; `silent` sends none."""
EARLY: dict[str, Callable[[], None]] = {"fails first": fail, "always dies": die, "always sleeps": sleep}
"""What a client does instead of training."""


def misbehaving(function: ClientFunction) -> ClientFunction:
    """Return a client's function in which some clients misbehave."""
    plan = json.loads(os.environ.get(VARIABLE, "{}"))

    def inside(task: Task, client: Client) -> Any:
        kind = plan.get(f"{client.round} {client.id}")
        if kind in EARLY:
            EARLY[kind]()
        update = function(task, client)
        return update if kind is None else KINDS[kind](update)

    return inside


_train = Worker.train


def train(self: Worker, job: Job, order: Order, memory: Memory, make: MakeClient = Client) -> Trained:
    """Train one client, which may misbehave in a round's training."""
    job = replace(job, function=misbehaving(job.function)) if job.training else job
    return _train(self, job, order, memory, make)


Worker.train = train  # type: ignore[method-assign]
if (_placement := sys.modules.get("fedray.experiment.placement")) is not None:  # not on actors
    _placement.FIRST_S = FIRST_S  # type: ignore[attr-defined]
