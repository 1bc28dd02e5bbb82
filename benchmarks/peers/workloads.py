"""The workloads of `benchmarks.workload`, and a short training on digits that shows who learns."""

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.peers.task import Task
from benchmarks.workload import config
from fedray.config.run_config import RunConfig
from fedray.experiment.run import Federation
from fedray.models import MODELS

TOLERANCE = 0.05
"""How far below the plain loop's the accuracy of a framework may be after the same number of rounds."""


@dataclass(frozen=True)
class Workload:
    """How long a model is trained.

    Args:
        rounds: measured rounds.
        warm_up: rounds before them.
        check_population: clients that share the 1,437 training digits, for the accuracy.
        check_cohort: how many of them train in a round.
        check_rounds: rounds after which the accuracy is taken.
    """

    rounds: int
    warm_up: int
    check_population: int
    check_cohort: int
    check_rounds: int


WORKLOADS = {
    "mlp": Workload(15, 4, 12, 8, 30),
    "cnn": Workload(5, 2, 6, 4, 25),
    "resnet18": Workload(3, 1, 6, 4, 4),
}


def run_config(model: str, checking: bool) -> RunConfig:
    """Return the run of a model: random images to be timed, or digits to be learnt."""
    run = config(model)
    if not checking:
        return run
    workload = WORKLOADS[model]
    return run.override(
        {
            "data.name": "digits",
            "clients.population": workload.check_population,
            "clients.cohort": workload.check_cohort,
            "method.batch_size": 20,
        }
    )


def task_of(model: str, checking: bool) -> Task:
    """Return the federation of a run for the other frameworks: same data, same clients, same weights."""
    run = run_config(model, checking)
    federation = Federation.of(run)
    place, dataset = federation.place, federation.dataset
    partition = place.population.partition
    module = MODELS[model].build(dataset.input_shape, dataset.num_classes)
    module.load_state_dict(place.model.bind(place.model.init(0).flat).state_dict())
    return Task(
        x=dataset.normalise(dataset.train.x),
        y=torch.from_numpy(dataset.train.y),
        clients=[
            torch.from_numpy(np.asarray(partition.rows(client), dtype=np.int64))
            for client in range(partition.population)
        ],
        test_x=dataset.normalise(dataset.test.x),
        test_y=torch.from_numpy(dataset.test.y),
        cohort=run.clients.cohort,
        batch=place.method.batch_size,
        lr=place.method.lr,
        model=module,
        name=model,
        checking=checking,
    )


def examples_of(task: Task) -> range:
    """Return how many examples the cohort of a round may have."""
    sizes = [len(rows) for rows in task.clients]
    return range(task.cohort * min(sizes), task.cohort * max(sizes) + 1)
