"""Seconds of a round.

A plain hand-written FedAvg loop, the same over two processes, fedray in process, fedray on Ray.

    python -m benchmarks.round [--models mlp cnn] [--rounds 15] [--warm-up-s 10]

The four are interleaved in one call, so that a busy machine hits them alike; ratios of medians are printed.
"""

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.workload import config, offer_all, server
from fedray.config.run_config import RunConfig
from fedray.experiment.placement import pool_for
from fedray.experiment.run import Federation

State = dict[str, torch.Tensor]


class Contender(Protocol):
    """A federation that makes rounds when it is asked."""

    def round(self, number: int) -> int:
        """Make a round; return the number of examples that its clients trained on."""

    def model(self) -> nn.Module:
        """Return the global model."""

    def close(self) -> None:
        """End its processes."""


class PlainLoop:
    """FedAvg as one writes it by hand: deepcopy, DataLoader, optim.SGD, a weighted sum of state dicts."""

    def __init__(self, run: RunConfig) -> None:
        torch.set_num_threads(1)
        federation = Federation.of(run)
        place, dataset = federation.place, federation.dataset
        self.cohort, self.lr = run.clients.cohort, place.method.lr
        self.batch = place.method.batch_size
        self.partition = place.population.partition
        self.x = dataset.normalise(dataset.train.x)
        self.y = torch.from_numpy(dataset.train.y)
        self.global_model: nn.Module = copy.deepcopy(place.model.bind(place.model.init(0).flat))

    def clients(self, round: int) -> list[int]:
        """Draw a round's cohort."""
        rng = np.random.default_rng(round)
        return sorted(rng.choice(self.partition.population, self.cohort, replace=False).tolist())

    def train(self, state: State, clients: list[int]) -> tuple[State, int]:
        """Train clients from `state` one after the other; return the weighted sum and the weight."""
        self.global_model.load_state_dict(state)
        total: State = {name: torch.zeros_like(value) for name, value in state.items()}
        count = 0
        for client in clients:
            rows = torch.from_numpy(np.asarray(self.partition.rows(client), dtype=np.int64))
            local = copy.deepcopy(self.global_model)
            optimiser = torch.optim.SGD(local.parameters(), lr=self.lr)
            loader = DataLoader(
                TensorDataset(self.x[rows], self.y[rows]), batch_size=self.batch, shuffle=True
            )
            for x, y in loader:
                optimiser.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(local(x), y))
                optimiser.step()
            for name, value in local.state_dict().items():
                total[name] += value * len(rows)
            count += len(rows)
        return total, count

    def round(self, number: int) -> int:
        """Make a round; return the number of examples."""
        total, count = self.train(self.global_model.state_dict(), self.clients(number))
        self.global_model.load_state_dict({name: value / count for name, value in total.items()})
        return count

    def model(self) -> nn.Module:
        """Return the global model."""
        return self.global_model

    def close(self) -> None:
        """Do nothing: there is only this process."""


def _serve(connection: Connection, run: RunConfig) -> None:
    offer_all()
    loop = PlainLoop(run)
    connection.send("ready")
    while (task := connection.recv()) is not None:
        state, clients = task
        connection.send(loop.train(state, clients))


class TwoProcesses:
    """The same loop, half of the cohort in each of two processes."""

    def __init__(self, run: RunConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self.loop = PlainLoop(run)
        self.ends: list[Any] = []
        for _ in range(2):
            here, there = context.Pipe()
            context.Process(target=_serve, args=(there, run), daemon=True).start()
            self.ends.append(here)
        for end in self.ends:
            end.recv()

    def round(self, number: int) -> int:
        """Make a round; return the number of examples."""
        clients, state = self.loop.clients(number), self.model().state_dict()
        half = len(clients) // 2
        for end, part in zip(self.ends, (clients[:half], clients[half:]), strict=True):
            end.send((state, part))
        (a, n), (b, m) = (end.recv() for end in self.ends)
        self.model().load_state_dict({name: (a[name] + b[name]) / (n + m) for name in a})
        return int(n + m)

    def model(self) -> nn.Module:
        """Return the global model."""
        return self.loop.global_model

    def close(self) -> None:
        """End the processes."""
        for end in self.ends:
            end.send(None)


class Fedray:
    """fedray's own rounds, in this process or on Ray as `clients.actors` says."""

    def __init__(self, run: RunConfig) -> None:
        self.server = server(run, pool_for(run))

    def round(self, number: int) -> int:
        """Make a round; return the number of examples."""
        records = self.server.step().clients
        return sum(record.num_examples for record in records if record.fate == "folded")

    def model(self) -> nn.Module:
        """Return the global model."""
        return self.server.place.model.bind(self.server.model.flat)

    def close(self) -> None:
        """End the actors."""
        self.server.pool.close()


CONTENDERS: dict[str, Callable[[RunConfig], Contender]] = {
    "plain loop, 1 process": PlainLoop,
    "plain loop, 2 processes": TwoProcesses,
    "fedray, in process": lambda run: Fedray(run.override({"clients.actors": 0})),
    "fedray, Ray, 2 actors": lambda run: Fedray(run.override({"clients.actors": 2})),
}
"""Name → what makes its rounds, set up for a run."""


def measure(model: str, rounds: int, warm_up_s: float) -> None:
    """Print medians, spreads and ratios for a model.

    The warm-up is long: Ray keeps starting processes for some seconds after `init` returns.
    """
    run = config(model)
    contenders = {name: build(run) for name, build in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    started, number, warm = time.perf_counter(), 0, False
    while len(seconds["plain loop, 1 process"]) < rounds:
        warm = number >= 2 and time.perf_counter() - started > warm_up_s
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender.round(number)
            if warm:
                seconds[name].append(time.perf_counter() - start)
        number += 1
    for contender in contenders.values():
        contender.close()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    reference = medians["plain loop, 1 process"]
    print(
        f"\n{model}: {run.clients.cohort} of {run.clients.population:,} clients; "
        f"interleaved, medians of {rounds} rounds"
    )
    print(f"{'':26}{'seconds':>9}{'min … max':>18}{'× plain loop':>14}")
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} … {max(seconds[name]):.3f}"
        print(f"{name:26}{median:9.3f}{spread:>18}{reference / median:14.2f}")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm-up-s", type=float, default=10.0)
    arguments = parser.parse_args()
    for model in arguments.models:
        measure(model, arguments.rounds, arguments.warm_up_s)


if __name__ == "__main__":
    main()
