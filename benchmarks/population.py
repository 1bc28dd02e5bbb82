"""What registered clients cost: seconds of a round and memory at 1,000 and at 100,000 of them.

    python -m benchmarks.population [--populations 1000 100000] [--rounds 9] [--actors 0]

Each population has its process (with --actors also its Ray); their rounds are interleaved.
The cohort is the same: 100 clients of 60 images. Memory is the proportional set size of the whole process
  tree.
"""

import argparse
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.processes import tree_memory_bytes
from benchmarks.workload import COHORT, config, server
from fedray.experiment.placement import pool_for


def _serve(connection: Connection, population: int, actors: int) -> None:
    # everybody draws from the same images, or 100,000 clients would need 6 million of them
    run = config("mlp", population, actors, **{"data.partition": {"kind": "bootstrap", "examples": 60}})
    federation = server(run, pool_for(run))
    connection.send("ready")
    while connection.recv() == "round":
        start = time.perf_counter()
        federation.step()
        connection.send(time.perf_counter() - start)
    connection.send(tree_memory_bytes(os.getpid()))
    federation.pool.close()


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--populations", type=int, nargs="+", default=[1_000, 100_000])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--actors", type=int, default=0)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ends: dict[int, Any] = {}
    for population in arguments.populations:
        here, there = context.Pipe()
        context.Process(target=_serve, args=(there, population, arguments.actors)).start()
        here.recv()
        ends[population] = here
    seconds: dict[int, list[float]] = {population: [] for population in ends}
    for number in range(arguments.rounds + 2):
        for population, end in ends.items():
            end.send("round")
            took = end.recv()
            if number >= 2:
                seconds[population].append(took)
    memory = {}
    for population, end in ends.items():
        end.send("end")
        memory[population] = end.recv()
    first = arguments.populations[0]
    base = statistics.median(seconds[first])
    print(f"mlp, {COHORT} clients, {arguments.actors or 'no'} actors; medians of {arguments.rounds} rounds")
    print(f"{'registered':>12}{'seconds':>10}{'min … max':>18}{'×':>7}{'memory MB':>12}{'×':>7}")
    for population, times in seconds.items():
        median, spread = statistics.median(times), f"{min(times):.3f} … {max(times):.3f}"
        print(
            f"{population:12,}{median:10.3f}{spread:>18}{median / base:7.2f}"
            f"{memory[population] / 1e6:12,.0f}{memory[population] / memory[first]:7.2f}"
        )


if __name__ == "__main__":
    main()
