"""Several clients trained together: one copy of the model for each, and one call for a step of them all.

A step of a small model keeps a GPU busy for a few microseconds, and starting its kernels takes longer. The
weights of the clients are therefore stacked, (clients, *shape) for each tensor, running statistics included,
and `torch.func.vmap` maps the model over them. A client sees the same batches in the same order as alone;
its weights differ by rounding.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy

from fedray.models.sparse_layers import standardised
from fedray.training.dropout import Streams, dropouts, generator_on
from fedray.training.engine import Engine
from fedray.training.optimizers import SGD, Adam, Training
from fedray.training.plan import Answer, Request, plan
from fedray.types import Mask

Stacked = dict[str, Tensor]
"""Name of a parameter or buffer → its copies (clients, *shape)."""


class Stack:
    """Trains requests of several clients together, on the device of an engine.

    Args:
        engine: has the module, and the layout that is trained.
        pads: whether batches of different sizes may be filled up, since the model treats each example alone.
    """

    def __init__(self, engine: Engine, *, pads: bool) -> None:
        self.engine, self._pads = engine, pads
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
        factors, kernels = self._factors(requests[0].mask), self.engine.held(requests[0].mask)
        total = torch.zeros(len(requests), device=device)
        last = torch.full_like(total, float("nan"))
        for step in plan(requests, device, pads=self._pads):
            rows = step.rows
            part = {name: tensor[rows] for name, tensor in held.items()}
            state = [[moment[rows] for moment in some] for some in moments]
            images = x.index_select(0, step.batches.flatten())
            optimizer = self._optimizer(part, state, step.index, training)
            with streams.drawing(self._dropouts, step.clients) if self._dropouts else nullcontext():
                losses, grads = self._gradients(
                    part,
                    images.view(*step.batches.shape, *x.shape[1:]),
                    y[step.batches],
                    step.weights if step.is_padded else None,
                    kernels,
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
            total[rows] += losses * step.lengths
            last[rows] = losses
        return total, last

    def _gradients(
        self, held: Stacked, x: Tensor, y: Tensor, weights: Tensor | None, kernels: Stacked
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the mean losses (clients,) of a batch of each client, and their gradients for each leaf.

        Args:
            held: tensors of some clients; statistics and counters change in place.
            x: (clients, batch, …), in fresh memory.
            y: (clients, batch).
            weights: (clients, batch), of the examples in the mean; None weighs all alike.
            kernels: name → which entries the mask holds, of each weight that is standardised.
        """
        leaves = {name: held[name].detach().requires_grad_() for name in self.engine.leaves}
        rest = {name: tensor for name, tensor in held.items() if name not in leaves}
        logits = self._logits(leaves, rest, x, kernels)
        each = cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        losses = each.mean(1) if weights is None else (each * weights).sum(1)
        grads = torch.autograd.grad(losses.sum(), tuple(leaves.values()), materialize_grads=True)
        return losses.detach(), grads

    def _logits(self, leaves: Stacked, rest: Stacked, x: Tensor, kernels: Stacked) -> Tensor:
        """Return logits (clients, batch, classes)."""

        def forward(leaves: Stacked, rest: Stacked, x: Tensor) -> Tensor:
            weights = standardised(leaves, kernels, names=kernels) if kernels else leaves
            out: Tensor = functional_call(self.engine.module, weights | rest, (x,))
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
