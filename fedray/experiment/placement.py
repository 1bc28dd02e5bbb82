"""Where clients train: in this process, or in actors on Ray.

    config → groups of actors, and what each asks of Ray → pool of clients

Ray is imported only where it is needed: a run in process never loads it.
"""

from fedray.experiment.cluster import cluster_cpus, start_ray
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
        groups = groups_for(config, cpus if cpus is not None else _cpus(config))
        return RayPool(place, groups, per_client=config.clients.actors == "per_client")

    return make


def reach(config: RunConfig) -> None:
    """Connect to Ray, or start it, if a run's clients train there: before the run leaves anything on disk.

    Raises:
        RunError: as `start_ray`.
    """
    if config.clients.actors != 0:
        start_ray()


def _cpus(config: RunConfig) -> float:
    """Return the CPUs to share out; there may be none yet if the config says what each actor asks for."""
    clients = config.clients
    shares = clients.actors == "auto" or clients.resources.cpu is None
    return cluster_cpus(at_least_one=shares)


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
