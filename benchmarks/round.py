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
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.workload import BATCH, COHORT, LR, config, server
from fedray.experiment.placement import pool_for
from fedray.experiment.run import Federation
from fedray.federation.pool import LocalPool

State = dict[str, torch.Tensor]


class PlainLoop:
    """FedAvg as one writes it by hand: deepcopy, DataLoader, optim.SGD, a weighted sum of state dicts."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        federation = Federation.of(config(model))
        place, dataset = federation.place, federation.dataset
        self.partition = place.population.partition
        self.x = dataset.normalise(dataset.train.x)
        self.y = torch.from_numpy(dataset.train.y)
        self.model: nn.Module = copy.deepcopy(place.model.bind(place.model.init(0).flat))

    def clients(self, round: int) -> list[int]:
        """Draw a round's cohort."""
        rng = np.random.default_rng(round)
        return sorted(rng.choice(self.partition.population, COHORT, replace=False).tolist())

    def train(self, state: State, clients: list[int]) -> tuple[State, int]:
        """Train clients from `state` one after the other; return the weighted sum and the weight."""
        self.model.load_state_dict(state)
        total: State = {name: torch.zeros_like(value) for name, value in state.items()}
        count = 0
        for client in clients:
            rows = torch.from_numpy(np.asarray(self.partition.rows(client), dtype=np.int64))
            local = copy.deepcopy(self.model)
            optimiser = torch.optim.SGD(local.parameters(), lr=LR)
            loader = DataLoader(TensorDataset(self.x[rows], self.y[rows]), batch_size=BATCH, shuffle=True)
            for x, y in loader:
                optimiser.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(local(x), y))
                optimiser.step()
            for name, value in local.state_dict().items():
                total[name] += value * len(rows)
            count += len(rows)
        return total, count

    def round(self, number: int) -> None:
        """Make a round."""
        total, count = self.train(self.model.state_dict(), self.clients(number))
        self.model.load_state_dict({name: value / count for name, value in total.items()})


def _serve(connection: Connection, model: str) -> None:
    loop = PlainLoop(model)
    connection.send("ready")
    while (task := connection.recv()) is not None:
        state, clients = task
        connection.send(loop.train(state, clients))


class TwoProcesses:
    """The same loop, half of the cohort in each of two processes."""

    def __init__(self, model: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.loop = PlainLoop(model)
        self.ends: list[Any] = []
        for _ in range(2):
            here, there = context.Pipe()
            context.Process(target=_serve, args=(there, model), daemon=True).start()
            self.ends.append(here)
        for end in self.ends:
            end.recv()

    def round(self, number: int) -> None:
        """Make a round."""
        clients, state = self.loop.clients(number), self.loop.model.state_dict()
        for end, half in zip(self.ends, (clients[: COHORT // 2], clients[COHORT // 2 :]), strict=True):
            end.send((state, half))
        (a, n), (b, m) = (end.recv() for end in self.ends)
        self.loop.model.load_state_dict({name: (a[name] + b[name]) / (n + m) for name in a})

    def close(self) -> None:
        """End the processes."""
        for end in self.ends:
            end.send(None)


def contenders(model: str) -> tuple[dict[str, Callable[[int], Any]], Callable[[], None]]:
    """Return name → a function that makes a round, and what ends them all."""
    plain, two = PlainLoop(model), TwoProcesses(model)
    local = server(config(model, actors=0), LocalPool)
    ray = server(config(model, actors=2), pool_for(config(model, actors=2)))
    rounds: dict[str, Callable[[int], Any]] = {
        "plain loop, 1 process": plain.round,
        "plain loop, 2 processes": two.round,
        "fedray, in process": lambda _: local.step(),
        "fedray, Ray, 2 actors": lambda _: ray.step(),
    }

    def close() -> None:
        two.close()
        ray.pool.close()

    return rounds, close


def measure(model: str, rounds: int, warm_up_s: float) -> None:
    """Print medians, spreads and ratios for a model.

    The warm-up is long: Ray keeps starting processes for some seconds after `init` returns.
    """
    makers, close = contenders(model)
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    started, number, warm = time.perf_counter(), 0, False
    while len(seconds["plain loop, 1 process"]) < rounds:
        warm = number >= 2 and time.perf_counter() - started > warm_up_s
        for name, make in makers.items():
            start = time.perf_counter()
            make(number)
            if warm:
                seconds[name].append(time.perf_counter() - start)
        number += 1
    close()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    reference = medians["plain loop, 1 process"]
    print(f"\n{model}: {COHORT} of 1,000 clients; interleaved, medians of {rounds} rounds")
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
