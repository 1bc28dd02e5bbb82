"""The measured workload.

Clients with 60 random images of 28×28 each, 100 a round, one epoch of SGD at batch 20.
"""

from pathlib import Path

import numpy as np

from fedray.config.run_config import RunConfig
from fedray.data import DATASETS, Dataset, DatasetSpec, Examples
from fedray.experiment.run import Federation
from fedray.federation.pool import PoolFactory
from fedray.federation.server import Server

EXAMPLES = 60_000
PER_CLIENT, COHORT, BATCH, LR = 60, 100, 20, 0.05


def _random_images(root: Path | None) -> Dataset:
    rng = np.random.default_rng(0)

    def draw(count: int) -> Examples:
        x = rng.integers(0, 256, (count, 1, 28, 28), dtype=np.uint8)
        return Examples(x, rng.integers(0, 10, count))

    return Dataset("random_images", draw(EXAMPLES), draw(100), 10, (1, 28, 28), (0.5,), (0.29,))


DATASETS["random_images"] = DatasetSpec(
    load=_random_images,
    check=lambda root: None,
    input_shape=(1, 28, 28),
    num_classes=10,
    train_examples=EXAMPLES,
    test_examples=100,
    mean=(0.5,),
    std=(0.29,),
    files="",
    source="drawn at random, for measurements",
)


def config(model: str, population: int = 1_000, actors: int = 2, **changes: object) -> RunConfig:
    """Return the workload for a model and a number of registered clients."""
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
            "devices": {"laptop": 1.0},
        },
        "method": {"name": "fedavg", "local_epochs": 1, "batch_size": BATCH, "lr": LR},
        "tracking": {"uri": "none"},
    }
    return RunConfig.from_tree(base).override(changes)


def server(run: RunConfig, pool: PoolFactory) -> Server:
    """Return a server that is set up and ready for its first round."""
    federation = Federation.of(run)
    built = Server(federation.place, pool(federation.place), federation.schedule, federation.side)
    built.setup()
    return built
