"""Micro-federations: small random federated runs in which an agent learns to prune.

Each has random data, model, partition, clients, cohort, learning rate, local epochs, rounds and devices, so
that an agent does not depend on them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as checked

from fedray.config.run_config import RunConfig
from fedray.experiment.run import Federation
from fedray.federation.method import Method
from fedray.federation.pool import LocalPool
from fedray.federation.server import Server
from fedray.types import LocalPath

STAGES = 12
"""Stages of a run, in training and in `staged`."""

EXAMPLES_PER_CLIENT = (40, 120)
VALIDATION_EXAMPLES = 500
JURY_EXAMPLES = 3000
"""Examples for the reward of an episode: more than the validation examples, so that it is less noisy.

They are training examples that no client has, in the place of the server's examples."""

DEVICES = ("phone", "raspberry_pi_4", "laptop", "jetson_nano")
ALPHAS = (0.1, 0.5, 5.0)
TRAIN_EXAMPLES = {"digits": 1437, "mnist": 60_000, "fashion_mnist": 60_000}


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Federations:
    """A distribution of federations.

    Args:
        cases: pairs of a data set and a model, drawn with equal probability.
        root: folder of the downloaded data sets; None: the default cache.
        rounds: smallest and largest number of rounds.
        cohort: smallest and largest number of clients in a round.
        lr: range of the learning rate, drawn on a logarithmic scale.
    """

    cases: tuple[tuple[str, str], ...] = (("digits", "mlp"),)
    root: LocalPath | None = None
    rounds: tuple[Annotated[int, Field(ge=STAGES)], int] = (18, 45)
    cohort: tuple[Annotated[int, Field(ge=1)], int] = (4, 10)
    lr: tuple[Annotated[float, Field(gt=0)], float] = (0.05, 0.3)

    def draw(self, seed: int, method: dict[str, Any]) -> RunConfig:
        """Return the config of one federation.

        Args:
            seed: ≥ 0; equal seeds give equal federations for all methods.
            method: the section `method`; learning rate, batch and local epochs are drawn.
        """
        rng = np.random.default_rng(seed)
        data, model = self.cases[int(rng.integers(len(self.cases)))]
        per_client = int(rng.integers(*EXAMPLES_PER_CLIENT))
        left = TRAIN_EXAMPLES[data]
        share, jury = min(0.25, VALIDATION_EXAMPLES / left), min(0.2, JURY_EXAMPLES / left)
        cohort = int(rng.integers(self.cohort[0], self.cohort[1] + 1))
        population = max(cohort, min(1000, int(left * (1 - share - jury) / per_client)))
        kind = str(rng.choice(["iid", "dirichlet"], p=[0.25, 0.75]))
        partition: dict[str, Any] = {"kind": kind}
        if kind == "dirichlet":
            partition["alpha"] = float(rng.choice(ALPHAS))
        low, high = np.log(self.lr)
        return RunConfig.from_tree(
            {
                "seed": seed,
                "rounds": int(rng.integers(self.rounds[0], self.rounds[1] + 1)),
                "eval_every": 10_000,  # only the method uses validation data
                "model": model,
                "data": {
                    "name": data,
                    "validation_fraction": share,
                    "server_fraction": jury,
                    "partition": partition,
                    **({"root": str(self.root)} if self.root is not None and data != "digits" else {}),
                },
                "clients": {
                    "population": population,
                    "cohort": cohort,
                    "actors": 0,
                    "devices": _mix(rng),
                },
                "method": {
                    "lr": float(np.exp(rng.uniform(low, high))),
                    "local_epochs": int(rng.integers(1, 3)),
                    "batch_size": int(rng.choice([10, 20])),
                    **method,
                },
                "tracking": {"uri": "none"},
            },
            "a drawn federation",
        )


def _mix(rng: np.random.Generator) -> dict[str, float]:
    names: Sequence[str] = rng.choice(DEVICES, size=int(rng.integers(1, 4)), replace=False).tolist()
    return {str(name): round(float(rng.uniform(0.1, 1)), 2) for name in names}


def server_of(config: RunConfig, method: Method | None = None) -> Server:
    """Return a federation's server in this process, before its set-up.

    Args:
        config: of the run.
        method: replaces the config's method.
    """
    federation = Federation.of(config)
    place = federation.place if method is None else replace(federation.place, method=method)
    return Server(place, LocalPool(place), federation.schedule, federation.side)
