"""The accounts of a round: the costs of its training, of other exchanges, and of the server's own work."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import isfinite, isinf

import numpy as np

from fedray.costs.clock import at_home, seconds
from fedray.costs.devices import YARDSTICKS
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.faults import notes_of
from fedray.federation.population import Population
from fedray.types import METRICS, ClientRecord, Cost, DeviceProfile, Fault

_SUMMED = ("bytes/", "flops/", "time/", "energy/", "clients/dropped", "clients/failed")
TOTALS = tuple(name for name in METRICS if name.startswith(_SUMMED))
"""Metrics that are summed over a run."""


@dataclass
class Accounts:
    """One round's costs outside its client records.

    Args:
        asked: cost of exchanges with clients outside the round's training.
        asked_s: their seconds on each of YARDSTICKS.
        validated: the server's forward passes over validation data that the method asked for.
        server: the client through which the server trained, if it did.
        present: clients found available in this round; the server does not wait for them again.
        waited_s: simulated seconds in which the server waited for clients to be available.
        absent: clients that were asked and never became available.
        faults: clients that failed, in any exchange.
        in_turn: those of them that were asked in turn.
    """

    asked: Cost = field(default_factory=Cost)
    asked_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(YARDSTICKS, 0.0))
    validated: Cost = field(default_factory=Cost)
    server: Client | None = None
    present: set[int] = field(default_factory=set)
    waited_s: float = 0.0
    absent: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    in_turn: list[Fault] = field(default_factory=list)

    def found(self, clients: Iterable[int], waited_s: float) -> None:
        """Note available clients, and the simulated seconds that the server waited for them."""
        self.present.update(clients)
        self.waited_s += waited_s

    def exchanged(self, answer: CohortUpdate) -> None:
        """Add the cost of an exchange outside the round's training."""
        self.asked += answer.cost
        for kind, device in YARDSTICKS.items():
            self.asked_s[kind] += slowest_s(answer.records, device)

    @property
    def server_cost(self) -> Cost:
        """Costs of the server's own training and of its passes over validation data; no bytes travel."""
        if self.server is None:
            return self.validated
        meter, profile = self.server.meter, self.server.info.profile
        cost = Cost(flops=meter.flops, executed_flops=meter.executed_flops, steps=meter.steps)
        return self.validated + at_home(cost, profile)

    @property
    def server_wall_s(self) -> float:
        """Measured seconds of the server's own training."""
        return self.server.meter.wall_s if self.server is not None else 0.0

    def metrics(self, cohort: CohortUpdate | None, deadline_s: float | None) -> dict[str, float]:
        """Return the round's metrics of cost and of its clients; `cohort` is None for the set-up."""
        records = cohort.records if cohort is not None else ()
        clients = sum((r.cost for r in records), Cost()) + self.asked
        server = self.server_cost
        metrics = {
            "bytes/up": float(clients.bytes_up),
            "bytes/down": float(clients.bytes_down),
            "flops/clients": clients.flops,
            "flops/executed": clients.executed_flops,
            "flops/server": server.flops,
            "time/simulated_s": (
                waited_s(records, deadline_s) + self.asked.seconds + server.seconds + self.waited_s
            ),
            **{
                f"time/{kind}_s": slowest_s(records, device) + self.asked_s[kind] + server.seconds
                for kind, device in YARDSTICKS.items()
            },
            "time/server_s": server.seconds,
            "energy/clients_j": clients.energy_j,
            "energy/server_j": server.energy_j,
            "clients/selected": float(len(records)),
            "clients/dropped": float(sum(r.fate != "folded" for r in records)),
            "clients/failed": float(len(self.faults)),
            "clients/memory_bytes": float(max((r.memory_bytes for r in records), default=0)),
        }
        if cohort is not None and cohort.folded:
            metrics["density/client_mean"] = float(np.mean([r.density for r in cohort.folded]))
            losses = [(r.loss, r.num_examples) for r in cohort.folded if isfinite(r.loss) and r.num_examples]
            if losses:  # a client may sit out, do something else than train, or diverge
                metrics["train/loss"] = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
        return metrics | {f"train/{name}": v for name, v in (cohort.metrics if cohort else {}).items()}


def slowest_s(records: Iterable[ClientRecord], device: DeviceProfile) -> float:
    """Return the seconds of the slowest client that answers, if all had one device; without a deadline."""
    return max((seconds(r.cost, device) for r in records if r.fate != "dropped"), default=0.0)


def waited_s(records: tuple[ClientRecord, ...], deadline_s: float | None) -> float:
    """Return how long the server waits: for the slowest client, or to the deadline if one is missing."""
    if deadline_s is not None and any(r.fate in ("late", "dropped") for r in records):
        return deadline_s
    return max((r.cost.seconds for r in records if r.fate != "dropped"), default=0.0)


def notes(accounts: Accounts, cohort: CohortUpdate | None) -> tuple[str, ...]:
    """Return notes on waits, absent clients, and updates or metrics left out, with causes."""
    found = []
    if accounts.waited_s:
        found.append(f"the server waited {accounts.waited_s:,.0f} simulated s for clients to be available")
    if accounts.absent:
        found.append(f"{len(accounts.absent)} client(s) were asked and never came: {accounts.absent[:10]}")
    found += notes_of(accounts.faults)
    return (*found, *_unmeasured(cohort)) if cohort is not None else tuple(found)


def without_power(population: Population) -> Iterator[str]:
    """Yield a note on devices whose power is unknown."""
    names = [device.name for device in population.fleet.profiles if not device.compute_w]
    if names:
        yield f"no power is known of {', '.join(names)}; its joules count as 0: set compute_w and idle_w"


def _unmeasured(cohort: CohortUpdate) -> Iterator[str]:
    """Yield notes on clients whose metric is not in a mean."""
    diverged = tuple(r.client for r in cohort.folded if isinf(r.loss))
    for name, without in {"loss": diverged, **cohort.unmeasured}.items():
        if without:
            yield (
                f"train/{name} is the mean without {len(without)} client(s) that sent NaN, infinity or "
                f"beyond 1e280: clients {sorted(without)[:10]}"
            )
