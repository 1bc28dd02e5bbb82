"""The measured workloads.

Clients with 60 random images of 28×28 each, 100 a round, one epoch of SGD at batch 20. ResNet-18 takes 32
random images of 3×32×32 a client, 8 clients a round, in one step.
"""

from functools import partial
from pathlib import Path

import numpy as np

from fedray.config.run_config import RunConfig
from fedray.data import DATASETS, Dataset, DatasetSpec, Examples
from fedray.experiment.run import Federation
from fedray.federation.pool import PoolFactory
from fedray.federation.server import Server

EXAMPLES = 60_000
PER_CLIENT, COHORT, BATCH, LR = 60, 100, 20, 0.05


RESNET: dict[str, object] = {
    "data.name": "random_colour_images",
    "clients.population": 100,
    "clients.cohort": 8,
    "method.batch_size": 32,
}
"""What differs for ResNet-18, whose client-step of 32 images takes a second of one core."""


def _random_images(name: str, count: int, shape: tuple[int, int, int], root: Path | None) -> Dataset:
    rng = np.random.default_rng(0)

    def draw(count: int) -> Examples:
        x = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        return Examples(x, rng.integers(0, 10, count))

    return Dataset(name, draw(count), draw(100), 10, shape, (0.5,), (0.29,))


def offer(name: str, count: int, shape: tuple[int, int, int]) -> None:
    """Add a data set of random images to the table, when a workload asks for it."""
    DATASETS[name] = DatasetSpec(
        load=partial(_random_images, name, count, shape),
        check=lambda root: None,
        input_shape=shape,
        num_classes=10,
        train_examples=count,
        test_examples=100,
        mean=(0.5,),
        std=(0.29,),
        files="",
        source="drawn at random, for measurements",
    )


def offer_all() -> None:
    """Add the data sets of the workloads to the table of this process."""
    offer("random_images", EXAMPLES, (1, 28, 28))
    offer("random_colour_images", 3_200, (3, 32, 32))


def config(model: str, population: int = 1_000, actors: int = 2, **changes: object) -> RunConfig:
    """Return the workload for a model and a number of registered clients."""
    offer_all()
    # with more clients than examples they share them: each draws its 60 when it is asked
    partition = (
        {"kind": "iid"} if population * PER_CLIENT <= EXAMPLES else {"kind": "bootstrap", "examples": 60}
    )
    base = {
        "rounds": 1_000_000,
        "eval_every": 1_000_000,
        "model": model,
        "data": {"name": "random_images", "partition": partition, "validation_fraction": 0.0},
        "clients": {
            "population": population,
            "cohort": COHORT,
            "actors": actors,
            "devices": {"server": 1.0},
        },
        "method": {"name": "fedavg", "local_epochs": 1, "batch_size": BATCH, "lr": LR},
        "tracking": {"uri": "none"},
    }
    return RunConfig.from_tree(base).override((RESNET if model == "resnet18" else {}) | changes)


def server(run: RunConfig, pool: PoolFactory) -> Server:
    """Return a server that is set up and ready for its first round."""
    federation = Federation.of(run)
    built = Server(federation.place, pool(federation.place), federation.schedule, federation.side)
    built.setup()
    return built
