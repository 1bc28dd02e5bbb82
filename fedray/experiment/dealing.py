"""How data reaches the clients: load, split, partition. A sweep checks all its configs before it starts."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedray.config.run_config import RunConfig
from fedray.costs.devices import Fleet, draw
from fedray.costs.memory import MemoryModel, optimizer_vectors
from fedray.data import DATASETS, Dataset, Partition, Splits, checked, split
from fedray.errors import ConfigError, DataError
from fedray.federation.client import TWO
from fedray.models import ModelSpec
from fedray.randomness import borrowed, generator, seed_sequence
from fedray.types import DeviceProfile


def check_data(configs: Iterable[RunConfig]) -> None:
    """Partition the data of several configs as their runs will; equal partitions once.

    Raises:
        DataError: if data is missing, or cannot be partitioned as a config asks.
        ConfigError: if a config's batches are too small for its model, or too large for its devices.
    """
    datasets: dict[object, Dataset] = {}
    models: dict[object, ModelSpec] = {}
    memories: dict[object, MemoryModel] = {}
    seen = set()
    for config in configs:
        clients, options = config.clients, config.method.options
        work = (options.batch_size, _more_vectors(config), repr(clients.devices), clients.memory)
        key = (repr(config.data), clients.population, config.seed, config.model, config.norm, work)
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
        model, partition = models[built], dealt(config, dataset).partition
        check_pairs(config, model, partition)
        traced = (built, work[1])
        if traced not in memories:
            memories[traced] = memory_of(config, model)
        check_memory(config, model.name, memories[traced], fleet_of(config), partition)


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


def fleet_of(config: RunConfig) -> Fleet:
    """Return the devices of a config's clients."""
    clients = config.clients
    return draw(clients.population, clients.devices, seed_sequence(config.seed, "devices"), clients.jitter)


def memory_of(config: RunConfig, model: ModelSpec) -> MemoryModel:
    """Return the memory that training takes on a device, by a traced pass."""
    return MemoryModel.trace(
        model.bind(model.init(config.seed).flat),
        model.input_shape,
        model.layout,
        tokens=model.architecture.tokens,
        more_vectors=_more_vectors(config),
        pairs="train" in model.pairs,
    )


def _more_vectors(config: RunConfig) -> int:
    """Return vectors of training beside weights, gradients and update: optimiser, standardised weights.

    A step keeps the standardised weights and their gradients.
    """
    return optimizer_vectors(config.method.options) + 2 * config.standardizes


def check_memory(
    config: RunConfig, model: str, memory: MemoryModel, fleet: Fleet, partition: Partition
) -> None:
    """Refuse devices whose memory cannot hold the training of their clients.

    Raises:
        ConfigError: with each such device and the numbers, unless `clients.memory` is `ignore`.
    """
    if config.clients.memory == "ignore":
        return
    smaller, size = config.clients.memory == "batch", config.method.options.batch_size
    sizes, problems = np.asarray(partition.sizes), []
    for index, device in enumerate(fleet.profiles):
        most = int(sizes[fleet.index == index].max(initial=0))
        batch = min(memory.least if smaller else size, most)
        if batch and not memory.fits(batch, device.memory_bytes):
            problems.append(_short(device, model, memory, batch, smaller))
    if problems:
        raise ConfigError("\n".join(problems))


def _short(device: DeviceProfile, model: str, memory: MemoryModel, batch: int, smaller: bool) -> str:
    """Return what a device lacks, and what to change."""
    need, kept = memory.training_bytes(batch), memory.training_bytes(batch) - memory.vectors_bytes
    fitting = memory.largest_batch(batch, device.memory_bytes)
    change = "take it out of the mix, or a smaller model"
    if not smaller and memory.fits(fitting, device.memory_bytes):
        change = (
            f"batches of {fitting} fit: set method.batch_size={fitting}, or clients.memory=batch for smaller "
            f"batches on such devices only; or {change}"
        )
    return (
        f"clients.devices: {device.name} has {_mib(device.memory_bytes)} for training, but {model} needs "
        f"{_mib(need)}: {_mib(memory.vectors_bytes)} of weights, gradients and optimiser, {_mib(kept)} of a "
        f"batch of {batch} and its activations; {change} (clients.memory=ignore trains all the same)"
    )


def _mib(size: float) -> str:
    return f"{size / 2**20:,.4g} MiB"
