"""Clients that misbehave for `python -m benchmarks.chaos`, which gives this file to `--import`.

The environment variable FEDRAY_CHAOS holds a JSON object: "round client" → one of KINDS. The function of such
a client runs, and its update is then changed, whatever the method is.
"""

import json
import os
import signal
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


def filled(update: ClientUpdate, value: float) -> ClientUpdate:
    """Return an update whose weights are all one number."""
    flat = torch.full_like(update.params.flat, value)
    return replace(update, params=Params(flat, update.params.layout))


def die_once(update: ClientUpdate) -> ClientUpdate:
    """Kill the process in which the client trains, unless it has done so before; only for actors."""
    marker = os.environ.get(f"{VARIABLE}_DIED")
    if marker and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return update


def fail(update: ClientUpdate) -> Any:
    """Raise an error."""
    raise ZeroDivisionError("a client that raises")


KINDS: dict[str, Callable[[ClientUpdate], Any]] = {
    "silent": lambda update: None,
    "raises": fail,
    "NaN": lambda update: filled(update, float("nan")),
    "3e38": lambda update: filled(update, 3e38),
    "1e12": lambda update: filled(update, 1e12),
    "dies": die_once,
}
"""What a client does with its update; `silent` sends none."""


def misbehaving(function: ClientFunction) -> ClientFunction:
    """Return a client's function in which some clients misbehave."""
    plan = json.loads(os.environ.get(VARIABLE, "{}"))

    def inside(task: Task, client: Client) -> Any:
        update = function(task, client)
        kind = plan.get(f"{client.round} {client.id}")
        return update if kind is None else KINDS[kind](update)

    return inside


_train = Worker.train


def train(self: Worker, job: Job, order: Order, memory: Memory, make: MakeClient = Client) -> Trained:
    """Train one client, which may misbehave in a round's training."""
    job = replace(job, function=misbehaving(job.function)) if job.training else job
    return _train(self, job, order, memory, make)


Worker.train = train  # type: ignore[method-assign]
