"""What must hold for a hundred million clients and thousands of actors; and the model of a round."""

import gc
import pickle
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.cost_model import FAN_IN, Costs, Plan, Run, fit, predict
from fedray.costs.devices import draw
from fedray.data.partition import Drawn
from fedray.federation import pool
from fedray.federation.population import Population, sample
from fedray.randomness import generator

MILLION = 1_000_000


def registered(clients: int) -> Population:
    return Population(
        Drawn(np.arange(1_000), 60, clients, seed=0), draw(clients, {"phone": 1, "server": 1}, seed=0)
    )


def test_a_registered_client_is_17_bytes_and_no_object():
    gc.collect()
    before = len(gc.get_objects())
    tracemalloc.start()
    clients = registered(MILLION)
    assert sample(clients, 10, generator(0, "sample", 1))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 18 * MILLION
    assert len(gc.get_objects()) - before < 1_000
    clients = registered(MILLION)
    assert len(pickle.dumps(clients)) < 14 * MILLION  # availability is made where it is asked


def test_a_cohort_is_drawn_without_walking_over_the_registered():
    looked: list[int] = []

    class Availability:
        def __getitem__(self, client: int) -> float:
            looked.append(client)
            return 1.0

    clients = registered(MILLION)
    clients.fleet.__dict__["availability"] = Availability()
    assert len(sample(clients, 50, generator(0, "sample", 1))) == 50
    assert len(looked) == 50


# ── the model of a round ─────────────────────────────────────────────────────────────────────────────────

COSTS = Costs(trained_s=1e-3, weight_s=1e-9, round_s=2e-3, client_s=3e-5, actor_s=1e-3)
PLAN = Plan(cohort=400, chunks=16, actors=2, nodes=1, weights=159_010)


def run(cohort: int, chunks: int, actors: int) -> Run:
    """Return a run as the costs say: in process one thread does all."""
    driver = COSTS.round_s + COSTS.client_s * cohort + COSTS.actor_s * actors
    alone = (COSTS.trained_s * cohort + 2 * COSTS.weight_s * PLAN.weights * chunks) * (actors == 0)
    return Run(cohort, chunks, actors, 1, PLAN.weights, 1_000, 1.0, driver + alone, {"driver": [1]})


def test_the_fit_finds_the_costs_that_made_the_runs():
    runs = [run(cohort, 16, actors) for cohort in (100, 400, 1_600) for actors in (0, 2)]
    runs += [run(400, chunks, 0) for chunks in (16, 100, 400)] + [
        run(400, 16, actors) for actors in (1, 2, 3)
    ]
    found = fit(runs, PLAN.weights, COSTS.weight_s)
    for name in ("trained_s", "client_s", "actor_s", "round_s"):
        assert getattr(found, name) == pytest.approx(getattr(COSTS, name), rel=0.02), name


def test_more_actors_than_chunks_train_nothing():
    many = replace(PLAN, cohort=10_000, actors=1_024)
    assert predict(COSTS, many)["training"] == predict(COSTS, replace(many, actors=16))["training"]
    finer = predict(COSTS, replace(many, chunks=1_250))
    assert finer["training"] < predict(COSTS, many)["training"] / 60


def test_a_tree_of_actors_spares_the_driver_the_fold():
    large = Plan(cohort=10_000, chunks=1_250, actors=1_024, nodes=64, weights=11_172_042)
    tree, driver = predict(COSTS, large), predict(COSTS, replace(large, tree=False))
    assert tree["fold"] < driver["fold"] / 20 and tree["network"] < driver["network"] / 5
    assert tree["round"] == pytest.approx(sum(value for name, value in tree.items() if name != "round"))
    assert FAN_IN == pool.FAN_IN
