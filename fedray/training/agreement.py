"""A trial before a run: how can clients of a model be trained together?"""

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedray.randomness import Watch, borrowed
from fedray.training.dropout import generator_on
from fedray.training.engine import Engine
from fedray.training.optimizers import SGD, Optimizer
from fedray.training.plan import Request
from fedray.training.stacked import Stack, stream_of
from fedray.types import Mask, Params

logger = logging.getLogger(__name__)

BATCHES, RATE = (4, 4, 3), 0.1
TOLERANCE = 1e-3
"""Of the distance between a stacked step and the client's own, relative to the step's length."""


Way = Literal["padded", "equal", "alone"]
"""How clients of a model train: together, with short batches filled up; together, but apart where batches
differ in size; or one after the other.
"""


def way_of(engine: Engine) -> Way:
    """Find out how clients of a model can be trained together; if they cannot, the log says why.

    A step of a few clients is made together and one by one, on random examples, and must be the same. With
    short batches filled up it is not if the model mixes examples, as BatchNorm does, or draws numbers for
    each. Models that draw elsewhere than in torch's layers of dropout cannot be stacked.
    """
    reason = ""
    ways: tuple[Way, ...] = ("padded", "equal")
    for way in ways:
        try:
            with borrowed(0):
                reason = _difference(engine, pads=way == "padded")
        except Exception as error:  # of any kind: what `vmap` cannot map fails in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not reason:
            return way
    logger.warning(
        "clients.stack: %s cannot be stacked (%s); its clients train one after the other",
        engine.model.name,
        reason,
    )
    return "alone"


def _difference(engine: Engine, *, pads: bool) -> str:
    """Return what a stack does otherwise than its clients alone; empty if nothing."""
    if engine.precision != "fp32":
        return f"vmap does not compute in {engine.precision}"
    spec, rng = engine.model, torch.Generator().manual_seed(0)
    shape, tokens = (sum(BATCHES), *spec.input_shape), spec.architecture.tokens
    given = torch.randint(tokens, shape, generator=rng) if tokens else torch.randn(shape, generator=rng)
    labels = torch.arange(len(given)) % spec.num_classes
    start, mask = spec.init(0), Mask.full(spec.layout)
    watch = Watch()
    watch.start()
    requests, alone, ends, generator = [], [], [], generator_on(engine.device)
    for seed, rows in enumerate(torch.split(torch.arange(len(given)), list(BATCHES))):
        generator.manual_seed(seed)
        requests.append(Request(start, mask, (rows,), (RATE,), stream_of(engine)))
        alone.append(_alone(engine, start, given[rows], labels[rows]))
        ends.append(stream_of(engine))
    x, y, before = given.to(engine.device), labels.to(engine.device), generator.get_state()
    answers = Stack(engine, pads=pads).train(requests, x, y, _Plain(), spec.layout.size)
    if watch.drawn() or not torch.equal(before, generator.get_state()):
        return "it draws random numbers"
    for end, answer in zip(ends, answers, strict=True):
        if end is not None and answer.stream is not None and not torch.equal(end, answer.stream):
            return "its clients would draw other numbers"
    flat, together = torch.stack(alone), torch.stack([answer.flat for answer in answers])
    distance, moved = (together - flat).norm(), (flat - start.flat).norm()
    return "" if bool(distance <= TOLERANCE * moved) else "its results would be others"


def _alone(engine: Engine, start: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the weights (size,) after one step of a single client."""
    engine.load(start, Mask.full(start.layout))
    engine.module.train()
    _, grads = engine.gradient(engine.batch(x), y.to(engine.device), mask=Mask.full(start.layout))
    SGD(list(engine.leaves.values()), 0.0, 0.0).step(grads, RATE)
    return engine.flat.to("cpu", copy=True)


@dataclass(frozen=True)
class _Plain:
    """The options of the trial's step."""

    local_epochs: int = 1
    steps: int | None = None
    lr: float = RATE
    lr_decay: float = 1.0
    batch_size: int = max(BATCHES)
    optimizer: Optimizer = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
