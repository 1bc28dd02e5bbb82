"""Several clients trained together: one copy of the model for each, and one call for a step of them all.

A step of a small model keeps a GPU busy for a few microseconds, and starting its kernels takes longer. The
weights of the clients are therefore stacked, (clients, *shape) for each tensor, running statistics included,
and `torch.func.vmap` maps the model over them. A client sees the same batches in the same order as alone;
its weights differ by rounding.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from fedray.randomness import Watch, borrowed
from fedray.training.dropout import Streams, dropouts, generator_on
from fedray.training.engine import SGD, Adam, Engine, Optimizer, Training
from fedray.types import Mask, Params

logger = logging.getLogger(__name__)

Stacked = dict[str, Tensor]
"""Name of a parameter or buffer → its copies (clients, *shape)."""
Rows = slice | Tensor
"""Some clients of a stack: a range, or their positions (int64)."""


@dataclass(frozen=True)
class Request:
    """One call of plain SGD: where it starts, and the batch and the learning rate of each step.

    Args:
        params: where to start.
        mask: which entries are trained and kept.
        batches: for each step, rows of the client's examples, (batch,) int64.
        rates: for each step, the learning rate.
        stream: where the global generator of the device stands, if layers draw from it; else None.
    """

    params: Params
    mask: Mask
    batches: tuple[Tensor, ...]
    rates: tuple[float, ...]
    stream: Tensor | None = None

    @property
    def examples(self) -> int:
        """Number of examples that it sees."""
        return sum(len(rows) for rows in self.batches)

    def same_as(self, other: "Request") -> bool:
        """Tell whether two calls train the same weights on the same batches."""
        a, b = self.params.flat, other.params.flat
        return (
            self.rates == other.rates
            and len(self.batches) == len(other.batches)
            and all(map(torch.equal, self.batches, other.batches))
            and self.mask.digest == other.mask.digest
            and (self.stream is None or (other.stream is not None and torch.equal(self.stream, other.stream)))
            and (a is b or torch.equal(a.view(torch.int32), b.view(torch.int32)))
        )


@dataclass(frozen=True)
class Answer:
    """The result of a request.

    Args:
        flat: the trained weights (size,) on the CPU, a row of a matrix that all clients of the stack share.
        loss: mean loss of the examples that were seen; NaN without steps.
        last_loss: mean loss of the last batch.
        wall_s: the client's share of the measured seconds.
        stream: where the generator stands after the training; None without one in the request.
    """

    flat: Tensor
    loss: float
    last_loss: float
    wall_s: float
    stream: Tensor | None


@dataclass(frozen=True)
class _Step:
    """The step of clients whose batches have one size.

    Args:
        index: number of the step.
        rate: learning rate.
        clients: positions in the stack.
        batches: rows of examples (clients, batch).
    """

    index: int
    rate: float
    clients: tuple[int, ...]
    batches: Tensor

    @property
    def rows(self) -> Rows:
        """Its clients as a range if they are one, so that their tensors are views and not copies."""
        first, last = self.clients[0], self.clients[-1]
        adjacent = last - first + 1 == len(self.clients)
        return slice(first, last + 1) if adjacent else torch.tensor(self.clients)


class Stack:
    """Trains requests of several clients together, on the device of an engine.

    Args:
        engine: has the module, and the layout that is trained.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        names = engine.layout.names
        self._counters = [name for name, _ in engine.module.named_buffers() if name not in names]
        self._dropouts = dropouts(engine.module)

    def train(
        self, requests: Sequence[Request], x: Tensor, y: Tensor, training: Training, size: int
    ) -> list[Answer]:
        """Train requests that have one mask.

        Args:
            requests: one for each client; their batches are rows of `x` and `y`.
            x: (n, …) examples on the engine's device.
            y: (n,) int64, their labels.
            training: the optimiser and its options.
            size: of the whole model's vector, of which the engine may train a part.
        """
        started = time.perf_counter()
        # neighbours have about as many batches, so that most steps are of a range of clients
        order = sorted(range(len(requests)), key=lambda k: -requests[k].examples)
        placed = [requests[k] for k in order]
        held = self._load(placed)
        states = [request.stream for request in placed]
        streams = Streams([state for state in states if state is not None], self.engine.device)
        total, last = self._run(placed, held, x, y, training, streams)
        flat = self._unload(held, size)
        wall_s = (time.perf_counter() - started) / len(requests)
        losses = [
            loss / request.examples if request.batches else float("nan")
            for loss, request in zip(total.tolist(), placed, strict=True)
        ]
        rows = zip(order, flat, losses, last.tolist(), streams.states or states, strict=True)
        answers = {k: Answer(weights, loss, end, wall_s, state) for k, weights, loss, end, state in rows}
        return [answers[k] for k in range(len(requests))]

    def _load(self, requests: Sequence[Request]) -> Stacked:
        """Return the stacked tensors of `params ⊙ mask`; weights that clients share are loaded once."""
        engine = self.engine
        held: Stacked = {}
        engine.module.train()
        clients: dict[int, list[int]] = {}
        for k, request in enumerate(requests):
            clients.setdefault(id(request.params), []).append(k)
        for positions in clients.values():
            engine.load(requests[positions[0]].params, requests[0].mask)
            tensors = engine.layout.views(engine.flat)
            tensors |= {name: engine.module.get_buffer(name) for name in self._counters}
            if len(clients) == 1:
                return {n: t.expand(len(requests), *t.shape).clone() for n, t in tensors.items()}
            for name, tensor in tensors.items():
                held.setdefault(name, tensor.new_empty(len(requests), *tensor.shape))[positions] = tensor
        return held

    def _unload(self, held: Stacked, size: int) -> Tensor:
        """Return the weights of the whole model (clients, size) on the CPU: one copy for all clients."""
        flat = torch.cat([held[name].flatten(1) for name in self.engine.layout.names], dim=1).cpu()
        part = self.engine.part
        if part is None:
            return flat
        return torch.zeros(len(flat), size).index_copy_(1, part.index, flat)

    def _run(
        self,
        requests: Sequence[Request],
        held: Stacked,
        x: Tensor,
        y: Tensor,
        training: Training,
        streams: Streams,
    ) -> tuple[Tensor, Tensor]:
        """Make all steps in place; return for each client the summed loss, and that of its last batch."""
        device = self.engine.device
        moments = [
            [torch.zeros_like(held[name]) for name in self.engine.leaves] for _ in range(_moments(training))
        ]
        factors = self._factors(requests[0].mask)
        total = torch.zeros(len(requests), device=device)
        last = torch.full_like(total, float("nan"))
        for step in _placed(list(_steps(requests)), device):
            rows = step.rows
            part = {name: tensor[rows] for name, tensor in held.items()}
            state = [[moment[rows] for moment in some] for some in moments]
            images = x.index_select(0, step.batches.flatten())
            optimizer = self._optimizer(part, state, step.index, training)
            with streams.drawing(self._dropouts, step.clients) if self._dropouts else nullcontext():
                losses, grads = self._gradients(
                    part, images.view(*step.batches.shape, *x.shape[1:]), y[step.batches]
                )
            optimizer.step(grads, step.rate)
            for name, factor in factors.items():
                part[name].mul_(factor)
            if isinstance(rows, Tensor):  # these were copies
                for name, tensor in part.items():
                    held[name][rows] = tensor
                for some, changed in zip(moments, state, strict=True):
                    for moment, value in zip(some, changed, strict=True):
                        moment[rows] = value
            total[rows] += losses * step.batches.shape[1]
            last[rows] = losses
        return total, last

    def _gradients(self, held: Stacked, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the mean losses (clients,) of a batch of each client, and their gradients for each leaf.

        Args:
            held: tensors of some clients; statistics and counters change in place.
            x: (clients, batch, …), in fresh memory.
            y: (clients, batch).
        """
        leaves = {name: held[name].detach().requires_grad_() for name in self.engine.leaves}
        rest = {name: tensor for name, tensor in held.items() if name not in leaves}
        logits = self._logits(leaves, rest, x)
        losses = cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape).mean(1)
        grads = torch.autograd.grad(losses.sum(), tuple(leaves.values()), materialize_grads=True)
        return losses.detach(), grads

    def _logits(self, leaves: Stacked, rest: Stacked, x: Tensor) -> Tensor:
        """Return logits (clients, batch, classes)."""

        def forward(leaves: Stacked, rest: Stacked, x: Tensor) -> Tensor:
            out: Tensor = functional_call(self.engine.module, leaves | rest, (x,))
            return out

        if len(x) == 1:  # kernels for one model are faster
            first = [{name: tensor[0] for name, tensor in some.items()} for some in (leaves, rest)]
            return forward(first[0], first[1], x[0]).unsqueeze(0)
        found: Tensor = vmap(forward, randomness="error")(leaves, rest, x)
        return found

    def _optimizer(
        self, held: Stacked, moments: list[list[Tensor]], index: int, training: Training
    ) -> SGD | Adam:
        """Return the optimiser of some clients before the step `index`."""
        weights = [held[name] for name in self.engine.leaves]
        if training.optimizer == "adam":
            first, second = moments
            steps = [torch.tensor(float(index)) for _ in weights]
            return Adam(weights, training.weight_decay, first, second, steps)
        return SGD(weights, training.momentum, training.weight_decay, *moments)

    def _factors(self, mask: Mask) -> Stacked:
        """Return name → zeros and ones (1, *shape), for the tensors that the mask does not hold wholly."""
        layout, part, device = self.engine.layout, self.engine.part, self.engine.device
        if mask.is_full:
            return {}
        held = layout.views(mask.flat if part is None else mask.flat[part.index])
        return {
            name: flags.to(device, torch.float32).unsqueeze(0)
            for name, flags in held.items()
            if not bool(flags.all())
        }


def stream_of(engine: Engine) -> Tensor | None:
    """Return where the global generator stands from which an engine's layers draw; None if none draws."""
    return generator_on(engine.device).get_state() if dropouts(engine.module) else None


def _moments(training: Training) -> int:
    """Return how many tensors an optimiser keeps for each weight."""
    return 2 if training.optimizer == "adam" else int(training.momentum > 0)


def _steps(requests: Sequence[Request]) -> Iterator[_Step]:
    """Yield the steps in order; clients whose batches and learning rates are equal step together."""
    for index in range(max(len(request.batches) for request in requests)):
        together: dict[tuple[int, float], list[int]] = {}
        for k, request in enumerate(requests):
            if index < len(request.batches):
                together.setdefault((len(request.batches[index]), request.rates[index]), []).append(k)
        for (_, rate), clients in together.items():
            batches = torch.stack([requests[k].batches[index] for k in clients])
            yield _Step(index, rate, tuple(clients), batches)


def _placed(steps: Sequence[_Step], device: torch.device) -> Iterator[_Step]:
    """Yield the steps with their rows on a device, to which all go in one copy."""
    if not steps:
        return
    rows = torch.cat([step.batches.flatten() for step in steps]).to(device)
    parts = torch.split(rows, [step.batches.numel() for step in steps])
    for step, part in zip(steps, parts, strict=True):
        yield _Step(step.index, step.rate, step.clients, part.view(step.batches.shape))


# ── the trial ────────────────────────────────────────────────────────────────────────────────────────────

CLIENTS, BATCH, RATE = 3, 4, 0.1
TOLERANCE = 1e-3
"""Of the distance between a stacked step and the client's own, relative to the step's length."""


def stackable(engine: Engine) -> bool:
    """Tell whether clients of a model can be trained together; if not, the log says why.

    A step of a few clients is made together and one by one, on random examples, and must be the same. Models
    that draw random numbers elsewhere than in torch's layers of dropout cannot be stacked.
    """
    try:
        with borrowed(0):
            reason = _difference(engine)
    except Exception as error:  # of any kind: what `vmap` cannot map fails in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if reason is not None:
        logger.warning(
            "clients.stack: %s cannot be stacked (%s); its clients train one after the other",
            engine.model.name,
            reason,
        )
    return reason is None


def _difference(engine: Engine) -> str | None:
    """Return what a stack does otherwise than its clients alone; None if nothing."""
    if engine.precision != "fp32":
        return f"vmap does not compute in {engine.precision}"
    spec, rng = engine.model, torch.Generator().manual_seed(0)
    shape = (CLIENTS * BATCH, *spec.input_shape)
    tokens = spec.architecture.tokens
    given = torch.randint(tokens, shape, generator=rng) if tokens else torch.randn(shape, generator=rng)
    labels = torch.arange(len(given)) % spec.num_classes
    start, mask = spec.init(0), Mask.full(spec.layout)
    parts = torch.split(torch.arange(len(given)), BATCH)
    watch = Watch()
    watch.start()
    requests, alone, generator = [], [], generator_on(engine.device)
    for seed, rows in enumerate(parts):
        generator.manual_seed(seed)
        requests.append(Request(start, mask, (rows,), (RATE,), stream_of(engine)))
        alone.append(_alone(engine, start, given[rows], labels[rows]))
    x, y, before = given.to(engine.device), labels.to(engine.device), generator.get_state()
    answers = Stack(engine).train(requests, x, y, _Plain(), spec.layout.size)
    if watch.drawn() or not torch.equal(before, generator.get_state()):
        return "it draws random numbers"
    return _apart(torch.stack(alone), torch.stack([answer.flat for answer in answers]), start.flat)


def _apart(alone: Tensor, together: Tensor, start: Tensor) -> str | None:
    """Return what differs between two ways to train; None if only the rounding does."""
    distance, moved = (together - alone).norm(), (alone - start).norm()
    return None if bool(distance <= TOLERANCE * moved) else "its results would be others"


def _alone(engine: Engine, start: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the weights (size,) after one step of a single client."""
    engine.load(start, Mask.full(start.layout))
    engine.module.train()
    _, grads = engine.gradient(engine.batch(x), y.to(engine.device))
    SGD(list(engine.leaves.values()), 0.0, 0.0).step(grads, RATE)
    return engine.flat.to("cpu", copy=True)


@dataclass(frozen=True)
class _Plain:
    """The options of the trial's step."""

    local_epochs: int = 1
    steps: int | None = None
    lr: float = RATE
    lr_decay: float = 1.0
    batch_size: int = BATCH
    optimizer: Optimizer = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
