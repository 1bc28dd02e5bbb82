"""Where clients train: in this process, or in actors on Ray.

    config → groups of actors with their resources → pool of clients

Only runs with client actors import Ray.
"""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial

from fedray.config import plugins
from fedray.config.run_config import ResourcesConfig, RunConfig
from fedray.experiment.cluster import start_ray
from fedray.experiment.head import ClusterHead
from fedray.experiment.reaching import has_address
from fedray.experiment.room import busy_with_others, check_room, cluster_cpus
from fedray.federation.aggregate import chunk_size
from fedray.federation.patience import Patience
from fedray.federation.pool import ActorOptions, ClientPool, Group, LocalPool, PoolFactory, RayPool
from fedray.federation.worker import Workplace
from fedray.shares import floor_of
from fedray.types import Mask

logger = logging.getLogger(__name__)

FLOPS_PER_S, STEP_S, CLIENT_S = 8e10, 2e-3, 1e-3
"""Rough cost of training on one core: by FLOPs, by SGD step, by client."""
START_S = 10.0
"""Rough seconds until a local Ray and its client actors have started."""
FIRST_S, FIRST_SHARE = 600.0, 10
"""The first call to a client actor may take these seconds, and as many expected rounds times the patience."""
STACKED_CLIENTS, STACKED_WEIGHTS = 32, 2**26
"""Most clients, and most weights of them all, that `clients.stack=auto` trains together.

A model must fit in 16 times. Estimates: unmeasured on a GPU.
"""


def pool_for(config: RunConfig, cpus: float | None = None) -> PoolFactory:
    """Return a factory of the pool that a config asks for.

    Args:
        config: its `clients.actors` and `clients.resources` are read.
        cpus: CPUs of a trial; None: all of the cluster's. Starts a local Ray if there is none.
    """
    if config.clients.actors == 0 or (cpus is not None and in_trial(config, cpus)):
        return LocalPool

    def make(place: Workplace) -> ClientPool:
        start_ray()
        groups = groups_for(config, cpus if cpus is not None else _cpus(config))
        prepare = partial(plugins.take_over, plugins.sources())
        return RayPool(
            place,
            groups,
            per_client=config.clients.actors == "per_client",
            patience=patience_of(config, place),
            prepare=prepare,
            busy=partial(busy_with_others, groups),
            head=ClusterHead(),
        )

    return make


def patience_of(config: RunConfig, place: Workplace) -> Patience:
    """Return how long calls to client actors may take; the first one by the expected time of a round."""
    factor, round_s = config.clients.patience, expected_s(config, place) / config.rounds
    return Patience(factor, first_s=FIRST_S + FIRST_SHARE * (factor or 0) * round_s)


def in_trial(config: RunConfig, cpus: float) -> bool:
    """Tell whether the clients of a trial train in the trial's own process.

    With `clients.actors=auto` they do if the trial has one CPU and its actors need nothing else. That saves a
    process, and the weights are the same.
    """
    return config.clients.actors == "auto" and cpus < 2 and config.clients.resources == ResourcesConfig()


def placed(config: RunConfig, place: Workplace, meanwhile: Callable[[], object]) -> PoolFactory:
    """Decide where a run's clients train, and connect to Ray, or start it, if they train there.

    Called before the run writes to disk. `clients.actors=auto` takes this process if the rounds are expected
    to end sooner here than with the start of a local Ray. A cluster (RAY_ADDRESS, or a Ray that this process
    has already) is used in any case.

    Args:
        config: of the run.
        place: its workplace.
        meanwhile: called while Ray starts.

    Raises:
        RunError: as `start_ray`.
        ConfigError: if the cluster has no room for the client actors.
    """
    if config.clients.actors == 0 or _is_short(config, place):
        return LocalPool
    start_ray(meanwhile)
    groups = groups_for(config, _cpus(config))
    check_room(groups, "the run")
    _warn_of_idle(config, place, sum(group.actors for group in groups))
    return pool_for(config)


def _warn_of_idle(config: RunConfig, place: Workplace, actors: int) -> None:
    """Log a warning if the cohort has fewer chunks than there are actors; one actor trains a chunk."""
    clients = config.clients
    chunks = -(-clients.cohort // (clients.chunk or chunk_size(clients.cohort, place.stack)))
    if clients.actors != "per_client" and chunks < min(actors, clients.cohort):
        logger.warning(
            "%d of %d client actors have nothing to do: the cohort of %d clients is cut into %d chunks. Set "
            "clients.chunk=%d or less",
            *(actors - chunks, actors, clients.cohort, chunks, clients.cohort // actors or 1),
        )


def _is_short(config: RunConfig, place: Workplace) -> bool:
    """Tell whether a run with `clients.actors=auto` is too short to pay for the start of a local Ray."""
    clients = config.clients
    if clients.actors != "auto" or clients.resources != ResourcesConfig() or _has_ray():
        return False
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here_s = expected_s(config, place)
    with_ray_s = here_s / cpus + START_S
    short = here_s <= with_ray_s
    logger.info(
        "training is expected to take about %.2g s in this process, %.2g s with %d actors on Ray: "
        "clients.actors=auto takes %s",
        *(here_s, with_ray_s, cpus, "this process" if short else "Ray"),
    )
    return short


def expected_s(config: RunConfig, place: Workplace) -> float:
    """Return roughly the seconds that the training of a run takes on one core."""
    method, n = place.method, int(place.population.partition.sizes.mean())
    steps = method.local_steps(n)
    examples = min(steps * method.batch_size, steps * n)
    flops = examples * place.flops.train(Mask.full(place.model.layout))
    return config.rounds * config.clients.cohort * (flops / FLOPS_PER_S + steps * STEP_S + CLIENT_S)


def stack_of(config: RunConfig, weights: int) -> int:
    """Return how many clients of a run train together, by its config alone: actors must not change a bit.

    Args:
        config: of the run.
        weights: entries of the model's vector.
    """
    clients = config.clients
    if clients.stack != "auto":
        return clients.stack
    groups = [clients.resources, *clients.resources.by_device.values()]
    small = 16 * weights <= STACKED_WEIGHTS
    alone = clients.actors == "per_client" or config.train.precision != "fp32"
    if alone or not small or not all(group.gpu for group in groups):
        return 1
    return min(STACKED_CLIENTS, STACKED_WEIGHTS // weights)


def _has_ray() -> bool:
    """Tell whether this process is connected to Ray, or is to connect to the cluster of RAY_ADDRESS."""
    ray = sys.modules.get("ray")
    return has_address() or (ray is not None and ray.is_initialized())


def _cpus(config: RunConfig) -> float:
    """Return the CPUs to share out; none are needed yet if the config sets the CPUs of each actor."""
    clients = config.clients
    shares = clients.actors == "auto" or clients.resources.cpu is None
    growing = None if clients.actors == "auto" else float(_number_of_actors(config, 0.0))
    return cluster_cpus(at_least_one=shares, growing=growing)


def actors_for(config: RunConfig, cpus: float) -> list[ActorOptions]:
    """Return the resources of each client actor of a trial; in process, those of the trial itself."""
    if config.clients.actors == 0 or in_trial(config, cpus):
        return [ActorOptions(cpu=min(1.0, cpus))]
    return [group.options for group in groups_for(config, cpus) for _ in range(group.actors)]


def groups_for(config: RunConfig, cpus: float) -> list[Group]:
    """Return the groups of actors: how many, and the resources of each.

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
