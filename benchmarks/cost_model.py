"""What a round takes, from costs per client, chunk, actor, node and weight; the costs are fitted from runs.

round = driver + training + fold + network
driver   = round_s + client_s·cohort + actor_s·actors
training = trained_s·cohort / busy actors          busy = min(actors, chunks), or the cores if these are fewer
fold     = weight_s·weights·(chunks of the busiest actor + merges one after the other)
network  = bytes through the busiest link / bandwidth        (only between nodes)
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

import numpy as np

FAN_IN = 8
"""As in `fedray.federation.pool`."""
BANDWIDTH = 1.25e9
"""Bytes per second of one link: 10 Gbit/s. Assumed; nothing here was measured between machines."""


@dataclass(frozen=True)
class Run:
    """One measured configuration.

    Args:
        cohort: clients in a round. chunks: of the cohort. actors: 0 is in process. nodes: raylets.
        weights: of the model. registered: clients.
        seconds: median of its rounds, wall clock.
        driver_s: CPU seconds of the driver's thread in a round; in process it trains too.
        memory: name of a process → sizes in bytes.
    """

    cohort: int
    chunks: int
    actors: int
    nodes: int
    weights: int
    registered: int
    seconds: float
    driver_s: float
    memory: dict[str, list[int]]

    @property
    def bytes(self) -> int:
        """The proportional set size of the whole tree."""
        return sum(map(sum, self.memory.values()))


@dataclass(frozen=True)
class Costs:
    """Seconds of a CPU core, for one model and its clients.

    Args:
        trained_s: an actor, for each client.
        weight_s: one pass of the fold (add, or merge), for each weight.
        round_s: the driver, for each round.
        client_s: the driver, for each client.
        actor_s: the driver, for each actor that it calls.
        node_s: wall seconds for each node after the first; with one actor on each.
    """

    trained_s: float
    weight_s: float
    round_s: float
    client_s: float
    actor_s: float
    node_s: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A round to predict.

    Args:
        cores: cores that actors share; None is one for each.
        tree: whether actors merge for the driver where there are more than FAN_IN.
    """

    cohort: int
    chunks: int
    actors: int
    nodes: int
    weights: int
    cores: float | None = None
    tree: bool = True


def predict(costs: Costs, plan: Plan) -> dict[str, float]:
    """Return the seconds of a round by part, and their sum as `round`."""
    busy = max(1, min(plan.actors, plan.chunks))
    parallel = min(busy, inf if plan.cores is None else plan.cores)
    merging = plan.tree and busy > FAN_IN
    levels = 0
    parts = busy
    while merging and parts > FAN_IN:
        parts, levels = ceil(parts / FAN_IN), levels + 1
    driver = costs.round_s + costs.client_s * plan.cohort + costs.actor_s * plan.actors
    training = costs.trained_s * plan.cohort / parallel
    # each chunk is a vector of zeros, filled and merged; then an actor merges FAN_IN parts on each level
    fold = costs.weight_s * plan.weights * (2 * plan.chunks / parallel + FAN_IN * levels + parts)
    vectors = plan.nodes - 1 + FAN_IN * levels + parts if plan.nodes > 1 else 0
    network = 4 * plan.weights * vectors / BANDWIDTH + costs.node_s * (plan.nodes - 1)
    found = {"driver": driver, "training": training, "fold": fold, "network": network}
    return found | {"round": sum(found.values())}


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return slope and intercept of a line by least squares of relative errors; neither below 0."""
    x, y = np.array(points, dtype=float).T
    rise, start = np.polyfit(x, y, 1, w=1 / np.maximum(y, 1e-9))
    return max(0.0, float(rise)), max(0.0, float(start))


def pass_s(weights: int, times: int = 5) -> float:
    """Return the seconds for each weight of one pass of the fold: vectors of this many are added."""
    a, b = np.ones(weights, dtype=np.float32), np.ones(weights, dtype=np.float32)
    taken = []
    for _ in range(times):
        start = time.thread_time()
        a = a + b
        taken.append(time.thread_time() - start)
    return statistics.median(taken) / weights


def fit(runs: Sequence[Run], model_weights: int, weight_s: float) -> Costs:
    """Fit the costs of the model of this size.

    Args:
        runs: in process with several cohorts; on Ray with several cohorts and with several numbers of actors.
        model_weights: weights of the model.
        weight_s: as `pass_s` measures it.
    """
    own = [run for run in runs if run.weights == model_weights and run.nodes == 1 and run.chunks <= 16]
    local, on_ray = [run for run in own if not run.actors], [run for run in own if run.actors]
    actors, cohort = _usual([run.actors for run in on_ray]), _usual([run.cohort for run in on_ray])
    by_client, _ = slope([(run.cohort, run.driver_s) for run in local])
    client_s, rest = slope([(run.cohort, run.driver_s) for run in on_ray if run.actors == actors])
    actor_s, _ = slope([(run.actors, run.driver_s) for run in on_ray if run.cohort == cohort])
    return Costs(
        trained_s=max(0.0, by_client - client_s),
        weight_s=weight_s,
        round_s=max(0.0, rest - actors * actor_s),
        client_s=client_s,
        actor_s=actor_s,
    )


def _usual(values: Sequence[int]) -> int:
    """Return the value that comes most often."""
    return max(sorted(set(values)), key=values.count)
