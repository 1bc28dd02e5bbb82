"""Whether the parts of a config fit each other. Costs no process, and writes nothing."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fedray.costs import devices
from fedray.data import DATASETS, DatasetSpec
from fedray.data.partition import Bootstrap
from fedray.errors import ConfigError, FedrayError, unknown
from fedray.experiment.tracking import check_uri
from fedray.models import MODELS, build_model

if TYPE_CHECKING:
    from fedray.experiment.config import ResourcesConfig, RunConfig

MOST_ACTORS_PER_CLIENT = 256
"""`actors: per_client` starts a process of some 200 MB for each client of the population."""


def problems(config: "RunConfig") -> list[str]:
    """Return everything that keeps a well-formed config from running, one line each."""
    found: list[str] = []
    for check in (_clients, _devices, _data, _model, _method, _tracking):
        found += check(config)
    return found


def _clients(config: "RunConfig") -> Iterator[str]:
    clients = config.clients
    if clients.cohort > clients.population:
        yield (
            f"clients.cohort: {clients.cohort} clients a round of a population of {clients.population}; "
            "lower clients.cohort or raise clients.population"
        )
    if clients.actors == "per_client" and clients.population > MOST_ACTORS_PER_CLIENT:
        yield (
            f"clients.actors: per_client would start {clients.population:,} processes of some 200 MB each "
            f"(allowed: {MOST_ACTORS_PER_CLIENT}); use auto, which hosts any number of them in a few actors"
        )
    if clients.actors == 0 and clients.resources.gpu:
        yield "clients.resources.gpu: clients in process (clients.actors=0) are not placed by Ray"
    yield from _resources(clients.resources, config)


def _resources(resources: "ResourcesConfig", config: "RunConfig") -> Iterator[str]:
    for name, own in resources.by_device.items():
        if name not in config.clients.devices:
            devices_here = config.clients.devices
            yield f"clients.resources.by_device: {unknown('device of this run', name, devices_here)}"
        if own.by_device:
            yield f"clients.resources.by_device.{name}.by_device: only one level is allowed"
    if resources.by_device and config.clients.actors == "per_client":
        yield "clients.resources.by_device: not together with clients.actors=per_client"


def _devices(config: "RunConfig") -> Iterator[str]:
    for name in config.clients.devices:
        yield from _complaints(lambda name=name: devices.profile(name), "clients.devices: ")


def _data(config: "RunConfig") -> Iterator[str]:
    data, population = config.data, config.clients.population
    if data.name not in DATASETS:
        yield f"data.name: {unknown('data set', data.name, DATASETS)}"
        return
    spec = DATASETS[data.name]
    yield from _complaints(lambda: spec.check(data.root), "")
    if data.validation_fraction + data.server_fraction >= 1:
        yield (
            f"data.validation_fraction + data.server_fraction = "
            f"{data.validation_fraction + data.server_fraction:g}: nothing is left for the clients"
        )
        return
    left = int(spec.train_examples * (1 - data.validation_fraction - data.server_fraction))
    if population > left and not isinstance(data.partition.options, Bootstrap):
        yield (
            f"clients.population: {population:,} clients, but {data.name} leaves about {left:,} training "
            "examples for them; lower it, or use data.partition.kind=bootstrap, where clients share examples"
        )
    if data.partition.kind == "natural" and not spec.has_writers:
        natural = sorted(name for name, other in DATASETS.items() if other.has_writers)
        yield (
            f"data.partition.kind: {data.name} does not say who made its examples; {', '.join(natural)} does"
        )


def _model(config: "RunConfig") -> Iterator[str]:
    if config.model not in MODELS:
        yield f"model: {unknown('model', config.model, MODELS)}"
        return
    if config.data.name not in DATASETS:
        return
    spec: DatasetSpec = DATASETS[config.data.name]
    reason = MODELS[config.model].accepts(spec.input_shape)
    if reason:
        yield f"model: {config.model} does not take {config.data.name}: {reason}"
        return
    size = build_model(config.model, spec.input_shape, spec.num_classes).layout.size
    for name in config.clients.devices:
        try:
            device = devices.profile(name)
        except ConfigError:
            continue  # already reported
        if not devices.fits(device, size):
            need = devices.training_memory_bytes(size)
            yield (
                f"clients.devices: {name} has {device.memory_bytes / 2**20:,.0f} MiB for training, but "
                f"{config.model} needs {need / 2**20:,.0f} MiB; take it out of the mix or use a smaller model"
            )


def _method(config: "RunConfig") -> Iterator[str]:
    method = config.method.options
    if method.uses_server_data and not config.data.server_fraction:
        yield (
            f"data.server_fraction: 0, but {config.method.name} trains on the server's own examples; "
            "set it, e.g. data.server_fraction=0.02"
        )
    problem = method.check(config.clients.population, config.rounds)
    if problem:
        yield f"method: {problem}"


def _tracking(config: "RunConfig") -> Iterator[str]:
    yield from _complaints(lambda: check_uri(config.tracking.uri), "")


def _complaints(check: Callable[[], object], prefix: str) -> Iterator[str]:
    try:
        check()
    except FedrayError as error:
        yield f"{prefix}{error}"
