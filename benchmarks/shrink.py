"""Seconds of a client's local epoch: the whole model, and one with half of the channels.

    python -m benchmarks.shrink [--models cnn mlp] [--channels 0.5] [--epochs 31]

The second has its channels removed by a mask and trains as a physically smaller model; the third trains under
the same mask without getting smaller, as a model whose engine knows no channels would. The three are
interleaved in one call, so that a busy machine hits them alike; ratios of medians are printed.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.workload import BATCH, PER_CLIENT, config
from fedray.experiment.run import Federation
from fedray.federation.worker import Worker
from fedray.pruning.channels import best_channels, channel_mask, channel_scores
from fedray.pruning.scores import magnitude
from fedray.types import Mask, Params


def contenders(model: str, channels: float) -> tuple[dict[str, Callable[[], Params]], float]:
    """Return name → a function that trains one client for an epoch, and the density of the smaller model."""
    place = Federation.of(config(model)).place
    spec, params = place.model, place.model.init(0)
    scores, groups = magnitude(params), spec.channel_groups
    kept = {g.name: best_channels(channel_scores(scores, g, spec.layout), channels) for g in groups}
    everything, fewer = Mask.full(spec.layout), channel_mask(spec.layout, groups, kept)
    held = fewer.flat.float()
    client = Worker(place).client(place.population[0], place.population.partition.rows(0), 1, {})

    def masked(flat: torch.Tensor) -> None:
        flat.mul_(held)

    epochs: dict[str, Callable[[], Params]] = {
        "whole": lambda: client.sgd(params, everything, epochs=1),
        f"{channels:.0%} of the channels": lambda: client.sgd(params, fewer, epochs=1),
        "the same, not made smaller": lambda: client.sgd(params, fewer, epochs=1, on_step=masked),
    }
    return epochs, fewer.density


def measure(model: str, channels: float, epochs: int) -> None:
    """Print medians, spreads and ratios for a model."""
    trainers, density = contenders(model, channels)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(epochs + 3):
        for name, train in trainers.items():
            start = time.perf_counter()
            train()
            if number >= 3:  # the first ones load kernels and build the smaller model
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"\n{model}: {PER_CLIENT} images, batches of {BATCH}; interleaved, medians of {epochs} epochs; "
        f"the smaller model has {density:.1%} of the prunable weights"
    )
    print(f"{'':28}{'ms':>9}{'min … max':>20}{'× faster':>10}")
    for name, median in medians.items():
        spread = f"{1000 * min(seconds[name]):.2f} … {1000 * max(seconds[name]):.2f}"
        print(f"{name:28}{1000 * median:9.2f}{spread:>20}{medians['whole'] / median:10.2f}")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["cnn", "mlp"])
    parser.add_argument("--channels", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in a worker
    for model in arguments.models:
        measure(model, arguments.channels, arguments.epochs)


if __name__ == "__main__":
    main()
