"""The registered clients, and drawing available ones. No cost per registered client in a round."""

from collections.abc import Callable, Iterable, Sequence
from typing import overload

import numpy as np

from fedray.costs.devices import Fleet
from fedray.data.partition import Partition
from fedray.errors import RunError
from fedray.types import ClientInfo

LOOKS = 100
"""Number of times that the server looks for clients before it gives up."""
LOOK_AGAIN_S = 60.0
"""Simulated seconds between two looks; availability is drawn anew for each."""


class Population(Sequence[ClientInfo]):
    """All registered clients; an entry is created when it is looked up."""

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


def wait_for_any(
    population: Population, count: int, rng: np.random.Generator
) -> tuple[tuple[int, ...], float]:
    """Draw as `sample` does, and look again as long as no client is available.

    Returns:
        Up to `count` clients, at least one if any is asked for; and the simulated seconds waited for them.

    Raises:
        RunError: if no client was available in LOOKS looks.
    """
    for look in range(LOOKS):
        clients = sample(population, count, rng)
        if clients or count <= 0:
            return clients, look * LOOK_AGAIN_S
    raise RunError(_nobody(f"all {len(population):,}"))


def wait_for_all(
    population: Population, clients: Iterable[int], rng_of: Callable[[int], np.random.Generator]
) -> tuple[tuple[int, ...], float]:
    """Wait for given clients, each of which is asked when it is available.

    Args:
        population: all registered clients.
        clients: ids of the clients to wait for.
        rng_of: client → generator of the look in which it is available.

    Returns:
        The clients that came within LOOKS looks, in the order given; and the simulated seconds until the last
        look.
    """
    availability, came, last = population.fleet.availability, list[int](), 1
    for client in clients:
        chance = float(availability[client])
        look = 1 if chance >= 1 else int(rng_of(client).geometric(chance)) if chance > 0 else LOOKS + 1
        last = max(last, min(look, LOOKS))
        if look <= LOOKS:
            came.append(client)
    return tuple(came), (last - 1) * LOOK_AGAIN_S


def none_came(asked: int) -> RunError:
    """Return the error for an exchange none of whose clients ever became available."""
    return RunError(_nobody(f"the {asked:,} asked"))


def _nobody(who: str) -> str:
    return (
        f"no client is available: {who} were away in {LOOKS} looks, one every {LOOK_AGAIN_S:g} simulated s; "
        "take devices with a higher availability into clients.devices, or more clients"
    )
