"""Seconds of a round under a mask, against a round of FedAvg: what masking costs the machine that simulates.

    python -m benchmarks.masked_round [--models mlp cnn] [--density 0.1] [--rounds 15] [--warm-up 3]

The mask is unstructured, the same for all clients, and drawn before round 1; both train the whole model, in
process. Their rounds are interleaved in one call, so that a busy machine hits them alike, and the ratio of
medians is printed. Bytes are the round's uploads and downloads once clients hold the mask.
"""

import argparse
import statistics
import time

from benchmarks.workload import COHORT, config, server
from fedray.federation.pool import LocalPool
from fedray.federation.server import Server


def contenders(model: str, density: float) -> dict[str, Server]:
    """Return name → a server that is ready for its first round."""
    masked = {"name": "staged", "density": density, "initial_density": density}
    plain = config(model, actors=0)
    methods = {"fedavg": {}, f"mask of density {density:g}": {f"method.{k}": v for k, v in masked.items()}}
    return {name: server(plain.override(changes), LocalPool) for name, changes in methods.items()}


def measure(model: str, density: float, rounds: int, warm_up: int) -> None:
    """Print medians, spreads and ratios for a model."""
    servers = contenders(model, density)
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    moved_bytes: dict[str, float] = {}
    for number in range(rounds + warm_up):
        for name, federation in servers.items():
            start = time.perf_counter()
            metrics = federation.step().metrics
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
            moved_bytes[name] = metrics["bytes/up"] + metrics["bytes/down"]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"\n{model}: {COHORT} of 1,000 clients, in process; interleaved, medians of {rounds} rounds")
    print(f"{'':24}{'seconds':>9}{'min … max':>18}{'× fedavg':>10}{'MB moved':>10}")
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} … {max(seconds[name]):.3f}"
        ratio, megabytes = median / medians["fedavg"], moved_bytes[name] / 1e6
        print(f"{name:24}{median:9.3f}{spread:>18}{ratio:10.2f}{megabytes:10.1f}")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["mlp", "cnn"])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=3)
    arguments = parser.parse_args()
    for model in arguments.models:
        measure(model, arguments.density, arguments.rounds, arguments.warm_up)


if __name__ == "__main__":
    main()
