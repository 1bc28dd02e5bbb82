"""Where clients train: in this process, or in actors on a Ray that this starts or finds.

    config → groups of actors, and what each asks of Ray → pool of clients

Ray is imported only where it is needed: a run in process never loads it.
"""

import atexit
import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedray.errors import RunError
from fedray.experiment import plugins
from fedray.experiment.config import ResourcesConfig, RunConfig
from fedray.federation.pool import ActorOptions, ClientPool, Group, LocalPool, PoolFactory, RayPool
from fedray.federation.worker import Workplace
from fedray.shares import floor_of


def pool_for(config: RunConfig, cpus: float | None = None) -> PoolFactory:
    """Return what makes the pool that a config asks for.

    Args:
        config: its `clients.actors` and `clients.resources` are read.
        cpus: CPUs that may be used; None: all of the cluster's. Starts a local Ray if there is none.
    """
    if config.clients.actors == 0:
        return LocalPool

    def make(place: Workplace) -> ClientPool:
        start_ray()
        groups = groups_for(config, cpus if cpus is not None else _cluster("CPU"))
        return RayPool(place, groups, per_client=config.clients.actors == "per_client")

    return make


def groups_for(config: RunConfig, cpus: float) -> list[Group]:
    """Return how many actors there are, and what each asks of Ray.

    One group, and one for each device with its own.
    """
    clients, resources = config.clients, config.clients.resources
    total = _number_of_actors(config, cpus)
    weights = sum(clients.devices.values())
    shares = {name: clients.devices[name] / weights for name in resources.by_device}
    own = {name: max(1, round(total * share)) for name, share in shares.items()}
    rest = max(1, total - sum(own.values()))
    everyone = sum(own.values()) + rest
    groups = [Group(rest, _options(resources, cpus, everyone))]
    for name, count in own.items():
        groups.append(Group(count, _options(resources.by_device[name], cpus, everyone)))
    return groups


def _number_of_actors(config: RunConfig, cpus: float) -> int:
    actors, resources = config.clients.actors, config.clients.resources
    if actors == "per_client":
        return config.clients.population
    if actors != "auto":
        return actors
    return max(1, floor_of(cpus / (resources.cpu or 1), 1))


def _options(resources: ResourcesConfig, cpus: float, actors: int) -> ActorOptions:
    # Ray counts CPUs in ten-thousandths; round down, or the last actor would not fit
    shared = min(1.0, int(cpus / actors * 1e4) / 1e4)
    cpu = shared if resources.cpu is None else resources.cpu
    return ActorOptions(cpu, resources.gpu, dict(resources.custom), dict(resources.labels))


def start_ray() -> None:
    """Connect to the cluster of RAY_ADDRESS, or start a local Ray that ends with this process; once.

    Raises:
        RunError: if there is no such cluster.
    """
    ray = import_ray()
    for module in plugins.imported_modules():  # workers cannot import a user's file by name
        ray.cloudpickle.register_pickle_by_value(module)
    if ray.is_initialized():
        return
    address = _address()
    local = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RunError(f"no Ray at {address!r}: {error}") from error


def import_ray() -> Any:
    """Import Ray, with what it reads at that moment settled; return the module."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if _address() == "local" and "ray" not in sys.modules:
        _private_token()
    import ray

    return ray


def _address() -> str:
    return os.environ.get("RAY_ADDRESS") or "local"


def _private_token() -> None:
    """Give a local Ray a token of its own, unless that is settled: by default it writes one into the home."""
    if any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    handle, path = tempfile.mkstemp(prefix="fedray-token-")  # readable by this user alone
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    atexit.register(Path(path).unlink, missing_ok=True)  # runs after Ray's own, which is registered later
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": path}


def _cluster(resource: str) -> float:
    import ray

    return float(ray.cluster_resources().get(resource, 0.0))
