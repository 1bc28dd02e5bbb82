"""How data reaches the clients: load, split, partition. A sweep checks all its configs before it starts."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedray.config.run_config import RunConfig
from fedray.data import DATASETS, Dataset, Partition, Splits, checked, split
from fedray.errors import ConfigError, DataError
from fedray.federation.client import TWO
from fedray.models import ModelSpec
from fedray.randomness import borrowed, generator, seed_sequence


def check_data(configs: Iterable[RunConfig]) -> None:
    """Partition the data of several configs as their runs will; equal partitions once.

    Raises:
        DataError: if data is missing, or cannot be partitioned as a config asks.
        ConfigError: if a config's batches are too small for its model.
    """
    datasets: dict[object, Dataset] = {}
    models: dict[object, ModelSpec] = {}
    seen = set()
    for config in configs:
        small = config.method.options.batch_size == 1
        key = (repr(config.data), config.clients.population, config.seed, config.model, config.norm, small)
        if key in seen:
            continue
        seen.add(key)
        source = config.data.name, config.data.root
        if source not in datasets:
            datasets[source] = loaded(config)
        dataset = datasets[source]
        built = config.model, config.norm, dataset.input_shape, dataset.num_classes
        if built not in models:
            models[built] = config.build_model(dataset.input_shape, dataset.num_classes)
        check_pairs(config, models[built], dealt(config, dataset).partition)


def loaded(config: RunConfig) -> Dataset:
    """Load the data set of a config.

    Raises:
        DataError: if it is missing, unreadable, or differs from its entry in the table.
    """
    name, spec = config.data.name, DATASETS[config.data.name]
    with borrowed(0):  # a data set does not depend on the run's seed
        return checked(name, spec, spec.load(config.data.root))


@dataclass(frozen=True)
class Deal:
    """The rows of a data set as a run uses them.

    Args:
        splits: validation, server, and the clients' together.
        partition: the rows that each client trains on.
        tested: the rows on which each client is tested, none of which is trained on; None: those of
            `partition`.
    """

    splits: Splits
    partition: Partition
    tested: Partition | None


def dealt(config: RunConfig, dataset: Dataset) -> Deal:
    """Set validation and server data aside, partition the rest, and set test examples of clients aside.

    Raises:
        DataError: if the data cannot be partitioned as the config asks.
    """
    seed, data = config.seed, config.data
    splits = split(dataset, data.validation_fraction, data.server_fraction, generator(seed, "split"))
    with borrowed(seed):
        partition = data.partition.options.split(
            dataset.train.y,
            dataset.writers,
            splits.train,
            config.clients.population,
            seed_sequence(seed, "partition"),
        )
        if not data.client_test_fraction:
            return Deal(splits, partition, None)
        partition, tested = partition.set_aside(data.client_test_fraction, seed_sequence(seed, "client_test"))
    if not np.any(tested.sizes):
        raise DataError(
            f"data.client_test_fraction={data.client_test_fraction:g}: no client has two examples, one to "
            "train on and one to be tested on; lower clients.population, or set it to 0"
        )
    return Deal(splits, partition, tested)


def check_pairs(config: RunConfig, model: ModelSpec, partition: Partition) -> None:
    """Refuse clients with too few examples for a model that needs two per batch.

    Raises:
        ConfigError: if batches are of one example.
        DataError: if clients have a single one.
    """
    if "train" not in model.pairs:
        return
    if config.method.options.batch_size == 1:
        raise ConfigError(f"method.batch_size: 1, but {model.name} cannot be trained on one example; {TWO}")
    alone = np.flatnonzero(np.asarray(partition.sizes) == 1)
    if len(alone):
        share = config.data.client_test_fraction
        aside = f" to train on, beside data.client_test_fraction={share:g}" if share else ""
        raise DataError(
            f"data.partition: {len(alone):,} client(s) have one example{aside} "
            f"(clients {alone[:10].tolist()}); {model.name} cannot be trained on one: {TWO}"
        )
