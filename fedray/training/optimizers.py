"""The options of a client's SGD, and its optimisers: the steps of torch's own, on a working vector."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.optim.adam import adam

Optimizer = Literal["sgd", "adam"]


class Training(Protocol):
    """The options of a client's SGD that every method has."""

    @property
    def local_epochs(self) -> int: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def lr(self) -> float: ...
    @property
    def lr_decay(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


@dataclass
class SGD:
    """The step of torch.optim.SGD, fused over all tensors.

    Args:
        weights: the leaves, updated in place.
        momentum: in [0, 1).
        weight_decay: L2 penalty.
    """

    weights: list[Tensor]
    momentum: float
    weight_decay: float
    _buffers: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def step(self, grads: tuple[Tensor, ...], lr: float) -> None:
        """Move the weights against gradients."""
        # never write into a gradient: autograd may give two weights the same one, or one that is expanded
        gradients = list(grads)
        if self.weight_decay:
            gradients = list(torch._foreach_add(gradients, self.weights, alpha=self.weight_decay))
        if self.momentum:
            if not self._buffers:
                self._buffers = [gradient.clone() for gradient in gradients]
            else:
                torch._foreach_mul_(self._buffers, self.momentum)
                torch._foreach_add_(self._buffers, gradients)
            gradients = self._buffers
        torch._foreach_add_(self.weights, gradients, alpha=-lr)


@dataclass
class Adam:
    """The step of torch.optim.Adam with its usual moments (0.9 and 0.999).

    By its functional form, since making the optimiser object imports torch's compiler for seconds.

    Args:
        weights: the leaves, updated in place.
        weight_decay: L2 penalty.
    """

    weights: list[Tensor]
    weight_decay: float
    _first: list[Tensor] = field(default_factory=list)
    _second: list[Tensor] = field(default_factory=list)
    _steps: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start the moments from zero, unless they are given."""
        self._first = self._first or [torch.zeros_like(weight) for weight in self.weights]
        self._second = self._second or [torch.zeros_like(weight) for weight in self.weights]
        self._steps = self._steps or [torch.zeros(()) for _ in self.weights]

    @torch.no_grad()
    def step(self, grads: tuple[Tensor, ...], lr: float) -> None:
        """Move the weights against gradients."""
        adam(
            self.weights,
            list(grads),
            self._first,
            self._second,
            [],
            self._steps,
            foreach=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )
