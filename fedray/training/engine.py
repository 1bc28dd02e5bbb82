"""One model in working memory: a flat vector, and a module whose parameters are views of it.

All computing with weights happens here: gradients, steps, evaluations. The client that calls counts the
FLOPs. If a mask removes whole channels, a physically smaller engine trains instead, with the same results to
rounding. The choice depends only on the model, the mask and the options of the call, so a run keeps its bits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedray.costs.flops import FlopModel
from fedray.models.norms import batch_norms
from fedray.models.sparse_layers import standardised
from fedray.models.spec import ModelSpec
from fedray.pruning.channels import Shrunken, shrink
from fedray.training.chain import Chain
from fedray.training.optimizers import SGD, Adam, Training
from fedray.training.precision import Precision, computing
from fedray.types import Layout, Mask, Params

SMALLER_ENGINES = 8
"""How many smaller models an engine keeps, the latest ones."""

Weights = Mapping[str, Tensor]
View = Callable[[Weights], Weights]
Forward = Callable[[nn.Module, Weights, Tensor], Tensor]
"""(module, name → weight, examples) → logits: another way to compute them."""


@dataclass(frozen=True)
class Step:
    """One batch in the inner loop, as a custom loss sees it.

    Args:
        x: (batch, …), float32 or tokens (int64). y: (batch,) int64. logits: (batch, classes).
        features: (batch, width), the input of the classifier (the last linear layer); the logits if the
            classifier was not called.
        weights: name → the leaf tensor that is being trained, for penalties on the weights.
        index: 0 for the first step of the call.
    """

    x: Tensor
    y: Tensor
    logits: Tensor
    features: Tensor
    weights: Weights
    index: int


Loss = Callable[[Step], Tensor]


def cut(rows: Tensor, size: int, *, pairs: bool) -> list[Tensor]:
    """Cut rows into batches of `size`, the last one shorter.

    Args:
        rows: (n, …).
        size: of a batch.
        pairs: whether the model needs two examples. A last batch of one is then joined to the one before.
    """
    parts = list(torch.split(rows, size))
    if pairs and len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


class Engine:
    """One model in working memory, bound to one flat vector; a worker has one and reuses it for every client.

    Args:
        model: its module is copied, and its parameters become views of `flat`.
        flops: counts the FLOPs of a batch.
        device: where it computes; arguments and results are on the CPU.
        part: for a smaller engine, the positions of its entries in the whole model.
        precision: of the passes of training; evaluation is always in float32.
        narrow: whether models without some channels are also evaluated as the smaller ones that they are.
    """

    def __init__(
        self,
        model: ModelSpec,
        flops: FlopModel,
        device: str = "cpu",
        part: Shrunken | None = None,
        precision: Precision = "fp32",
        *,
        narrow: bool = False,
    ) -> None:
        self.model, self.flops, self.device, self.precision = model, flops, torch.device(device), precision
        self.layout: Layout = model.layout
        self.part, self.narrow = part, narrow
        self.flat = torch.zeros(model.layout.size, device=self.device)
        self.module: nn.Module = model.bind(self.flat)
        self.leaves: dict[str, Tensor] = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        chained = Chain.of(self.module, model.input_shape, self.device)
        self.chain = chained if precision == "fp32" else None
        self._tracked = [(n, norm) for n, norm in batch_norms(self.module) if n in model.norms.tracked]
        # counters outside the vector, e.g. of batches, must not pass from client to client
        self._counters = [b for n, b in self.module.named_buffers() if n not in model.layout.spans]
        self._counted = [buffer.clone() for buffer in self._counters]
        self._sparse = any(getattr(module, "sparse", False) for module in self.module.modules())
        self._smaller: dict[bytes, Engine | None] = {}
        self.remembers = self.device.type != "cpu"
        self._last: tuple[Tensor, tuple[int, bytes], Tensor] | None = (
            None  # given last, and its copy on a GPU
        )
        self._own_masks: dict[bytes, Mask] = {}  # this engine's part of the mask used last
        self._masking: dict[bytes, Tensor | None] = {}  # of the mask used last
        self._held: dict[bytes, dict[str, Tensor]] = {}  # of the mask used last

    def smaller(self, mask: Mask) -> "Engine":
        """Return the engine of the physically smaller model under a mask; itself where that saves little."""
        if mask.is_full or not self.model.channel_groups:
            return self
        if mask.digest not in self._smaller:
            if len(self._smaller) >= SMALLER_ENGINES:
                del self._smaller[next(iter(self._smaller))]  # the oldest
            part = shrink(mask, self.model.channel_groups)
            self._smaller[mask.digest] = (
                None
                if part is None
                else Engine(
                    self.model.shrunken(part.layout), self.flops, str(self.device), part, self.precision
                )
            )
        return self._smaller[mask.digest] or self

    def load(self, params: Params, mask: Mask) -> None:
        """Copy `params ⊙ mask` into the working vector; the source stays as it is.

        Buffers that are not in the vector are as in a module that was just built.
        """
        with torch.no_grad():
            for buffer, value in zip(self._counters, self._counted, strict=True):
                buffer.copy_(value)
            held = self._own_mask(mask)
            if held.is_full or self.remembers:
                self.flat.copy_(self._given(params, held, mask))
            else:
                self._own_params(params).write_masked(held, self.flat)

    def _given(self, params: Params, held: Mask, mask: Mask) -> Tensor:
        """Return this engine's part of `params ⊙ mask`; the vector of a task is copied to a GPU once."""
        version = params.flat._version
        if self._last is not None:
            flat, key, there = self._last
            if flat is params.flat and key == (version, mask.digest):
                return there
        part = self._own_params(params)
        given = part.flat if held.is_full else part.masked(held).flat
        if self.remembers:
            given = given.to(self.device)
            self._last = params.flat, (version, mask.digest), given
        return given

    def _own_params(self, params: Params) -> Params:
        """Return the weights that this engine has."""
        if self.part is None:
            return params
        return Params(params.flat.index_select(0, self.part.index), self.part.layout)

    def _own_mask(self, mask: Mask) -> Mask:
        """Return the entries of a mask that this engine has."""
        if self.part is None:
            return mask
        if mask.digest not in self._own_masks:
            self._own_masks = {mask.digest: Mask(mask.flat[self.part.index], self.part.layout)}
        return self._own_masks[mask.digest]

    def unload(self, layout: Layout) -> Params:
        """Return a copy of the working vector as weights of the whole model."""
        if self.part is None:
            return Params(self.flat.to("cpu", copy=True), layout)
        return Params(torch.zeros(layout.size).scatter_(0, self.part.index, self.flat.cpu()), layout)

    def masking(self, mask: Mask) -> Callable[[Tensor], object] | None:
        """Return a function that zeroes the working vector outside the mask; None for a full mask."""
        factor = self._factor(mask)
        return None if factor is None else lambda flat: flat.mul_(factor)

    def _factor(self, mask: Mask) -> Tensor | None:
        """Return 1.0 for each entry that the mask holds, and 0.0 elsewhere; None for a full mask."""
        if mask.digest not in self._masking:
            held = self._own_mask(mask)
            self._masking = {mask.digest: None if held.is_full else held.flat.to(self.device, torch.float32)}
        return self._masking[mask.digest]

    def held(self, mask: Mask) -> dict[str, Tensor]:
        """Return name → bool tensor on the device, of each weight that is standardised under a mask."""
        if mask.digest not in self._held:
            own = self._own_mask(mask)
            self._held = {mask.digest: {name: own[name].to(self.device) for name in self.model.kernels}}
        return self._held[mask.digest]

    def batch(self, x: Tensor) -> Tensor:
        """Return a copy of examples as the module takes them: on its device, images with channels last.

        Convolutions and, above all, pooling are about a quarter faster that way on a CPU; values stay the
        same.
        """
        if x.dim() != 4:
            return x.to(self.device, copy=True)  # a model may write into its input
        n, channels, height, width = x.shape
        # with one channel both orders are "contiguous", and only fresh memory has the strides that kernels
        # look at
        last = torch.empty((n, height, width, channels), device=self.device).permute(0, 3, 1, 2)
        return last.copy_(x)

    def gradient(
        self,
        x: Tensor,
        y: Tensor,
        index: int = 0,
        loss: Loss | None = None,
        view: View | None = None,
        forward: Forward | None = None,
        mask: Mask | None = None,
        on_grad: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the loss of a batch and its gradient for each of `leaves`; zeros where a leaf has no part.

        Args:
            x: a batch, as `batch` returns it.
            y: (batch,) int64, on this engine's device.
            index: number of the step, for the loss.
            loss: instead of the cross-entropy of the logits.
            view: maps the weights, by name, to those of the forward pass; differentiable.
            forward: how logits are computed; the module's own way if None.
            mask: under which weights are standardised, after `view`, where the model asks for it; None: the
                working vector holds the weights of the forward pass.
            on_grad: called with the dense gradient (size,) by the weights of the forward pass.
        """
        weights = self.leaves if view is None else dict(view(self.leaves))
        held = {} if mask is None else self.held(mask)
        if held:
            weights = standardised(weights, held, names=held)
        features: list[Tensor] = []
        with (
            self._classifier_input(features) if loss is not None and self.model.has_head else nullcontext(),
            computing(self.precision, self.device),
        ):
            if forward is not None:
                logits = forward(self.module, weights, x)
            elif weights is not self.leaves:
                logits = torch.func.functional_call(self.module, weights, (x,))
            else:
                logits = self.module(x)
        logits = logits.float()
        if loss is None:
            value = cross_entropy(logits, y)
        else:  # without a classifier, or where logits are computed past it, there are no features
            seen = features[-1].float() if features else logits
            value = loss(Step(x, y, logits, seen, self.leaves, index))
        # a pruned weight has no part in its standardised row: what it would be worth is known there only
        inner = tuple(weights[name] for name in held) if on_grad is not None else ()
        grads = torch.autograd.grad(value, (*self.leaves.values(), *inner), materialize_grads=True)
        if self._sparse:
            grads = tuple(grad.to_dense() for grad in grads)
        grads, below = grads[: len(self.leaves)], grads[len(self.leaves) :]
        if on_grad is not None:
            on_grad(self.dense(self._with(grads, dict(zip(held, below, strict=False)))))
        return value.detach(), grads

    def _with(self, grads: tuple[Tensor, ...], others: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return gradients with others in the place of those of some leaves."""
        return tuple(others.get(name, grad) for name, grad in zip(self.leaves, grads, strict=True))

    def clipped(self, grads: tuple[Tensor, ...], most: float | None, mask: Mask) -> tuple[Tensor, ...]:
        """Return gradients scaled so that their L2 norm together is at most `most`, as PyTorch clips it.

        Args:
            grads: one for each of `leaves`; not changed.
            most: > 0; None returns the gradients as they are.
            mask: entries outside it become zero and do not count in the norm.
        """
        if most is None:
            return grads
        factor = self._factor(mask)
        if factor is not None:
            kept = self.layout.views(factor)
            grads = tuple(grad * kept[name] for name, grad in zip(self.leaves, grads, strict=True))
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(grads))))
        return tuple(torch._foreach_mul(list(grads), (most / (norm + 1e-6)).clamp(max=1.0)))

    def dense(self, grads: tuple[Tensor, ...]) -> Tensor:
        """Return gradients as one vector (size,) on the CPU; running statistics get zeros."""
        flat = torch.zeros(self.layout.size, device=self.device)
        for name, grad in zip(self.leaves, grads, strict=True):
            flat[self.layout.spans[name]] = grad.reshape(-1)
        return flat.cpu()

    def optimizer(self, training: Training, weight_decay: float) -> "SGD | Adam":
        """Return a fresh optimiser of the working vector: its state starts from zero."""
        leaves = list(self.leaves.values())
        if training.optimizer == "adam":
            return Adam(leaves, weight_decay)
        return SGD(leaves, training.momentum, weight_decay)

    @contextmanager
    def _classifier_input(self, seen: list[Tensor]) -> Iterator[None]:
        """Append each input of the classifier to `seen`."""
        classifier = self.module.get_submodule(self.model.head)
        hook = classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def evaluate(self, params: Params, mask: Mask, x: Tensor, y: Tensor, batch: int = 250) -> "Outcome":
        """Classify examples with `params ⊙ mask`: per example, right or wrong and the loss.

        The params are those of the forward pass: see `ModelSpec.forward_params`.

        A BatchNorm of whose running statistics the mask holds nothing normalises by those of the batch.
        """
        if self.narrow and (smaller := self.smaller(mask)) is not self:
            return smaller.evaluate(params, mask, x, y, batch)
        self.load(params, mask)
        self.module.eval()
        for name, norm in self._tracked:
            norm.train(not bool(mask[f"{name}.running_var"].any()))
        by_batch = any(norm.training for _, norm in self._tracked)
        pairs = bool(self.model.pairs & ({"train", "eval"} if by_batch else {"eval"}))
        if self.chain is not None:
            self.chain.standardise({})
            batch = min(batch, self.chain.at_once or batch)
        parts = cut(x, batch, pairs=pairs)
        logits = [self._logits(part, pairs=pairs) for part in parts]
        labels = torch.split(y, [len(part) for part in parts])
        losses = [cross_entropy(out, t, reduction="none") for out, t in zip(logits, labels, strict=True)]
        right = [
            (out.argmax(1) == t) & ~out.isnan().any(1)  # argmax takes NaN for the largest
            for out, t in zip(logits, labels, strict=True)
        ]
        return Outcome(torch.cat(right).numpy(), torch.cat(losses).numpy())

    def _logits(self, x: Tensor, *, pairs: bool) -> Tensor:
        """Return the logits of a batch; a single example that the model cannot take goes in twice."""
        if self.chain is not None:
            return self.chain.logits(x.to(self.device)).cpu()
        logits: Tensor = self.module(self.batch(torch.cat([x, x]) if pairs and len(x) == 1 else x))
        return logits[: len(x)].cpu()

    @torch.no_grad()
    def statistics(self, params: Params, mask: Mask, x: Tensor, batch: int) -> Tensor:
        """Return the statistics (s,) of each BatchNorm under `params ⊙ mask`, at `model.norms.statistics`.

        Means over batches, each counting by its examples and normalised, as in training, by its own. The
        params are those of the forward pass.
        """
        engine = self.smaller(mask) if self.narrow else self
        return engine.measured(params, mask, x, batch).flat[self.model.norms.statistics]

    @torch.no_grad()
    def measured(self, params: Params, mask: Mask, x: Tensor, batch: int) -> Params:
        """Return `params ⊙ mask` of the whole model with the statistics that `statistics` describes."""
        self.load(params, mask)
        self.module.eval()
        seen = 0
        for part in cut(x, batch, pairs="train" in self.model.pairs):
            seen += len(part)
            for _, norm in self._tracked:
                norm.train()
                norm.track_running_stats, norm.momentum = True, len(part) / seen
            self.module(self.batch(part))
        for _, norm in self._tracked:
            norm.track_running_stats = False
        return self.unload(mask.layout)


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
