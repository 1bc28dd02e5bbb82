"""What a run or a sweep will take, before it starts: rounds, bytes, FLOPs, seconds, memory, disk.

    configs → the first of each kind → three real rounds of it in a temporary folder → × rounds × trials

Later rounds are taken to cost what these do on average. A method that prunes later costs less.
"""

import logging
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedray.config.overrides import override_tree
from fedray.config.run_config import RunConfig
from fedray.experiment.cluster import start_ray
from fedray.experiment.homes import RUNS
from fedray.experiment.placement import START_S, groups_for, in_trial
from fedray.experiment.reaching import has_address
from fedray.experiment.room import LOWER, autoscaler, cluster_cpus, cluster_nodes, lacking
from fedray.experiment.run import run
from fedray.types import RoundReport

MEASURED = 3
"""Rounds that are run: bytes and FLOPs are their means, seconds those of the fastest; the first warms up."""


COSTS = (
    "bytes/up",
    "bytes/down",
    "flops/executed",
    "flops/clients",
    "energy/clients_j",
    "time/simulated_s",
    "time/compute_bound_s",
    "time/network_bound_s",
)
"""Metrics of a round that are added up."""


class _Enough(Exception):
    """The rounds to measure are made."""


@dataclass(frozen=True)
class Measure:
    """The costs of the first rounds of a config.

    Args:
        setup_s: measured seconds until round 1, data and set-up included.
        round_s: measured seconds of a round, its evaluation included.
        setup: set-up's value of each of COSTS.
        each: the same of a round.
        disk_bytes: size of its directory, checkpoints included.
        memory_bytes: peak memory of the process that trained.
    """

    setup_s: float
    round_s: float
    setup: tuple[float, ...]
    each: tuple[float, ...]
    disk_bytes: int
    memory_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run or a sweep will take; None where nothing was measured.

    Args:
        trials: how many.
        rounds: of all trials.
        concurrent: trials at once.
        up_bytes: sent by clients, in all trials.
        down_bytes: sent to clients.
        executed_flops: that the clients run.
        flops: of the clients, with masked weights as free: the theoretical count.
        energy_j: joules of the clients.
        simulated_s: seconds of the simulated devices, of all trials one after the other.
        compute_bound_s: the same if every client were a slow device on a fast link.
        network_bound_s: the same if every client were a fast device on a slow link.
        wall_s: seconds there, if its CPUs are as fast as this machine's.
        disk_bytes: of all directories.
        memory_bytes: of a process that trains.
        where: this machine or the cluster, in words.
        problems: what does not fit there.
    """

    trials: int
    rounds: int
    concurrent: int
    up_bytes: float | None
    down_bytes: float | None
    executed_flops: float | None
    flops: float | None
    energy_j: float | None
    simulated_s: float | None
    compute_bound_s: float | None
    network_bound_s: float | None
    wall_s: float | None
    disk_bytes: float | None
    memory_bytes: float | None
    where: str
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def plan(configs: Sequence[RunConfig], concurrent: int | None, *, sweeps: bool, measures: bool) -> Plan:
    """Estimate what some configs take on this machine, or on the cluster of RAY_ADDRESS.

    The rounds are measured on this machine.

    Args:
        configs: one for each trial.
        concurrent: trials at once; None: as many as there are CPUs.
        sweeps: whether they run as trials of a sweep, on Ray.
        measures: whether to run three rounds of the first config of each kind.

    Raises:
        ConfigError, DataError, ClientError, MethodError: as `run`, if a measured config cannot run.
        RunError: if there is no cluster at the address.
    """
    room = _cluster() if has_address() else _machine()
    cpus = max(1, int(room.cpus))
    at_once = min(len(configs), concurrent or cpus) if sweeps else 1
    found: dict[tuple[Any, ...], Measure] = {}
    total, disk, trial_s = [0.0] * len(COSTS), 0.0, 0.0
    for config in configs if measures else ():
        kind = (config.method.name, config.model, config.data.name, config.clients.cohort)
        if kind not in found:
            found[kind] = measure(config)
        one = found[kind]
        total = [t + s + config.rounds * e for t, s, e in zip(total, one.setup, one.each, strict=True)]
        disk += one.disk_bytes
        trial_s += one.setup_s + config.rounds * one.round_s
    memory = max((one.memory_bytes for one in found.values()), default=0)
    wall_s = (trial_s / min(at_once, cpus) + START_S) if sweeps else trial_s
    up, down, executed, flops, energy, *seconds = total if found else [None] * len(COSTS)
    return Plan(
        trials=len(configs),
        rounds=sum(config.rounds for config in configs),
        concurrent=at_once,
        up_bytes=up,
        down_bytes=down,
        executed_flops=executed,
        flops=flops,
        energy_j=energy,
        simulated_s=seconds[0],
        compute_bound_s=seconds[1],
        network_bound_s=seconds[2],
        wall_s=wall_s if found else None,
        disk_bytes=disk if found else None,
        memory_bytes=memory if found else None,
        where=room.name,
        problems=tuple(_problems(configs, room, at_once, memory, disk)),
    )


def measure(config: RunConfig) -> Measure:
    """Run the first rounds of a config in this process, in a folder that is removed."""
    tree = override_tree(config.to_tree(), {"clients.actors": 0, "tracking.uri": "none", "storage": None})
    times: list[float] = [time.perf_counter()]
    seen: list[RoundReport] = []
    wanted = min(MEASURED, config.rounds)

    def on_round(report: RoundReport) -> None:
        times.append(time.perf_counter())
        seen.append(report)
        if report.round == wanted:
            raise _Enough

    with tempfile.TemporaryDirectory(prefix="fedray-plan-") as folder, _silent():
        with suppress(_Enough):
            run(RunConfig.from_tree(tree), out=Path(folder) / "run", on_round=on_round)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        newest = max((p.stat().st_size for p in Path(folder).rglob("checkpoints/*")), default=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = 1000 * config.rounds  # of rounds.jsonl
    return Measure(
        setup_s=times[1] - times[0],
        round_s=min(after - before for before, after in pairwise(times[1:])),
        setup=_costs(seen[0]),
        each=_mean([_costs(report) for report in seen[1:]]),
        disk_bytes=size + newest + line,
        memory_bytes=peak,
    )


def _mean(costs: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(values) / len(costs) for values in zip(*costs, strict=True))


def _costs(report: RoundReport) -> tuple[float, ...]:
    return tuple(report.metrics.get(name, 0.0) for name in COSTS)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the warning that the measured run was cut short to ourselves."""
    logger = logging.getLogger("fedray")
    before = logger.disabled, logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.disabled, level = before
        logger.setLevel(level)


@dataclass(frozen=True)
class _Room:
    """Where the plan is to run.

    Args:
        name: in words.
        cpus: all CPUs.
        memory_bytes: of all nodes; None if unknown.
        node_bytes: of the node with the most; None if unknown.
        is_cluster: whether it is a Ray cluster, to which this process is connected.
    """

    name: str
    cpus: float
    memory_bytes: float | None
    node_bytes: float | None
    is_cluster: bool


def _machine() -> _Room:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return _Room("this machine", cpus, have, have, is_cluster=False)


def _cluster() -> _Room:
    """Connect to the cluster of RAY_ADDRESS and return what it has.

    Raises:
        RunError: if it cannot be reached, or has no CPUs.
    """
    start_ray()
    nodes = cluster_nodes()
    memory = [node.resources.get("memory", 0.0) for node in nodes]
    many = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    cpus = cluster_cpus(at_least_one=autoscaler() is None)
    name = f"the Ray cluster at {os.environ['RAY_ADDRESS']} ({many}, {cpus:g} CPUs)"
    return _Room(name, cpus, sum(memory) or None, max(memory, default=0.0) or None, is_cluster=True)


def _problems(
    configs: Sequence[RunConfig], room: _Room, at_once: int, memory: int, disk: float
) -> Iterator[str]:
    """Yield what does not fit."""
    share = max(1, int(room.cpus)) / at_once
    yield from _cluster_problems(configs, share) if room.is_cluster else _cpu_problems(configs, room, share)
    processes = at_once * max(1, *(_actors(config, share) for config in configs))
    if room.node_bytes is not None and memory > room.node_bytes:
        yield (
            f"a process that trains needs about {memory / 2**30:.3g} GiB of memory, and no node of "
            f"{room.name} has more than {room.node_bytes / 2**30:.3g}"
        )
    elif room.memory_bytes is not None and memory * processes > room.memory_bytes:
        yield (
            f"{processes} processes need about {memory * processes / 2**30:.3g} GiB of memory, and "
            f"{room.name} has {room.memory_bytes / 2**30:.3g}: lower clients.actors or tune.concurrent"
        )
    here = RUNS if RUNS.exists() else Path()
    free = shutil.disk_usage(here).free
    if disk > free:
        yield f"the directories need about {disk / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free here"


def _cpu_problems(configs: Sequence[RunConfig], room: _Room, share: float) -> Iterator[str]:
    need = max(_cpus(config, share) for config in configs)
    if need > room.cpus + 1e-6:
        yield f"client actors need {need:g} CPUs, and this machine has {room.cpus:g}: lower clients.actors"


def _cluster_problems(configs: Sequence[RunConfig], share: float) -> Iterator[str]:
    """Yield the reasons why the cluster has no room for the actors of a config, each once."""
    who, seen = "a trial" if len(configs) > 1 else "the run", set()
    nodes, grows = cluster_nodes(), autoscaler() is not None
    for config in configs:
        if config.clients.actors == 0 or in_trial(config, share):
            continue
        lacks = lacking(groups_for(config, share), nodes)
        if lacks is not None and lacks not in seen:
            seen.add(lacks)
            then = "it waits for the cluster's autoscaler" if grows else LOWER
            yield f"clients.resources: {who} needs {lacks}; {then}"


def _actors(config: RunConfig, cpus: float) -> int:
    """Return the processes in which the clients of a trial train."""
    if config.clients.actors == 0 or in_trial(config, cpus):
        return 1
    return sum(group.actors for group in groups_for(config, cpus))


def _cpus(config: RunConfig, cpus: float) -> float:
    if config.clients.actors == 0 or in_trial(config, cpus):
        return 0.0
    return sum(group.actors * group.options.cpu for group in groups_for(config, cpus))
