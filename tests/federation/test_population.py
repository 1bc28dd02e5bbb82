"""Who is asked: drawn fairly among those who are there, at a cost that does not grow with the population."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedray.data.partition import Drawn
from fedray.errors import RunError
from fedray.federation.population import (
    LOOK_AGAIN_S,
    LOOKS,
    Population,
    sample,
    wait_for_all,
    wait_for_any,
)
from fedray.randomness import generator
from fedray.types import ClientInfo
from tests import small

properties = settings(deadline=None, max_examples=50)


def population(size: int, availability: Sequence[float] = (1.0,)) -> Population:
    """Return clients with 20 examples each; client k is available as often as the k-th number says."""
    devices = [replace(small.DEVICE, name=f"d{i}", availability=a) for i, a in enumerate(availability)]
    return Population(Drawn(np.arange(100), 20, size, seed=0), small.fleet(size, devices))


def rng(seed: int = 0) -> np.random.Generator:
    return generator(seed, "sample", 1)


# ── who there is ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_client_is_its_id_its_examples_and_its_device():
    devices = small.DEVICE, replace(small.DEVICE, name="other")
    everybody = Population(small.dealt(3, 1, 4), small.fleet(3, devices))
    assert list(everybody) == [
        ClientInfo(0, 3, devices[0]),
        ClientInfo(1, 1, devices[1]),
        ClientInfo(2, 4, devices[0]),
    ]
    assert everybody[1:] == list(everybody)[1:]
    assert len(everybody) == 3
    for stranger in (-1, 3):
        with pytest.raises(IndexError):
            everybody[stranger]


# ── sampling ─────────────────────────────────────────────────────────────────────────────────────────────


@properties
@given(
    size=st.integers(1, 40),
    count=st.integers(0, 50),
    availability=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_a_sample_is_distinct_sorted_and_reproducible(
    size: int, count: int, availability: list[float], seed: int
):
    everybody = population(size, availability)
    drawn = sample(everybody, count, rng(seed))
    assert list(drawn) == sorted(set(drawn))
    assert all(0 <= client < size for client in drawn)
    assert len(drawn) <= min(count, size)
    assert drawn == sample(everybody, count, rng(seed))


@properties
@given(size=st.integers(1, 40), count=st.integers(0, 50), seed=st.integers(0, 2**32))
def test_as_many_as_asked_for_if_all_are_available(size: int, count: int, seed: int):
    assert len(sample(population(size), count, rng(seed))) == min(count, size)


def test_different_rounds_draw_different_clients():
    drawn = {sample(population(1000), 5, generator(0, "sample", round)) for round in range(20)}
    assert len(drawn) == 20


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_set_of_clients_is_equally_likely(count: int):
    everybody, draws = population(5), 3000
    random = rng()
    seen = Counter(sample(everybody, count, random) for _ in range(draws))
    sets = list(combinations(range(5), count))
    expected = draws / len(sets)
    chi_square = sum((seen[one] - expected) ** 2 / expected for one in sets)
    assert set(seen) == set(sets)
    assert chi_square < 27.9, "the 0.999 quantile for 9 degrees of freedom; 4 have less"


def test_a_device_is_drawn_as_often_as_it_is_available():
    everybody, draws = population(40, [1.0, 0.25]), 2000
    random = rng()
    drawn = [sample(everybody, 1, random)[0] for _ in range(draws)]
    rare = sum(client % 2 for client in drawn) / draws
    # of the draws that succeed, 0.25 / (1 + 0.25) have the second device; ± 4 standard deviations
    assert rare == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / draws) ** 0.5)


def test_of_few_who_are_available_all_are_taken_and_nobody_is_asked_twice():
    everybody, draws = population(30, [0.1]), 500
    random = rng()
    sizes = [len(sample(everybody, 30, random)) for _ in range(draws)]
    # each of the 30 is there with probability 0.1, whatever half it is in; ± 4 standard deviations
    assert np.mean(sizes) == pytest.approx(3.0, abs=4 * (30 * 0.1 * 0.9 / draws) ** 0.5)
    assert min(sizes) == 0


class Ledger:
    """Availability that counts who is looked up."""

    def __init__(self, availability: NDArray[np.float32]) -> None:
        self.availability, self.asked = availability, list[int]()

    def __getitem__(self, client: int) -> float:
        self.asked.append(client)
        return float(self.availability[client])


def counting(size: int, availability: float) -> tuple[Population, list[int]]:
    """Return a population, and the list of those whose availability was looked up."""
    fleet, ledger = small.fleet(size), Ledger(np.full(size, availability, dtype=np.float32))
    vars(fleet)["availability"] = ledger  # where the cached property keeps what it computed
    return Population(Drawn(np.arange(100), 20, size, seed=0), fleet), ledger.asked


@pytest.mark.parametrize("size", [100, 10_000, 1_000_000])
def test_the_cost_of_a_sample_does_not_depend_on_the_population(size: int):
    everybody, asked = counting(size, 1.0)
    sample(everybody, 10, rng())
    assert len(asked) == 10
    everybody, asked = counting(size, 0.5)
    sample(everybody, 10, rng())
    assert 10 < len(asked) < 50


@pytest.mark.parametrize("availability", [0.0, 0.2, 1.0])
def test_nobody_is_looked_up_twice(availability: float):
    everybody, asked = counting(50, availability)
    sample(everybody, 40, rng())
    assert len(asked) == len(set(asked))
    assert len(asked) == (50 if availability < 1 else 40)


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 2, 5])
def test_whoever_looks_finds_a_client_and_pays_for_each_look_in_vain(size: int):
    everybody, random, again = population(size, [0.2]), rng(), rng()
    for _ in range(50):
        found, waited_s = wait_for_any(everybody, 3, random)
        looks = 0
        while not (expected := sample(everybody, 3, again)):
            looks += 1
        assert (found, waited_s) == (expected, looks * LOOK_AGAIN_S)


def test_who_asks_for_nobody_does_not_wait():
    assert wait_for_any(population(3, [0.0]), 0, rng()) == ((), 0.0)


@pytest.mark.parametrize("availability", [0.0, 1e-9])
def test_the_server_gives_up_in_the_end(availability: float):
    everybody = population(10, [availability])
    with pytest.raises(RunError, match=rf"no client is available: all 10 were away in {LOOKS} looks"):
        wait_for_any(everybody, 3, rng())
    assert wait_for_all(everybody, [1, 2], rng) == ((), (LOOKS - 1) * LOOK_AGAIN_S)


def test_clients_that_are_there_are_not_waited_for():
    assert wait_for_all(population(4), [3, 1], rng) == ((3, 1), 0.0)
    assert wait_for_all(population(4, [0.0]), [], rng) == ((), 0.0)


def test_the_last_of_the_clients_is_waited_for():
    everybody = population(2000, [0.25])
    waits = [wait_for_all(everybody, [client], rng)[1] for client in range(2000)]
    # geometric: 1/p looks on average, the first of which costs nothing; ± 4 standard deviations
    assert np.mean(waits) == pytest.approx(3 * LOOK_AGAIN_S, abs=4 * LOOK_AGAIN_S * (12 / 2000) ** 0.5)
    came, waited_s = wait_for_all(everybody, range(20), rng)
    assert came == tuple(range(20)) and waited_s == max(waits[:20])
