"""The memory that training takes on a device: float32 vectors of the model, a batch, and activations.

Activations are measured by a traced pass: the tensors that autograd keeps for the backward pass, for two
sizes of a batch. From these follows any other, since all of them grow with the batch or do not depend on it.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from fedray.costs.flops import with_memory
from fedray.randomness import borrowed
from fedray.types import Layout

OnShort = Literal["refuse", "batch", "ignore"]
"""What becomes of a device whose memory cannot hold training."""

LEAST_VECTORS = 4
"""Float32 vectors of the model, at least: weights, gradients, update, and the optimiser's or a buffer."""


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of training, by the size of a batch.

    Args:
        vectors_bytes: of the float32 vectors of the model, the optimiser's among them.
        fixed_bytes: of what autograd keeps whatever the batch.
        example_bytes: of an example, and of what autograd keeps for it.
        least: examples in a batch, at least.
    """

    vectors_bytes: int
    fixed_bytes: int
    example_bytes: int
    least: int = 1

    @classmethod
    def trace(
        cls,
        module: nn.Module,
        input_shape: tuple[int, ...],
        layout: Layout,
        *,
        tokens: int = 0,
        more_vectors: int = 0,
        pairs: bool = False,
    ) -> "MemoryModel":
        """Measure what autograd keeps by sending two and three examples through a copy of the module.

        Args:
            module: takes examples (n, *input_shape), as for `FlopModel.trace`.
            input_shape: shape of one example.
            layout: the module's layout.
            tokens: 0 if the module takes float32; else it takes int64 in 0..tokens − 1.
            more_vectors: beside weights, gradients and update: 1 of momentum, 2 of Adam, 2 of standardised
                weights.
            pairs: whether the model needs two examples in a batch.
        """
        probe = with_memory(module).train().requires_grad_(True)
        two, three = (_kept(probe, _examples(count, input_shape, tokens)) for count in (2, 3))
        example = max(0, three - two)
        vectors = max(LEAST_VECTORS, LEAST_VECTORS - 1 + more_vectors)
        return cls(4 * vectors * layout.size, max(0, two - 2 * example), example, 2 if pairs else 1)

    def training_bytes(self, batch: int) -> int:
        """Return the bytes of training with batches of a size, > 0."""
        return self.vectors_bytes + self.fixed_bytes + batch * self.example_bytes

    def fits(self, batch: int, memory_bytes: float) -> bool:
        """Tell whether training with batches of a size fits into a memory."""
        return self.training_bytes(batch) <= memory_bytes

    def largest_batch(self, batch: int, memory_bytes: float) -> int:
        """Return a batch, halved until it fits into a memory; `least` if none does."""
        while batch > self.least and not self.fits(batch, memory_bytes):
            batch = max(self.least, batch // 2)
        return batch


class _Optimised(Protocol):
    @property
    def optimizer(self) -> str: ...
    @property
    def momentum(self) -> float: ...


def optimizer_vectors(options: _Optimised) -> int:
    """Return how many vectors the optimiser of a method's options keeps between steps."""
    return 2 if options.optimizer == "adam" else int(options.momentum != 0)


def _examples(count: int, shape: tuple[int, ...], tokens: int) -> Tensor:
    return torch.randint(tokens, (count, *shape)) if tokens else torch.zeros((count, *shape))


def _kept(module: nn.Module, x: Tensor) -> int:
    """Return the bytes of a batch and of the tensors that autograd keeps for the backward pass of its loss.

    And twice the largest of them: the gradients of a layer's input and output.
    """
    own = {_address(tensor) for tensor in chain(module.parameters(), module.buffers())}
    found = {_address(x): x.untyped_storage()}

    def keep(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            found[_address(tensor)] = tensor.untyped_storage()  # held, so that no other gets its address
        return tensor

    with torch.enable_grad(), borrowed(0), saved_tensors_hooks(keep, lambda tensor: tensor):
        cross_entropy(module(x), torch.zeros(len(x), dtype=torch.int64))
    sizes = [storage.nbytes() for storage in found.values()]
    return sum(sizes) + 2 * max(sizes)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
