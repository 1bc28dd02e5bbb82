"""Cost of one candidate of a rate search on the server: the measured seconds of a masked fine-tune.

The images are random: only their shape, the model and the number of steps matter.
"""

import time
from dataclasses import dataclass

import numpy as np

from fedray.costs.devices import draw
from fedray.costs.flops import FlopModel
from fedray.data import DATASETS, Dataset, Examples
from fedray.data.partition import Dealt
from fedray.federation.client import Client
from fedray.federation.pool import one_thread
from fedray.federation.population import Population
from fedray.federation.worker import Rules, Worker, Workplace
from fedray.methods.frlp import FRLP
from fedray.models import build_model
from fedray.pruning.masks import top_k
from fedray.pruning.scores import magnitude


@dataclass(frozen=True)
class FineTune:
    """One candidate's training on the server.

    Args:
        model: of the table.
        data: data set that gives the images' shape and number of classes.
        examples: of the server; one epoch over them is one candidate.
        density: of the candidate.
    """

    model: str
    data: str
    examples: int
    density: float = 0.75

    def steps(self) -> int:
        """Return the steps of an epoch, at FRLP's default batch size."""
        return -(-self.examples // FRLP().batch_size)

    def measure(self, steps: int, seed: int = 0) -> tuple[float, float]:
        """Return (wall, CPU) seconds of a step: means over `steps`, on one thread.

        On an idle machine the two are equal. The first step is not counted: it also sets up caches.
        """
        client = _server(self, seed)
        params = client.model.init(seed)
        mask = top_k(magnitude(params), self.density, client.model.layout)
        with one_thread():
            client.sgd(params, mask, steps=1)
            wall, cpu = time.perf_counter(), time.process_time()
            client.sgd(params, mask, steps=steps)
        return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def _server(tune: FineTune, seed: int) -> Client:
    spec, rng = DATASETS[tune.data], np.random.default_rng(seed)
    shape = (tune.examples, *spec.input_shape)
    x = np.asarray(rng.integers(spec.tokens, size=shape) if spec.tokens else rng.standard_normal(shape))
    y = rng.integers(spec.num_classes, size=tune.examples)
    examples, none = Examples(x, y), Examples(x[:0], y[:0])
    dataset = Dataset("random", examples, none, spec.num_classes, spec.input_shape, tokens=spec.tokens)
    model = build_model(tune.model, spec.input_shape, spec.num_classes)
    rows = np.arange(tune.examples)
    population = Population(Dealt(rows, np.zeros_like(rows), 1), draw(1, {"laptop": 1.0}, seed))
    place = Workplace(
        model=model,
        flops=FlopModel.trace(
            model.bind(model.init(seed).flat), spec.input_shape, model.layout, tokens=spec.tokens
        ),
        dataset=dataset,
        population=population,
        method=FRLP(),
        rules=Rules(),
        seed=seed,
    )
    return Worker(place).client(population[0], rows, 1, {})
