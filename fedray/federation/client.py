"""A client for the length of one call: its examples, its generator, its memory, and the METERED sgd, grad and
evaluate.

The inner loop works on one flat vector (see `engine.py`). Gradients come from `autograd.grad`, a step is one
fused update, and masked training multiplies the vector by the mask after each step. Variations (proximal
terms, distillation, sums of gradients, other views of the weights) are arguments of the one loop, so that
nothing can train past the meter.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedray.errors import MethodError
from fedray.models.spec import ModelSpec
from fedray.training.engine import Engine, Forward, Loss, Outcome, Step, View, cut
from fedray.training.optimizers import Training
from fedray.training.resident import Share
from fedray.types import ClientInfo, ClientUpdate, E, Mask, Params, Task, expect

__all__ = ["Client", "ClientFunction", "Engine", "Loss", "Meter", "Outcome", "Step", "norm_statistics"]


GATHERED = 2**18
"""Numbers of examples that are gathered at once; they stay in a cache."""

TWO = (
    "it normalises over the batch (BatchNorm1d, or a single value for each channel), or drops a dimension of "
    "size 1: give each client two examples or more, take method.batch_size of 2 or more, or another model"
)
"""End of messages on a model that needs two examples."""


@dataclass
class Meter:
    """FLOPs, steps, time and loss of a client in this call; `wall_s` is measured, not simulated.

    `loss` is the mean over the examples that the last `sgd` saw, `last_loss` that of its last batch alone.
    """

    flops: float = 0.0
    executed_flops: float = 0.0
    steps: int = 0
    wall_s: float = 0.0
    loss: float = float("nan")
    last_loss: float = float("nan")

    def charge(self, flops: float, executed_flops: float, steps: int, started: float) -> None:
        """Add theoretical and executed FLOPs, steps, and the time since `started`."""
        self.flops += flops
        self.executed_flops += executed_flops
        self.steps += steps
        self.wall_s += time.perf_counter() - started


@dataclass
class Client:
    """One client in one call of `client_update`, or of a function given to `ctx.ask`.

    Args:
        info: its id, number of examples and device profile.
        y: (n,) int64.
        round: the round of the call; 0 in `setup`.
        memory: its memory between rounds; changes are kept if the call succeeds.
    """

    info: ClientInfo
    y: Tensor
    round: int
    memory: dict[str, Any]
    _engine: Engine
    _training: Training
    _generator: Callable[..., np.random.Generator]
    _examples: Callable[[], Tensor]
    _share: Share | None = None
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        """Start the generator of this client in this round."""
        self.rng = self._generator()

    @property
    def id(self) -> int:
        """The client's number in the population; −1 is the server."""
        return self.info.id

    def recall(self, name: str, kind: type[E]) -> E | None:
        """Return an entry of the memory; None if there is none.

        Raises:
            TypeError: if it is of another type.
        """
        if name not in self.memory:
            return None
        return expect(self.memory[name], kind, f"the memory {name!r}")

    @cached_property
    def x(self) -> Tensor:
        """Its examples, normalised: (n, …) float32 or tokens (int64), on the CPU."""
        return self._examples()

    @property
    def num_examples(self) -> int:
        """Its number of examples."""
        return self.y.shape[0]

    @property
    def model(self) -> ModelSpec:
        """The model's structure: layout, channel groups, the classifier's name. It has no weights."""
        return self._engine.model

    @property
    def lr(self) -> float:
        """The method's learning rate in this round: `lr · lr_decay^(round − 1)`."""
        return self._training.lr * self._training.lr_decay ** max(0, self.round - 1)

    def sgd(
        self,
        params: Params,
        mask: Mask,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        lr: float | Callable[[int], float] | None = None,
        seed: int | None = None,
        loss: Loss | None = None,
        on_grad: Callable[[Tensor], None] | None = None,
        on_step: Callable[[Tensor], None] | None = None,
        view: View | None = None,
        forward: Forward | None = None,
        clip: float | None = None,
        narrow: bool = False,
    ) -> Params:
        """Train from `params ⊙ mask` on this client's examples; entries outside the mask stay exactly 0.

        By SGD, or by the optimiser that the method's options name. Where the mask removed whole channels,
        the physically smaller model is trained; where `on_grad`, `on_step`, `loss`, `view`, `forward` or
        `clip` is given, only with `narrow`.

        Args:
            params: where to start; not changed.
            mask: which entries are trained and kept.
            epochs: passes over the examples. Without this and `steps`, the method's options decide.
            steps: number of batches instead, starting a new pass whenever one is used up.
            lr: another learning rate than the method's; or number of the step → learning rate.
            seed: order the examples by this instead of by the round: equal seeds see equal batches.
            loss: instead of the cross-entropy of the logits.
            on_grad: called with the *dense* gradient (size,) before each step, by the weights of the forward
                pass where they are standardised; charged as a dense backward.
            on_step: called with the working vector (size,) after each step, in place of the masking.
            view: maps the weights, by name, to those of the forward pass; differentiable. Where the model
                standardises its weights, that follows.
            forward: how logits are computed from module, weights and examples.
            clip: largest L2 norm of a step's gradient, over the entries that are held.
            narrow: whether these functions also take the smaller model's tensors; not for `on_grad` and
                `on_step`.

        Returns:
            The trained weights, as a copy.

        Raises:
            MethodError: if both epochs and steps are given, or the client has no examples, or fewer than the
                model can be trained on.
        """
        if epochs is not None and steps is not None:
            raise MethodError("client.sgd takes epochs or steps, not both")
        self._check_examples()
        started = time.perf_counter()
        training, rate = self._training, self.lr if lr is None else lr
        plain = all(given is None for given in (loss, on_grad, view, forward, clip))
        usual = plain and on_step is None
        trained = self._elsewhere(params, mask, epochs, steps, rate, seed) if usual else None
        if trained is not None:
            return trained
        engine = self._engine.smaller(mask) if usual or narrow else self._engine
        engine.load(params, mask)
        after_step = on_step or engine.masking(mask)
        simple = (
            plain and training.optimizer == "sgd" and not training.momentum and engine.precision == "fp32"
        )
        chain = engine.chain if simple and engine.chain and engine.chain.takes(training.batch_size) else None
        if chain is None:
            engine.module.train()
            optimizer = engine.optimizer(training, training.weight_decay)
        else:
            chain.standardise(engine.held(mask))
        total, value = torch.zeros((), device=engine.device), torch.tensor(float("nan"))
        seen = steps_made = 0
        rng = self.rng if seed is None else self._generator(seed)
        with torch.set_grad_enabled(chain is None):
            for index, (x, y) in enumerate(self._batches(rng, epochs, steps)):
                step_lr = rate(index) if callable(rate) else rate
                if chain is not None:
                    value = chain.step(x, y, step_lr, training.weight_decay)
                else:
                    batch = engine.batch(x)
                    value, grads = engine.gradient(batch, y, index, loss, view, forward, mask, on_grad)
                    optimizer.step(engine.clipped(grads, clip, mask), step_lr)
                if after_step is not None:
                    with torch.no_grad():
                        after_step(engine.flat)
                total, seen = total.add_(value, alpha=y.shape[0]), seen + y.shape[0]
                steps_made = index + 1
        self._charge(seen, steps_made, mask, started, dense_gradient=on_grad is not None)
        self.meter.loss = float(total) / seen if seen else float("nan")
        self.meter.last_loss = float(value)
        return engine.unload(self._engine.layout)

    def _elsewhere(
        self,
        params: Params,
        mask: Mask,
        epochs: int | None,
        steps: int | None,
        rate: float | Callable[[int], float],
        seed: int | None,
    ) -> Params | None:
        """Return the result of a plain call that is trained elsewhere; None: it is trained here."""
        return None

    def grad(
        self, params: Params, mask: Mask, *, loss: Loss | None = None, batches: int | None = None
    ) -> Tensor:
        """Return the dense gradient (size,) of the mean loss over the examples at `params ⊙ mask`.

        Entries outside the mask have one too; it is charged as a dense backward pass. Running statistics get
        zeros. Where weights are standardised it is the gradient by those of the forward pass, in which alone
        entries outside the mask have a part (`model.forward_params` returns them).

        Args:
            params: where the gradient is taken.
            mask: which entries are held.
            loss: instead of the cross-entropy of the logits.
            batches: number of batches of the method's size, drawn at random; None takes all examples.
        """
        self._check_examples()
        started = time.perf_counter()
        self._engine.load(self.model.forward_params(params, mask), mask)
        self._engine.module.train()
        total, seen, taken = torch.zeros(self._engine.layout.size), 0, 0
        whole = self._cut(torch.arange(self.num_examples))
        parts = self._gathered(whole)
        if batches is not None:
            parts = self._batches(self.rng, None, min(batches, len(whole)))
        for x, y in parts:
            _, grads = self._engine.gradient(self._engine.batch(x), y, 0, loss)
            total.add_(self._engine.dense(grads), alpha=len(y))
            seen, taken = seen + len(y), taken + 1
        self._charge(seen, taken, mask, started, dense_gradient=True)
        return total / seen

    def evaluate(self, params: Params, mask: Mask) -> Outcome:
        """Classify this client's examples with `params ⊙ mask`; one forward pass is charged."""
        started = time.perf_counter()
        params = self.model.forward_params(params, mask)
        outcome = self._engine.evaluate(params, mask, self.x, self.y)
        self._charge_forward(mask, started)
        return outcome

    def norm_statistics(self, params: Params, mask: Mask) -> Tensor:
        """Return the statistics (s,) of each BatchNorm under `params ⊙ mask`; one forward pass is charged.

        Means over batches of the method's size, at the entries `model.norms.statistics`.
        """
        started = time.perf_counter()
        params = self.model.forward_params(params, mask)
        found = self._engine.statistics(params, mask, self.x, self._training.batch_size)
        self._charge_forward(mask, started)
        return found

    def _batches(
        self, rng: np.random.Generator, epochs: int | None, steps: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches for a number of epochs or steps; None takes the method's options."""
        for batches in self._passes(rng, epochs, steps):
            yield from self._gathered(batches)

    def _passes(
        self, rng: np.random.Generator, epochs: int | None, steps: int | None
    ) -> Iterator[list[Tensor]]:
        """Yield for each pass over the examples the rows of its batches; arguments as for `_batches`."""
        if epochs is None and steps is None:
            epochs, steps = self._training.local_epochs, self._training.steps
        if steps is None:
            for _ in range(epochs or 0):
                yield self._cut(torch.from_numpy(rng.permutation(self.num_examples)))
        while steps:
            batches = self._cut(torch.from_numpy(rng.permutation(self.num_examples)))[:steps]
            yield batches
            steps -= len(batches)

    def _gathered(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, y) of batches of rows, in fresh memory.

        Several batches are gathered at once: for small ones that takes as long as one.
        """
        together = max(1, GATHERED // (prod(self.model.input_shape) * self._training.batch_size))
        for start in range(0, len(batches), together):
            lengths = [batch.shape[0] for batch in batches[start : start + together]]
            some = torch.cat(batches[start : start + together])
            x, y = self._pick(some)
            yield from zip(torch.split(x, lengths), torch.split(y, lengths), strict=True)

    def _pick(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return some of its examples and labels in fresh memory on the engine's device."""
        if self._share is not None:
            return self._share.pick(rows)
        # index_select gathers rows about twice as fast as indexing does
        x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)
        return x.to(self._engine.device), y.to(self._engine.device)

    def _cut(self, rows: Tensor) -> list[Tensor]:
        """Cut rows into batches of the method's size; none is of one example if the model needs two."""
        return cut(rows, self._training.batch_size, pairs="train" in self.model.pairs)

    def _check_examples(self) -> None:
        if not self.num_examples:
            raise MethodError(f"client {self.id} has no examples to train on")
        if "train" in self.model.pairs and min(self.num_examples, self._training.batch_size) == 1:
            raise MethodError(
                f"{self.model.name} cannot be trained on one example at a time, and client {self.id} has "
                f"{self.num_examples} with method.batch_size={self._training.batch_size}; {TWO}"
            )

    def _charge(self, examples: int, steps: int, mask: Mask, started: float, *, dense_gradient: bool) -> None:
        flops = self._engine.flops
        executed = flops.executed(mask, self.info.profile.exploits, dense_gradient=dense_gradient)
        theoretical = flops.train(mask, dense_gradient=dense_gradient)
        self.meter.charge(theoretical * examples, executed * examples, steps, started)

    def _charge_forward(self, mask: Mask, started: float) -> None:
        flops, n = self._engine.flops, self.num_examples
        executed = flops.executed_forward(mask, self.info.profile.exploits)
        self.meter.charge(flops.forward(mask) * n, executed * n, 0, started)


ClientFunction = Callable[[Task, Client], ClientUpdate]
"""A function that runs on a device: `method.client_update`, or one given to `ctx.ask`."""


def norm_statistics(task: Task, client: Client) -> ClientUpdate:
    """ON THE DEVICE: the model's BatchNorm statistics, summed over the client's examples."""
    total = client.norm_statistics(task.params, task.mask) * client.num_examples
    return ClientUpdate(task.params, Mask.none(task.mask.layout), sums={"statistics": total})
