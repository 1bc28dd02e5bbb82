"""Check that the parts of a config fit each other. Starts no process and writes nothing."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch

from fedray.costs import clock, devices
from fedray.costs.differences import STC, DeltaCodec
from fedray.costs.flops import FlopModel
from fedray.data import DATASETS, DatasetSpec
from fedray.data.partition import Bootstrap
from fedray.data.splits import set_aside
from fedray.errors import ConfigError, FedrayError, unknown
from fedray.federation.density import cannot_start
from fedray.federation.method import Setting
from fedray.federation.sampling import Fastest
from fedray.models import MODELS, OURS, ModelSpec, broken, outline, refusal
from fedray.models.sparse_layers import kernels_of
from fedray.training.precision import refusal as refusal_of_precision

if TYPE_CHECKING:
    from fedray.config.run_config import ResourcesConfig, RunConfig

MOST_ACTORS_PER_CLIENT = 256
"""`actors: per_client` starts a process of some 200 MB for each client of the population."""

MOST_ACTORS = 10_000
MOST_CLIENTS = 100_000_000
"""A run keeps some 20 bytes for each client of the population."""

Problem = tuple[str, str]
"""The key to change, and the reason."""


def problems(config: "RunConfig") -> list[Problem]:
    """Return every reason why a well-formed config cannot run."""
    found: list[Problem] = []
    for check in (_clients, _devices, _data, _model, _norm, _standardization, _method, _uplink, _precision):
        found += check(config)
    return found


def _clients(config: "RunConfig") -> Iterator[Problem]:
    clients = config.clients
    if clients.cohort > clients.population:
        yield (
            "clients.cohort",
            f"{clients.cohort} clients a round of a population of {clients.population}; lower clients.cohort "
            "or raise clients.population",
        )
    if clients.population > MOST_CLIENTS:
        yield (
            "clients.population",
            f"{clients.population:,}; a run keeps some bytes for each client, of at most {MOST_CLIENTS:,}",
        )
    if clients.actors == "per_client" and clients.population > MOST_ACTORS_PER_CLIENT:
        yield (
            "clients.actors",
            f"per_client would start {clients.population:,} processes of some 200 MB each (allowed: "
            f"{MOST_ACTORS_PER_CLIENT}); use auto, which hosts any number of clients in a few actors",
        )
    if isinstance(clients.actors, int) and clients.actors > MOST_ACTORS:
        yield "clients.actors", f"{clients.actors:,} processes of some 200 MB each; at most {MOST_ACTORS:,}"
    if clients.actors == 0 and clients.resources.gpu:
        yield "clients.resources.gpu", "clients in process (clients.actors=0) are not placed by Ray"
    if clients.over_selection and clients.sampler.options != Fastest(over_selection=clients.over_selection):
        yield (
            "clients.over_selection",
            f"{clients.over_selection:g}, which means the sampler fastest with this over_selection, but "
            f"clients.sampler is given too, with name={clients.sampler.name}; set "
            "clients.over_selection=0, or leave clients.sampler out",
        )
    yield from _resources(clients.resources, config)
    yield from _stack(config)


def _stack(config: "RunConfig") -> Iterator[Problem]:
    clients, precision = config.clients, config.train.precision
    if clients.stack in ("auto", 1):
        return
    if clients.actors == "per_client":
        yield (
            "clients.stack",
            f"{clients.stack}, but with clients.actors=per_client each client trains alone in its actor; set "
            "clients.stack=1, or another clients.actors",
        )
    if precision != "fp32":
        yield (
            "clients.stack",
            f"{clients.stack}, but with train.precision={precision} clients train one after the other; set "
            "clients.stack=1, or train.precision=fp32",
        )


def _resources(resources: "ResourcesConfig", config: "RunConfig") -> Iterator[Problem]:
    for name, own in resources.by_device.items():
        if name not in config.clients.devices:
            devices_here = config.clients.devices
            yield "clients.resources.by_device", unknown("device of this run", name, devices_here)
        if own.by_device:
            yield f"clients.resources.by_device.{name}.by_device", "only one level is allowed"
    if resources.by_device and config.clients.actors == "per_client":
        yield "clients.resources.by_device", "not together with clients.actors=per_client"


def _devices(config: "RunConfig") -> Iterator[Problem]:
    for name in config.clients.devices:
        yield from _complaints(partial(devices.profile, name), "clients.devices", name)


def _data(config: "RunConfig") -> Iterator[Problem]:
    data, population = config.data, config.clients.population
    if data.name not in DATASETS:
        yield "data.name", unknown("data set", data.name, DATASETS)
        return
    spec = DATASETS[data.name]
    yield from _complaints(lambda: spec.check(data.root), "data.root", data.root)
    if data.validation_fraction + data.server_fraction >= 1:
        yield (
            "data.validation_fraction",
            f"{data.validation_fraction:g} for validation and data.server_fraction={data.server_fraction:g} "
            "leave nothing for the clients; the sum must be below 1",
        )
        return
    asides = (data.validation_fraction, data.server_fraction)
    if spec.train_examples is None:  # known once the files are read
        left = population
    else:
        left = spec.train_examples - sum(set_aside(fraction, spec.train_examples) for fraction in asides)
    if population > left and not isinstance(data.partition.options, Bootstrap):
        yield (
            "clients.population",
            f"{population:,} clients, but {data.name} leaves about {left:,} training examples for them; "
            "lower it, or use data.partition.kind=bootstrap, where clients share examples",
        )
    if data.partition.kind == "natural" and not spec.has_writers:
        natural = sorted(name for name, other in DATASETS.items() if other.has_writers)
        yield (
            "data.partition.kind",
            f"natural: {data.name} does not name the writers of its examples; these do: {', '.join(natural)}",
        )


def _model(config: "RunConfig") -> Iterator[Problem]:
    if config.model not in MODELS:
        yield "model", unknown("model", config.model, MODELS)
        return
    if config.data.name not in DATASETS:
        return
    spec: DatasetSpec = DATASETS[config.data.name]
    reason = refusal(MODELS[config.model], spec.input_shape, spec.tokens)
    if reason:
        yield "model", f"{config.model} does not take {config.data.name}: {reason}"
        return
    model, fault = _built(config, spec)
    if model is None:
        yield "model", fault
        return
    size = model.layout.size
    for name in config.clients.devices:
        try:
            device = devices.profile(name)
        except ConfigError:
            continue  # already reported
        if not clock.fits(device, size):
            need = clock.training_memory_bytes(size)
            yield (
                "clients.devices",
                f"{name} has {device.memory_bytes / 2**20:,.0f} MiB for training, but {config.model} needs "
                f"{need / 2**20:,.0f} MiB; take it out of the mix or use a smaller model",
            )


def _built(config: "RunConfig", spec: DatasetSpec) -> tuple[ModelSpec | None, str]:
    """Return the model of a config and no text, or None and the reason why it cannot be trained."""
    try:
        model = _outline(config, spec)
        fault = broken(model) or _not_counted(model)
    except ConfigError as error:
        return None, str(error).removeprefix("model: ")
    return (model, "") if fault is None else (None, fault)


def _not_counted(model: ModelSpec) -> str | None:
    """Return why the FLOPs of a user's model cannot be counted; None if they can, or if it is one of ours."""
    return None if model.architecture in OURS else _counting_fault(model)


@lru_cache(maxsize=64)
def _counting_fault(model: ModelSpec) -> str | None:
    try:
        FlopModel.trace(model.module, model.input_shape, model.layout, tokens=model.architecture.tokens)
    except ConfigError as error:
        return f"{model.name}: {str(error).removeprefix('model: ')}"
    return None


def _norm(config: "RunConfig") -> Iterator[Problem]:
    spec = DATASETS.get(config.data.name)
    if config.norm == "average" or spec is None:
        return
    lacks, others = _lacking(config.model, spec, lambda model: bool(model.norms.names))
    if lacks:
        yield (
            "norm",
            f"{config.norm}, but {config.model} has no BatchNorm, so norm has no effect; leave it at "
            f"average, or use a model that has one: {others}",
        )


def _standardization(config: "RunConfig") -> Iterator[Problem]:
    spec = DATASETS.get(config.data.name)
    if not config.weight_standardization or spec is None:
        return
    lacks, others = _lacking(config.model, spec, lambda model: bool(kernels_of(model.module)))
    if lacks:
        yield (
            "weight_standardization",
            f"true, but {config.model} has no convolution, so it has no effect; leave it out, or use a model "
            f"that has one: {others}",
        )


def _lacking(name: str, spec: DatasetSpec, has: Callable[[ModelSpec], bool]) -> tuple[bool, str]:
    """Tell whether a model that takes the data lacks a part; name the models that have it."""

    def has_it(model: str) -> bool:
        with suppress(ConfigError):  # a broken entry says so where it is asked for
            return has(outline(model, spec.input_shape, spec.num_classes))
        return False

    able = [name for name, other in MODELS.items() if refusal(other, spec.input_shape, spec.tokens) is None]
    return name in able and not has_it(name), ", ".join(filter(has_it, able)) or "none"


def _method(config: "RunConfig") -> Iterator[Problem]:
    method = config.method.options
    if method.uses_server_data and not config.data.server_fraction:
        yield (
            "data.server_fraction",
            f"0, but {config.method.name} trains on the server's own examples; set it, e.g. "
            "data.server_fraction=0.02",
        )
    if method.uses_validation_data and not config.data.validation_fraction:
        yield (
            "data.validation_fraction",
            f"0, but {config.method.name} uses validation data with these options; set it, e.g. "
            "data.validation_fraction=0.1",
        )
    if method.optimizer == "adam" and method.momentum:
        yield "method.momentum", f"{method.momentum:g}, but Adam does not use momentum; set it to 0"
    spec, architecture = DATASETS.get(config.data.name), MODELS.get(config.model)
    if spec is None or architecture is None or refusal(architecture, spec.input_shape, spec.tokens):
        return  # already reported
    clients = config.clients
    model, _ = _built(config, spec)
    if model is None:
        return  # already reported
    setting = Setting(model, clients.population, clients.cohort, config.rounds)
    problem = cannot_start(method, setting)
    if problem:
        yield "method", problem


def _uplink(config: "RunConfig") -> Iterator[Problem]:
    """Refuse what a codec of differences cannot carry."""
    uplink, method = config.clients.uplink, config.method.options
    if not isinstance(uplink.options, DeltaCodec):
        return
    if not method.uplink.lossless:
        yield (
            "method.uplink_values",
            f"{method.uplink_values}, but clients.uplink.name={uplink.name} writes updates in its own "
            "way; set method.uplink_values=fp32, or clients.uplink.name=plain",
        )
    if method.fold.by == "nonzero":
        yield (
            "clients.uplink.name",
            f"{uplink.name}, but {config.method.name} with these options counts who holds a weight by w ≠ 0, "
            "and a difference that is rounded or left out moves zeros; set method.aggregation=mask, or "
            "clients.uplink.name=plain",
        )
    if isinstance(uplink.options, STC) and config.norm == "average" and _has_statistics(config):
        yield (
            "clients.uplink.name",
            f"{uplink.name} has one size for all entries, and running statistics of {config.model}'s "
            "BatchNorm are of another size than weights; set norm=group, local or static, or another "
            "clients.uplink.name",
        )


def _has_statistics(config: "RunConfig") -> bool:
    spec, architecture = DATASETS.get(config.data.name), MODELS.get(config.model)
    if spec is None or architecture is None or refusal(architecture, spec.input_shape, spec.tokens):
        return False  # already reported
    model, _ = _built(config, spec)
    return model is not None and bool(model.norms.tracked)


def _precision(config: "RunConfig") -> Iterator[Problem]:
    """Ask this machine, where the server trains and clients do unless Ray places them elsewhere.

    A worker asks its own, too.
    """
    groups = [config.clients.resources, *config.clients.resources.by_device.values()]
    if all(group.gpu for group in groups):
        return  # which GPU is known in the actors
    reason = refusal_of_precision(config.train.precision, torch.device("cpu"))
    if reason is not None:
        yield "train.precision", reason


def _outline(config: "RunConfig", spec: DatasetSpec) -> ModelSpec:
    """Return the structure of the config's model, known to take the data set; built once for all points."""
    return outline(
        config.model,
        spec.input_shape,
        spec.num_classes,
        norm=config.norm,
        standardize=config.standardizes,
        prune_first=config.prune_first,
        prune_last=config.prune_last,
    )


def _complaints(check: Callable[[], object], key: str, given: object) -> Iterator[Problem]:
    try:
        check()
    except FedrayError as error:
        yield key, str(error).removeprefix(f"{key}: ")
    except (OSError, RuntimeError, ValueError) as error:  # a name that the system cannot even look up
        yield key, f"{str(given)!r} cannot be used: {error}"
