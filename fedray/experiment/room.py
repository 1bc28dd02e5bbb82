"""The room of a cluster: whether client actors fit on its nodes, now or once it has grown.

    groups of actors → nodes with their resources and labels → fits · waits for the autoscaler · refused

What an autoscaler may start is known to it alone. So it is asked by a placement group of the actors' bundles,
which is removed when it is placed; an autoscaler that starts nothing for it is not waited for.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import floor, inf
from typing import Any

from fedray.errors import ConfigError, RunError
from fedray.experiment.reaching import connected_address, given_address
from fedray.federation.pool import ActorOptions, Group

logger = logging.getLogger(__name__)

SLACK = 1e-6
"""Shares of a resource add up to it but for rounding."""
IDLE_S = 120.0
"""Seconds without a node on its way, after which an autoscaler is not waited for."""
ASK_EVERY_S = 1.0
"""Seconds for which an answer of the cluster counts."""
SAY_S = 60.0
"""Seconds between two messages of a wait."""


@dataclass(frozen=True)
class Node:
    """A node of a cluster: its resources by name, its labels, and Ray's id of it."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    id: str = ""

    def has(self, labels: Mapping[str, str]) -> bool:
        """Tell whether Ray's selector takes the node: for each label `v`, `!v`, `in(v,w)` or `!in(v,w)`."""
        return all(_takes(selector, self.labels.get(key)) for key, selector in labels.items())

    def actors(self, options: ActorOptions) -> float:
        """Return how many actors with these resources the empty node has room for."""
        if not self.has(options.labels):
            return 0
        shares = [self.resources.get(name, 0.0) / need + SLACK for name, need in options.bundle.items()]
        return floor(min(shares)) if shares else inf


def _takes(selector: str, value: str | None) -> bool:
    wanted = selector.removeprefix("!")
    values = wanted[3:-1].split(",") if wanted.startswith("in(") and wanted.endswith(")") else [wanted]
    return (value in [one.strip() for one in values]) is not selector.startswith("!")


def cluster_nodes() -> list[Node]:
    """Return the living nodes of the cluster that this process is connected to."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        Node(dict(node["Resources"]), dict(node.get("Labels") or {}), node.get("NodeID", ""))
        for node in alive
    ]


def cluster_cpus(*, at_least_one: bool = True, growing: float | None = None) -> float:
    """Return the CPUs of the cluster that this process is connected to.

    Args:
        at_least_one: whether it must have one.
        growing: what to count with if it has none yet and its autoscaler may start nodes; None: the CPUs of
            the first node.

    Raises:
        RunError: if it has none although there must be `at_least_one`, and no autoscaler starts one.
    """
    import ray

    def count() -> float:
        return float(ray.cluster_resources().get("CPU", 0.0))

    if count() == 0 and at_least_one:
        if autoscaler() is None:
            raise RunError(
                f"the Ray cluster at {given_address()!r} has no CPUs to train on: add a node that has some "
                "(`ray start --address=… --num-cpus=…`), or wait until `ray status` shows them"
            )
        if growing is not None:
            return growing
        await_room([Group(1)], "the first client actor", "the cluster has no CPUs")
    return count()


_asked_at, _answer = -inf, 0.0


def trials_at_once(cpus: float, most: int) -> int:
    """Return how many trials of a sweep may run at once now: one for each share of the cluster's CPUs.

    Nodes may have joined or left. Where an autoscaler starts nodes, all trials ask for room.

    Args:
        cpus: of each trial.
        most: trials of the sweep.
    """
    global _asked_at, _answer
    if time.monotonic() - _asked_at > ASK_EVERY_S:
        _answer = inf if autoscaler() is not None else cluster_cpus(at_least_one=False)
        _asked_at = time.monotonic()
    return max(1, int(min(most, _answer / cpus + SLACK)))


def check_room(groups: Sequence[Group], who: str) -> None:
    """Make sure that the cluster, to which this process is connected, has room for client actors.

    If its autoscaler may start the nodes that are missing, wait for them.

    Args:
        groups: groups of actors.
        who: the run or trial, for messages.

    Raises:
        ConfigError: if there never is room, with the resources asked for and those of the cluster.
    """
    lacks = lacking(groups, cluster_nodes())
    if lacks is None:
        return
    if autoscaler() is None:
        raise ConfigError(f"clients.resources: {who} needs {lacks}; {LOWER}")
    await_room(groups, who, f"{who} needs {lacks}")


def busy_with_others(groups: Sequence[Group], options: ActorOptions, actor: Any) -> str | None:
    """Return what a client actor waits for, if other work holds its place in the cluster.

    Args:
        groups: of the run; an actor of each must fit on the nodes, were they empty.
        options: of the actor.
        actor: its handle.

    Returns:
        What it needs, what the cluster has and what is free; None if it has a place, if a node has room for
        it, if the nodes never have, or if that is not known.
    """
    import ray

    if connected_address() is None:
        return None  # Ray's client knows no places
    table, nodes = ray._private.state.actors(actor._actor_id.hex()), cluster_nodes()
    if not table or table.get("Pid") or lacking([replace(group, actors=1) for group in groups], nodes):
        return None
    free = ray._private.state.available_resources_per_node()
    left = [replace(node, resources=free.get(node.id, {})) for node in nodes]
    if any(node.actors(options) for node in left):
        return None
    return _held(options.bundle, nodes, _sum(left))


def missing_now(need: Mapping[str, float]) -> str | None:
    """Return what a placement group needs, what the cluster has and what is free.

    None if so much is free, or if no placement group waits for its place: then a trial is starting in it.
    """
    import ray

    if all(group["state"] != "PENDING" for group in ray.util.placement_group_table().values()):
        return None
    free = ray.available_resources()
    if all(free.get(name, 0.0) + SLACK >= amount for name, amount in need.items()):
        return None
    return _held(need, cluster_nodes(), free)


def _held(need: Mapping[str, float], nodes: Sequence[Node], free: Mapping[str, float]) -> str:
    have = _sum(nodes)
    left = {name: free.get(name, 0.0) for name in have}
    return (
        f"one needs {_shown(need)}; the cluster has {_shown(have)}, free are {_shown(left)}, and other work "
        "holds the rest"
    )


def _sum(nodes: Sequence[Node]) -> dict[str, float]:
    """Return the resources of some nodes together."""
    names = dict.fromkeys(name for node in nodes for name in node.resources)
    return {name: sum(node.resources.get(name, 0.0) for node in nodes) for name in names}


LOWER = "lower clients.actors or clients.resources"


def lacking(groups: Sequence[Group], nodes: Sequence[Node]) -> str | None:
    """Return what groups of actors need and the empty nodes do not have, in words; None: they fit."""
    have = _sum(nodes)
    need: dict[str, float] = {}
    for group in groups:
        for name, amount in group.options.bundle.items():
            need[name] = need.get(name, 0.0) + group.actors * amount
    missing = [
        f"{amount:g} × {name}" for name, amount in need.items() if amount > have.get(name, 0.0) + SLACK
    ]
    if missing:
        return f"{', '.join(missing)} for its client actors, but the cluster has {_shown(have)}"
    for group in groups:
        labels, fits = group.options.labels, sum(node.actors(group.options) for node in nodes)
        if not any(node.has(labels) for node in nodes):
            return (
                f"client actors on nodes with the labels {_pairs(labels)}, but the nodes of the cluster have "
                f"{'; '.join(_pairs(node.labels) for node in nodes)}"
            )
        where = f" on nodes with the labels {_pairs(labels)}" if labels else ""
        there = "; ".join(_shown(node.resources) for node in nodes if node.has(labels))
        if fits == 0:
            return (
                f"client actors with {_shown(group.options.bundle)} each{where}, but no node of the cluster "
                f"has that much: {there}"
            )
        if fits < group.actors:
            return (
                f"{group.actors} client actors with {_shown(group.options.bundle)} each{where}, but the "
                f"nodes have room for {fits:g} of them: {there}"
            )
    return None


def _shown(resources: Mapping[str, float]) -> str:
    """Return resources in words, without those that Ray adds by itself."""
    kept = {"CPU": 0.0, "GPU": 0.0} | dict(resources)
    inner = ("node:", "memory", "object_store_memory", "accelerator_type:")
    return ", ".join(f"{kept[name]:g} × {name}" for name in sorted(kept) if not name.startswith(inner))


def _pairs(labels: Mapping[str, str]) -> str:
    """Return labels in words, without those that Ray adds by itself."""
    own = {key: value for key, value in labels.items() if not key.startswith("ray.io/")}
    return ", ".join(f"{key}={value}" for key, value in sorted(own.items())) or "no labels"


# ── a cluster that grows ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Autoscaler:
    """What the autoscaler of a cluster says of itself.

    Args:
        starting: nodes that it has ordered and that have not joined.
        infeasible: what it says of placement groups for which it has no type of node.
    """

    starting: int = 0
    infeasible: tuple[str, ...] = ()


def autoscaler() -> Autoscaler | None:
    """Return what the autoscaler of the cluster says; None if the cluster has none that starts nodes."""
    return _second_version() or _first_version()


def _second_version() -> Autoscaler | None:
    """Ask the GCS for the state of an autoscaler of version 2, as KubeRay has it."""
    import ray
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    client = getattr(ray._private.worker.global_worker, "gcs_client", None)
    if client is None or not is_autoscaler_v2(fetch_from_server=True, gcs_client=client):
        return None
    reply = GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=10))
    state = reply.autoscaling_state
    ordered = sum(request.count for request in state.pending_instance_requests)
    return Autoscaler(
        ordered + len(state.pending_instances),
        tuple(request.details for request in state.infeasible_gang_resource_requests),
    )


def _first_version() -> Autoscaler | None:
    """Read the report of an autoscaler of version 1, as `ray up` starts it.

    A cluster whose nodes were started by hand has one too, that only watches: it names a type of node for
    each of them.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_initialized

    if not _internal_kv_initialized():
        return None
    report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}").get("autoscaler_report")
    if report is None or all(name.startswith("node_") for name in report["active_nodes"]):
        return None
    return Autoscaler(sum(report["pending_launches"].values()) + len(report["pending_nodes"]))


def await_room(groups: Sequence[Group], who: str, why: str) -> None:
    """Wait until the cluster has room for groups of actors, and say so once a minute.

    Raises:
        ConfigError: if its autoscaler has no type of node for them, or starts none.
    """
    import ray

    logger.warning("%s: waiting for the cluster's autoscaler", why)
    options = [group.options for group in groups for _ in range(group.actors)]
    wanted = ray.util.placement_group(
        [one.bundle for one in options if one.bundle],
        strategy="PACK",
        name="fedray-room",
        bundle_label_selector=[dict(one.labels) for one in options if one.bundle],
    )
    try:
        for waited, now in _waits(wanted):
            if any(wanted.id.hex() in said for said in now.infeasible):
                raise ConfigError(
                    f"clients.resources: {why}, and its autoscaler can start no node for it; {LOWER}"
                )
            if waited.idle_s > IDLE_S:
                raise ConfigError(
                    f"clients.resources: {why}, and its autoscaler started no node for it within "
                    f"{IDLE_S:.0f} s: it has no such type of node, or as many nodes as it may; {LOWER}"
                )
            if waited.is_due:
                logger.warning(
                    "%s has waited %.0f s for room; %d nodes are starting", who, waited.seconds, now.starting
                )
    finally:
        ray.util.remove_placement_group(wanted)


@dataclass
class _Waited:
    """Seconds of a wait, those since a node was last on its way, and whether a message is due."""

    seconds: float = 0.0
    idle_s: float = 0.0
    is_due: bool = False


def _waits(group: Any) -> Iterator[tuple[_Waited, Autoscaler]]:
    """Yield every few seconds until a placement group is placed."""
    started = busy = said = time.monotonic()
    nodes = len(cluster_nodes())
    while not group.wait(2):
        now, state, count = time.monotonic(), autoscaler() or Autoscaler(), len(cluster_nodes())
        if state.starting or count != nodes:
            busy, nodes = now, count
        is_due = now - said > SAY_S
        said = now if is_due else said
        yield _Waited(now - started, now - busy, is_due), state
