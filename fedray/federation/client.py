"""A client for the length of one call: its examples, its generator, its memory, and the METERED sgd, grad and
evaluate.

The inner loop works on one flat vector. The module's parameters are views of it, gradients come from
`autograd.grad`, and a step is one fused update; masked training multiplies the vector by the mask after each
step. Variations (proximal terms, distillation, sums of gradients, other views of the weights) are arguments
of the one loop, so that nothing can train past the meter.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedray.costs.flops import FlopModel
from fedray.errors import MethodError
from fedray.federation.chain import LinearChain
from fedray.models.spec import ModelSpec
from fedray.types import ClientInfo, ClientUpdate, Layout, Mask, Params, Task


@dataclass(frozen=True)
class Step:
    """One batch in the inner loop, as a custom loss sees it.

    Args:
        x: (batch, C, H, W) float32. y: (batch,) int64. logits: (batch, classes).
        weights: name → the leaf tensor that is being trained, for penalties on the weights.
        index: 0 for the first step of the call.
    """

    x: Tensor
    y: Tensor
    logits: Tensor
    weights: Mapping[str, Tensor]
    index: int


Loss = Callable[[Step], Tensor]


@dataclass
class Meter:
    """What a client has computed so far in this call."""

    flops: float = 0.0
    executed_flops: float = 0.0
    loss: float = float("nan")

    def charge(self, flops: float, executed_flops: float) -> None:
        """Add FLOPs: the theoretical count, and what the device really runs."""
        self.flops += flops
        self.executed_flops += executed_flops


class Engine:
    """One model in working memory, bound to one flat vector; a worker has one and reuses it for every client.

    Args:
        model: its module is copied, and its parameters become views of `flat`.
        flops: what a batch costs.
        device: where it computes; what goes in and comes out is on the CPU.
    """

    def __init__(self, model: ModelSpec, flops: FlopModel, device: str = "cpu") -> None:
        self.layout: Layout = model.layout
        self.flops, self.device = flops, torch.device(device)
        self.flat = torch.zeros(model.layout.size, device=self.device)
        self.module: nn.Module = model.bind(self.flat)
        self.leaves: dict[str, Tensor] = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.chain = LinearChain.of(self.module)

    def load(self, params: Params, mask: Mask) -> None:
        """Copy `params ⊙ mask` into the working vector; the source stays as it is."""
        with torch.no_grad():
            self.flat.copy_(params.flat if mask.is_full else torch.where(mask.flat, params.flat, 0.0))

    def batch(self, x: Tensor) -> Tensor:
        """Return images as this engine computes them: on its device, for convolutions with channels last.

        Convolutions and, above all, pooling are about a quarter faster that way on a CPU; values stay the
        same.
        """
        if self.chain is not None:
            return x.to(self.device)
        n, channels, height, width = x.shape
        # with one channel both orders are "contiguous", and only fresh memory has the strides that kernels
        # look at
        last = torch.empty((n, height, width, channels), device=self.device).permute(0, 3, 1, 2)
        return last.copy_(x)

    @torch.no_grad()
    def evaluate(self, params: Params, mask: Mask, x: Tensor, y: Tensor, batch: int = 250) -> "Outcome":
        """Classify examples with `params ⊙ mask`: per example, right or wrong and the loss."""
        self.load(params, mask)
        self.module.eval()
        logits = [self.module(self.batch(part)).cpu() for part in torch.split(x, batch)]
        losses = [
            cross_entropy(out, t, reduction="none")
            for out, t in zip(logits, torch.split(y, batch), strict=True)
        ]
        right = [out.argmax(1) == t for out, t in zip(logits, torch.split(y, batch), strict=True)]
        return Outcome(torch.cat(right).numpy(), torch.cat(losses).numpy())


@dataclass(frozen=True)
class Outcome:
    """Of each example: whether it was classified right (bool), and its cross-entropy (float32)."""

    right: NDArray[np.bool_]
    losses: NDArray[np.float32]

    @property
    def accuracy(self) -> float:
        """Share classified right, in [0, 1]; NaN for no examples."""
        return float(self.right.mean()) if len(self.right) else float("nan")

    @property
    def loss(self) -> float:
        """Mean cross-entropy; NaN for no examples."""
        return float(self.losses.mean(dtype=np.float64)) if len(self.losses) else float("nan")


class Training(Protocol):
    """The options of a client's SGD that every method has."""

    @property
    def local_epochs(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


@dataclass
class Client:
    """One client in one call of `client_update` (or of a function that was asked).

    Args:
        info: what the server knows of it.
        x: (n, C, H, W) float32, its examples, normalised.
        y: (n,) int64.
        memory: what it remembers between rounds; changes are kept if the call succeeds.
    """

    info: ClientInfo
    x: Tensor
    y: Tensor
    memory: dict[str, Any]
    _engine: Engine
    _training: Training
    _generator: Callable[..., np.random.Generator]
    meter: Meter = field(default_factory=Meter)

    def __post_init__(self) -> None:
        """Start the generator of this client in this round."""
        self.rng = self._generator()

    @property
    def id(self) -> int:
        """The client's number in the population; −1 is the server."""
        return self.info.id

    @property
    def num_examples(self) -> int:
        """How many examples it has."""
        return len(self.y)

    def sgd(
        self,
        params: Params,
        mask: Mask,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        lr: float | None = None,
        seed: int | None = None,
        loss: Loss | None = None,
        on_grad: Callable[[Tensor], None] | None = None,
        on_step: Callable[[Tensor], None] | None = None,
        view: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    ) -> Params:
        """Train from `params ⊙ mask` by SGD on this client's examples; entries outside the mask stay exactly
        0.

        Args:
            params: where to start; not changed.
            mask: which entries are trained and kept.
            epochs: passes over the examples; the method's `local_epochs` if neither this nor `steps` is
                given.
            steps: number of batches instead, starting a new pass whenever one is used up.
            lr: another learning rate than the method's.
            seed: order the examples by this instead of by the round: equal seeds see equal batches.
            loss: instead of the cross-entropy of the logits.
            on_grad: called with the *dense* gradient (size,) before each step; charged as a dense backward.
            on_step: called with the working vector (size,) after each step, in place of the masking.
            view: name → weight, differentiably mapped to what the forward pass uses.

        Returns:
            The trained weights, in memory of their own.

        Raises:
            MethodError: if both epochs and steps are given, or the client has no examples.
        """
        if epochs is not None and steps is not None:
            raise MethodError("client.sgd takes epochs or steps, not both")
        if not self.num_examples:
            raise MethodError(f"client {self.id} has no examples to train on")
        engine, rate = self._engine, self._training.lr if lr is None else lr
        engine.load(params, mask)
        engine.module.train()
        keep = None if mask.is_full else mask.flat.to(engine.device, torch.float32)
        plain = loss is None and view is None and on_grad is None and not self._training.momentum
        chain = engine.chain if plain else None
        momentum: list[Tensor] | None = None
        total, seen = torch.zeros((), device=engine.device), 0
        rng = self.rng if seed is None else self._generator(seed)
        for index, rows in enumerate(self._batches(rng, epochs, steps)):
            x, y = self._batch(rows)
            if chain is not None:
                value = chain.step(x, y, rate, self._training.weight_decay)
            else:
                value, grads = self._gradient(x, y, index, loss, view)
                if on_grad is not None:
                    on_grad(self._flat(grads))
                momentum = self._descend(grads, momentum, rate)
            if on_step is not None:
                with torch.no_grad():
                    on_step(engine.flat)
            elif keep is not None:
                with torch.no_grad():
                    engine.flat.mul_(keep)
            total, seen = total.add_(value, alpha=len(rows)), seen + len(rows)
        self._charge(seen, mask, dense_gradient=on_grad is not None)
        self.meter.loss = float(total) / seen if seen else float("nan")
        return Params(engine.flat.to("cpu", copy=True), engine.layout)

    def grad(self, params: Params, mask: Mask, *, loss: Loss | None = None) -> Tensor:
        """Return the dense gradient (size,) of the mean loss over all examples at `params ⊙ mask`.

        Entries outside the mask have one too; it is charged as a dense backward pass. Running statistics get
        zeros.
        """
        self._engine.load(params, mask)
        self._engine.module.train()
        total = torch.zeros(self._engine.layout.size)
        for rows in torch.split(torch.arange(self.num_examples), self._training.batch_size):
            x, y = self._batch(rows)
            _, grads = self._gradient(x, y, 0, loss, None)
            total.add_(self._flat(grads), alpha=len(rows) / self.num_examples)
        self._charge(self.num_examples, mask, dense_gradient=True)
        return total

    def evaluate(self, params: Params, mask: Mask) -> Outcome:
        """Classify this client's examples with `params ⊙ mask`; one forward pass is charged."""
        flops = self._engine.flops
        executed = flops.executed_forward(mask, self.info.profile.exploits)
        self.meter.charge(flops.forward(mask) * self.num_examples, executed * self.num_examples)
        return self._engine.evaluate(params, mask, self.x, self.y)

    def _batches(self, rng: np.random.Generator, epochs: int | None, steps: int | None) -> Iterator[Tensor]:
        size, given = self._training.batch_size, steps is not None
        left = steps if steps is not None else 0
        passes = epochs if epochs is not None else self._training.local_epochs
        while left > 0 if given else passes > 0:
            for rows in torch.split(torch.from_numpy(rng.permutation(self.num_examples)), size):
                if given and left == 0:
                    return
                yield rows
                left -= 1
            passes -= 1

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        # index_select gathers rows about twice as fast as indexing does
        x, y = self.x.index_select(0, rows), self.y.index_select(0, rows)
        return self._engine.batch(x), y.to(self._engine.device)

    def _gradient(
        self,
        x: Tensor,
        y: Tensor,
        index: int,
        loss: Loss | None,
        view: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        module, leaves = self._engine.module, self._engine.leaves
        logits = module(x) if view is None else torch.func.functional_call(module, dict(view(leaves)), (x,))
        value = cross_entropy(logits, y) if loss is None else loss(Step(x, y, logits, leaves, index))
        return value.detach(), torch.autograd.grad(value, tuple(leaves.values()))

    @torch.no_grad()
    def _descend(
        self, grads: tuple[Tensor, ...], momentum: list[Tensor] | None, lr: float
    ) -> list[Tensor] | None:
        """Make one SGD step as torch.optim.SGD does; return the momentum buffers."""
        # never write into a gradient: autograd may give two weights the same one, or one that is expanded
        weights, gradients = list(self._engine.leaves.values()), list(grads)
        if self._training.weight_decay:
            gradients = list(torch._foreach_add(gradients, weights, alpha=self._training.weight_decay))
        if self._training.momentum:
            if momentum is None:
                momentum = [gradient.clone() for gradient in gradients]
            else:
                torch._foreach_mul_(momentum, self._training.momentum)
                torch._foreach_add_(momentum, gradients)
            gradients = momentum
        torch._foreach_add_(weights, gradients, alpha=-lr)
        return momentum

    def _flat(self, grads: tuple[Tensor, ...]) -> Tensor:
        flat = torch.zeros(self._engine.layout.size, device=self._engine.device)
        for name, grad in zip(self._engine.leaves, grads, strict=True):
            flat[self._engine.layout.spans[name]] = grad.reshape(-1)
        return flat.cpu()

    def _charge(self, examples: int, mask: Mask, *, dense_gradient: bool) -> None:
        flops = self._engine.flops
        executed = flops.executed(mask, self.info.profile.exploits, dense_gradient=dense_gradient)
        self.meter.charge(flops.train(mask, dense_gradient=dense_gradient) * examples, executed * examples)


ClientFunction = Callable[[Task, Client], ClientUpdate]
"""What runs on a device: `method.client_update`, or a function that was asked."""
