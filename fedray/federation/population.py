"""Who there is, and who is asked. Nothing here costs anything per registered client in a round."""

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

from fedray.costs.devices import Fleet
from fedray.data.partition import Partition
from fedray.errors import RunError
from fedray.types import ClientInfo

ATTEMPTS = 100
"""How often the server looks again when nobody is there, before it gives up."""


class Population(Sequence[ClientInfo]):
    """All registered clients; an entry is made when it is looked up."""

    def __init__(self, partition: Partition, fleet: Fleet) -> None:
        self.partition, self.fleet = partition, fleet

    def __len__(self) -> int:
        return self.partition.population

    @overload
    def __getitem__(self, client: int) -> ClientInfo: ...
    @overload
    def __getitem__(self, client: slice) -> list[ClientInfo]: ...
    def __getitem__(self, client: int | slice) -> ClientInfo | list[ClientInfo]:
        if isinstance(client, slice):
            return [self[k] for k in range(*client.indices(len(self)))]
        if not 0 <= client < len(self):
            raise IndexError(client)
        return ClientInfo(client, int(self.partition.sizes[client]), self.fleet.profile(client))


def sample(population: Population, count: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Draw up to `count` different available clients, uniformly; their ids, sorted.

    Each drawn client is available with its device's probability. Costs O(count / availability), not
    O(population), until half of the population has been looked at.
    """
    size, availability = len(population), population.fleet.availability
    chosen: list[int] = []
    tried: set[int] = set()
    while len(chosen) < count and len(tried) <= size // 2:
        client = int(rng.integers(size))
        if client not in tried:
            tried.add(client)
            if rng.random() < availability[client]:
                chosen.append(client)
    if len(chosen) < count:
        rest = rng.permutation([k for k in range(size) if k not in tried])
        for client in rest.tolist():
            if len(chosen) == count:
                break
            if rng.random() < availability[client]:
                chosen.append(client)
    return tuple(sorted(chosen))


def draw_cohort(
    population: Population,
    cohort: int,
    over_selection: float,
    predicted_seconds: Callable[[int], float],
    rng: np.random.Generator,
) -> tuple[int, ...]:
    """Draw `cohort` clients; with over-selection draw more, and keep those that are predicted to be fastest.

    Args:
        population: who there is.
        cohort: how many are wanted.
        over_selection: 0.3 draws 30 % more.
        predicted_seconds: client → seconds its part will take; asked only with over-selection.
        rng: the round's generator.

    Raises:
        RunError: if nobody is available.
    """
    extra = min(len(population), round(cohort * (1 + over_selection)))
    attempts = (sample(population, extra, rng) for _ in range(ATTEMPTS))
    drawn = next((clients for clients in attempts if clients), ())
    if not drawn:
        raise RunError(
            f"no client is available: all were away in {ATTEMPTS} attempts; "
            "take devices with a higher availability into clients.devices, or more clients"
        )
    if len(drawn) > cohort:
        drawn = tuple(sorted(sorted(drawn, key=lambda k: (predicted_seconds(k), k))[:cohort]))
    return drawn
