"""The products in a forward pass, and the weight that takes part in each.

A dispatch mode sees every operation of a forward pass, in every module. torch's own table
(`torch.utils.flop_counter`) gives the FLOPs of an operation; `MORE` adds a few that the table lacks. The
FLOPs of a product with a weight belong to that weight, and shrink with its density. The FLOPs of a product of
activations, as in attention, belong to no weight.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedray.errors import ConfigError

PROBES = (2, 4)
"""Numbers of examples that a model is traced with; some models need two at least."""

aten = torch.ops.aten

MORE: dict[Any, Callable[..., int]] = {
    aten.mv: lambda matrix, vector, **_: 2 * matrix.numel(),
    aten.addmv: lambda bias, matrix, vector, **_: 2 * matrix.numel(),
    aten.dot: lambda a, b, **_: 2 * a.numel(),
    aten._cdist_forward: lambda a, b, *_, out_val, **__: 2 * out_val.numel() * a.shape[-1],
    aten._euclidean_dist: lambda a, b, *_, out_val, **__: 2 * out_val.numel() * a.shape[-1],
    aten.addbmm: lambda bias, a, b, **_: 2 * a.numel() * b.shape[-1],
    aten._trilinear: lambda a, b, c, *_, out_val, **__: 2 * out_val.numel() * prod(b.shape[-2:]),
}
"""Operation → FLOPs, beside torch's own table."""

LOOK_UPS = """embedding embedding_renorm _embedding_bag _embedding_bag_forward_only index index_select gather
take searchsorted bucketize equal dist"""
NORMALISATION = """native_layer_norm native_group_norm _fused_rms_norm native_batch_norm batch_norm
cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update"""
COPIES = """cat stack copy index_put index_add index_copy scatter scatter_add scatter_reduce
select_scatter slice_scatter masked_scatter masked_select"""
FREE = frozenset(f"{LOOK_UPS} {NORMALISATION} {COPIES}".split())
"""Operations on a weight and activations that multiply no matrices, beside pointwise ones and views."""


def products_of(
    module: nn.Module, run: Callable[[Tensor], object], examples: Callable[[int], Tensor]
) -> tuple[dict[str, float], float]:
    """Count the products of a forward pass, per example.

    FLOPs that do not grow with the number of examples, such as a product of two weights, are left out.

    Args:
        module: its parameters are the weights; no two share memory.
        run: makes a forward pass.
        examples: number → as many examples.

    Returns:
        Name of a weight → number of multiply-adds that each of its entries takes part in, in order of first
        use (a mean over the tensor where parts of it are used differently); and the FLOPs of products of
        activations.

    Raises:
        ConfigError: if the FLOPs of an operation with a weight of two or more dimensions are unknown.
    """
    few, many = (_flops(module, run, examples(count)) for count in PROBES)
    more = PROBES[1] - PROBES[0]
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    positions = {
        name: _exact(many.of_weight.get(name, 0) - flops, 2 * sizes[name] * more)
        for name, flops in few.of_weight.items()
    }
    fixed = (many.of_activations - few.of_activations) / more
    return {name: n for name, n in positions.items() if n}, fixed


def _flops(module: nn.Module, run: Callable[[Tensor], object], x: Tensor) -> "_Products":
    products = _Products(module)
    with _plain_kernels(), products:
        run(x)
    return products


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the FLOPs of each operation to the weight that takes part in it."""

    def __init__(self, module: nn.Module) -> None:
        from torch.utils.flop_counter import flop_registry

        super().__init__()  # type: ignore[no-untyped-call]
        self.formulas: dict[Any, Callable[..., int]] = {**flop_registry, **MORE}
        self.of_weight: dict[str, float] = {}
        self.of_activations: float = 0
        self._matrices = {name: p.numel() for name, p in module.named_parameters() if p.dim() > 1}
        self._vectors = {n for n, p in module.named_parameters() if sum(size > 1 for size in p.shape) < 2}
        # the weights that each tensor is made of; none for buffers and constants; activations are not listed.
        # Views share a storage, so it stands for the tensor
        self._parameters = {_storage(p): frozenset({name}) for name, p in module.named_parameters()}
        self._made = {_storage(b): frozenset[str]() for b in module.buffers()} | self._parameters
        self._given = set(self._made)
        self._alive: list[Any] = []  # so that no storage is used a second time

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, and sympy, at the first operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._alive.append(out)
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        flops = self._count(func, args, kwargs, tensors, out)
        constant = func._overloadpacket is aten.lift_fresh  # torch.tensor(…)
        made_of_weights = constant or all(_storage(tensor) in self._made for tensor in tensors)
        names = frozenset[str]().union(*(self._made.get(_storage(tensor), ()) for tensor in tensors))
        for storage in {_storage(result) for result in _tensors((out,))} - self._given:
            if made_of_weights and flops is None:  # e.g. a standardised weight
                self._made[storage] = names
            else:
                self._made.pop(storage, None)  # activations were written into a copy of a weight
        return out

    def _count(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: Sequence[Tensor], out: Any
    ) -> int | None:
        """Add the FLOPs of an operation; return them, or None if it is no product.

        Raises:
            ConfigError: if they are unknown, and a weight takes part.
        """
        weights = self._weights(tensors)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            flops = int(formula(*args, **kwargs, out_val=out))
            self._charge(weights, flops)
            return flops
        strangers = [tensor for tensor in tensors if _storage(tensor) not in self._made]
        if not weights or not strangers:
            return None
        if func._overloadpacket in (aten.mul, aten.mul_):
            # a product by hand, (x.unsqueeze(1) * weight).sum(2); a scale that broadcasts is none
            if out.numel() > max(_entries(tensor) for tensor in strangers):
                self._charge(weights, 2 * out.numel())
        elif not _is_free(func):
            raise ConfigError(
                f"model: the FLOPs of {func} with {weights[0]} cannot be counted; use matrix products or "
                "convolutions instead"
            )
        return None

    def _weights(self, tensors: Sequence[Tensor]) -> list[str]:
        """Return the weights that a product belongs to: of a parameter rather than of a copy, of the last."""
        of_copies: list[str] = []
        for tensor in reversed(tensors):
            names = [n for n in sorted(self._made.get(_storage(tensor), ())) if n in self._matrices]
            if names and _storage(tensor) in self._parameters:
                return names
            # a weight that is normalised is made of a matrix and of its length for each row
            of_copies = of_copies or [n for n in names if n not in self._vectors] or names
        return of_copies

    def _charge(self, weights: Sequence[str], flops: int) -> None:
        whole = sum(self._matrices[name] for name in weights)
        for name in weights:
            share = flops if len(weights) == 1 else flops * self._matrices[name] / whole
            self.of_weight[name] = self.of_weight.get(name, 0) + share
        if not weights:
            self.of_activations += flops


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Keep torch from fusing layers into kernels that its table of formulas lacks."""
    backends, mkldnn, mha = torch.backends.cuda, torch.backends.mkldnn, torch.backends.mha
    flash = backends.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    efficient = backends.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]
    fast = mha.get_fastpath_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about an Intel GPU that is not there
        with mkldnn.flags(enabled=False):
            backends.enable_flash_sdp(False)
            backends.enable_mem_efficient_sdp(False)
            mha.set_fastpath_enabled(False)
            try:
                yield
            finally:
                backends.enable_flash_sdp(flash)
                backends.enable_mem_efficient_sdp(efficient)
                mha.set_fastpath_enabled(fast)


def _is_free(func: Any) -> bool:
    """Tell whether an operation on a weight multiplies no matrices."""
    name = func._overloadpacket.__name__
    return bool(func.is_view) or torch.Tag.pointwise in func.tags or name.rstrip("_") in FREE


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _entries(tensor: Tensor) -> int:
    """Return the number of different entries: an expanded tensor repeats some."""
    return prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def _exact(flops: float, per_position: int) -> float:
    return int(flops // per_position) if flops % per_position == 0 else flops / per_position
