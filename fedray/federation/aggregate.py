"""The mask-aware mean as a fold: add, merge, mean.

    out[i] = Σ_k n_k m_k[i] w_k[i] / Σ_k n_k m_k[i],   and `otherwise[i]` where no client holds i

With one common mask this is FedAvg, with width masks HeteroFL, with masks of the clients' own FRLP's FedSA
(eq. 7). Workers never return a hundred models: a worker adds each update to a `Partial` while it is hot in
cache, and partials are merged along a fixed binary tree over chunks of the sorted cohort. The tree depends on
the config alone, so the mean has the same bits on any number of workers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedray.errors import MethodError
from fedray.types import ClientRecord, ClientUpdate, Cost, Layout, Mask, Params

Vector = NDArray[np.float32]
Masks = Mapping[bytes, Mask]
"""Masks by digest: what a digest in a partial refers to."""

Weight = Literal["examples", "uniform"]
LARGEST_METRIC = 1e280
"""Times the examples of any population, it is still a float."""
BLOCK = 2**15
"""Entries that are added at once."""

CountedBy = Literal["mask", "nonzero", "everyone"]


@dataclass(frozen=True)
class Fold:
    """How updates are added up; declared by the method, since a worker must know it.

    Args:
        weight: a client counts by its number of examples, or like every other.
        by: which clients count for a coordinate: those that hold it by the update's mask; those with `w ≠ 0`
            there (FRLP's literal text); or every client that sent weights, an absent weight being a zero
            (plain FedAvg of sparse models).
        keep_updates: keep each model beside the sum, for the rare method that needs them; costs a model per
            client.
    """

    weight: Weight = "examples"
    by: CountedBy = "mask"
    keep_updates: bool = False

    def bounds(self, sizes: NDArray[np.int64]) -> "Bounds":
        """Return the largest magnitudes of an update, given the number of examples of each client."""
        weights = float(sizes.sum()) if self.weight == "examples" else float(len(sizes))
        most = float(np.finfo(np.float32).max) / 2  # half of it, for the rounding of sums
        return Bounds(most / max(1.0, weights), most / len(sizes), np.iinfo(np.int64).max // len(sizes))


@dataclass(frozen=True)
class Bounds:
    """Largest magnitudes with which an update of every client at once can be added up without an overflow.

    Args:
        weight: of an entry of `params`.
        number: of an entry of a floating-point sum.
        count: of an entry of an integer sum.
    """

    weight: float
    number: float
    count: int


class Partial:
    """The fold of some clients: Σ n·m·w, Σ n·m, their sums, single values and metrics.

    Σ n·m is a number as long as all updates have one mask (named by its digest), and a vector from then on.

    Args:
        layout: the model's layout.
        fold: how to add.
        masks: masks that both sides of a process border know; others are spread into the vector.
    """

    def __init__(self, layout: Layout, fold: Fold, masks: Masks) -> None:
        self.layout, self.fold, self.masks = layout, fold, masks
        self.weighted: Vector | None = None
        self.common: bytes | None = None
        self.weight = 0.0
        self.held: Vector | None = None
        self.sums: dict[str, NDArray[Any]] = {}
        self.each: dict[int, dict[str, torch.Tensor]] = {}
        self.updates: dict[int, ClientUpdate] = {}
        self.metrics: dict[str, tuple[float, float]] = {}
        self.senders: dict[str, int] = {}
        self.unmeasured: dict[str, tuple[int, ...]] = {}

    def add(self, client: int, num_examples: int, update: ClientUpdate) -> None:
        """Add one client's update, which must be finite under its mask."""
        weight = float(num_examples) if self.fold.weight == "examples" else 1.0
        params, mask = update.params, update.mask
        if self.fold.by == "everyone" and mask.count and not mask.is_full:
            params, mask = params.masked(mask), Mask.full(self.layout)
        if mask.count:  # a silent client adds nothing, and must not make a common mask a vector
            self._add_params(params, mask, weight)
        for name, value in update.sums.items():
            # votes travel as bool or uint8, and add up to more than these can hold
            array = value.detach().cpu().numpy().astype(np.float32 if value.is_floating_point() else np.int64)
            self._add_sum(name, array, client)
        if update.each:
            self.each[client] = {name: value.detach().clone() for name, value in update.each.items()}
        if self.fold.keep_updates:
            self.updates[client] = ClientUpdate(update.params.masked(update.mask), update.mask)
        self._add_metrics(update.metrics, weight, client)

    def _add_metrics(self, metrics: Mapping[str, float], weight: float, client: int) -> None:
        for name, number in metrics.items():
            total, count = self.metrics.get(name, (0.0, 0.0))
            if _averages(number):
                self.metrics[name] = (total + weight * float(number), count + weight)
            else:
                self.metrics[name] = (total, count)
                self.unmeasured[name] = (*self.unmeasured.get(name, ()), client)

    def _add_sum(self, name: str, array: NDArray[Any], client: int) -> None:
        """Add to a named sum the array of a client, or of several of which `client` is one.

        Raises:
            MethodError: if it is of another shape, or of integers where others sent fractions.
        """
        if name not in self.sums:
            self.sums[name], self.senders[name] = array, client
            return
        known = self.sums[name]
        if (known.shape, known.dtype) != (array.shape, array.dtype):
            raise MethodError(
                f"the sum {name!r} does not fit: client {self.senders[name]} sent {_form(known)}, client "
                f"{client} {_form(array)}. Every client of an exchange must send it in one shape, and all "
                "as integers or all as floats: change what `client_update` puts in `sums`"
            )
        self.sums[name] = known + array

    def _add_params(self, params: Params, mask: Mask, weight: float) -> None:
        if self.weighted is None:
            self.weighted = np.zeros(self.layout.size, dtype=np.float32)
        literal = self.fold.by == "nonzero"
        if not literal and self.held is None and self._is_shared(mask) and self.common in (None, mask.digest):
            # whatever lies outside a common mask is never read: `_within` and `mean` leave it out
            torch.from_numpy(self.weighted).add_(params.flat, alpha=weight)
            self.common, self.weight = mask.digest, self.weight + weight
            return
        self.weighted, held = self._within(), self._spread()
        if literal:
            sent = params.flat if mask.is_full else params.masked(mask).flat
            torch.from_numpy(self.weighted).add_(sent, alpha=weight)
            _count_nonzero(held, sent.numpy(), np.float32(weight))
        else:
            _add_held(self.weighted, held, params.flat.numpy(), mask.flat.numpy(), np.float32(weight))
        self.common, self.weight, self.held = None, 0.0, held

    def _within(self) -> Vector:
        """Return Σ n·m·w with zeros where no client holds an entry."""
        assert self.weighted is not None
        if self.common is None or self.masks[self.common].is_full:
            return self.weighted
        held = self.masks[self.common]
        return Params(torch.from_numpy(self.weighted), held.layout).masked(held).flat.numpy()

    def _is_shared(self, mask: Mask) -> bool:
        """Tell whether both sides of a process border know a mask; a digest is computed only if it may be."""
        return any(mask.count == known.count for known in self.masks.values()) and mask.digest in self.masks

    def _spread(self) -> Vector:
        """Return Σ n·m as a new vector (size,)."""
        if self.held is not None:
            return self.held if self.held.flags.writeable else self.held.copy()
        if self.common is None:
            return np.zeros(self.layout.size, dtype=np.float32)
        return self.masks[self.common].flat.numpy().astype(np.float32) * np.float32(self.weight)

    def merge(self, other: "Partial") -> "Partial":
        """Return the fold of both, this one's clients first; neither is changed."""
        out = Partial(self.layout, self.fold, self.masks)
        same = None in (self.common, other.common) or self.common == other.common
        if self.held is None and other.held is None and same:
            out.weighted = _plus(self.weighted, other.weighted)
            out.common = self.common or other.common
            out.weight = self.weight + other.weight
        else:
            parts = (part for part in (self, other) if part.weighted is not None)
            out.weighted = reduce(_plus, (part._within() for part in parts), None)
            out.held = self._spread() + other._spread()
        out.sums, out.senders = dict(self.sums), dict(self.senders)
        for name, array in other.sums.items():
            out._add_sum(name, array, other.senders[name])
        out.each, out.updates = self.each | other.each, self.updates | other.updates
        for name in sorted({*self.metrics, *other.metrics}):
            (a, n), (b, m) = self.metrics.get(name, (0.0, 0.0)), other.metrics.get(name, (0.0, 0.0))
            out.metrics[name] = (a + b, n + m)
        for name in sorted({*self.unmeasured, *other.unmeasured}):
            out.unmeasured[name] = self.unmeasured.get(name, ()) + other.unmeasured.get(name, ())
        return out

    def mean(self, otherwise: Params | None = None) -> Params:
        """Return the mask-aware mean; `otherwise` (zeros if None) where no client holds a coordinate."""
        rest = np.float32(0) if otherwise is None else otherwise.flat.numpy()
        if self.weighted is None or (self.common is not None and self.weight <= 0):
            flat = np.broadcast_to(rest, (self.layout.size,)).astype(np.float32)
        elif self.common is not None:
            mask = self.masks[self.common]
            flat = self.weighted / np.float32(self.weight)
            flat = flat if mask.is_full else np.where(mask.flat.numpy(), flat, rest)
        else:
            held = self._spread()
            empty = held <= 0
            flat = np.where(empty, rest, self.weighted / np.where(empty, np.float32(1), held))
        return Params(torch.from_numpy(np.ascontiguousarray(flat, dtype=np.float32)), self.layout)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the masks behind: the other side of the border has them, by digest."""
        return self.__dict__ | {"masks": {}, "layout": None}

    def arrived(self, layout: Layout, masks: Masks) -> "Partial":
        """Return self after a process border, with layout and masks put back."""
        self.layout, self.masks = layout, masks
        return self


def _count_nonzero(held: Vector, values: Vector, weight: np.float32) -> None:
    """Add a weight to `held` in place wherever a value is not zero."""
    flags, weights = np.empty(BLOCK, np.bool_), np.empty(BLOCK, np.float32)
    for start in range(0, len(held), BLOCK):  # a block stays in the cache for all its passes
        part = values[start : start + BLOCK]
        block, flag = held[start : start + BLOCK], flags[: len(part)]
        np.not_equal(part, 0, out=flag)
        np.add(block, np.multiply(flag, weight, out=weights[: len(part)]), out=block)


def _add_held(
    weighted: Vector, held: Vector, values: Vector, mask: NDArray[np.bool_], weight: np.float32
) -> None:
    """Add weight · value to `weighted`, and the weight to `held`, in place wherever a mask is True.

    By an `and` of the bits, block by block, so that nothing of the model's size is written in between.
    """
    whole = weight.view(np.int32)
    bits, counts = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
    kept, sums = torch.from_numpy(bits.view(np.float32)), torch.from_numpy(weighted)
    for start in range(0, len(held), BLOCK):
        stop = min(start + BLOCK, len(held))
        some, block = bits[: stop - start], held[start:stop]
        np.negative(mask[start:stop].view(np.int8), out=some, dtype=np.int32)  # all bits set for True
        np.add(block, np.bitwise_and(some, whole, out=counts[: stop - start]).view(np.float32), out=block)
        np.bitwise_and(values[start:stop].view(np.int32), some, out=some)
        sums[start:stop].add_(kept[: stop - start], alpha=float(weight))


def _averages(number: float) -> bool:
    """Tell whether a metric is finite, and stays so in a mean."""
    try:
        return abs(float(number)) <= LARGEST_METRIC  # never true of NaN
    except OverflowError:  # an int beyond every float
        return False


def _form(array: NDArray[Any]) -> str:
    """Return the text of a sum in errors: its shape, and whether it holds integers or floats."""
    return f"{'floats' if array.dtype == np.float32 else 'integers'} of shape {array.shape}"


def _plus(a: Vector | None, b: Vector | None) -> Vector | None:
    if a is None or b is None:
        return b if a is None else a
    with np.errstate(over="ignore", invalid="ignore"):  # outside a common mask anything may lie
        return a + b


Node = tuple[int, int]
"""(level, index) in the fixed binary tree.

level 0 are the chunks, node (l, i) covers chunks [i·2^l, (i+1)·2^l).
"""


def merge_within(partials: Mapping[Node, Partial]) -> dict[Node, Partial]:
    """Merge those neighbours of one subtree that are present; a worker does so before it returns."""
    nodes = dict(partials)
    level = 0
    while any(n[0] >= level for n in nodes):
        for index in sorted(i for lv, i in nodes if lv == level and i % 2 == 0):
            left, right = (level, index), (level, index + 1)
            if right in nodes:
                nodes[level + 1, index // 2] = nodes.pop(left).merge(nodes.pop(right))
        level += 1
    return nodes


def merge_all(partials: Mapping[Node, Partial], chunks: int) -> Partial:
    """Merge everything along the tree over `chunks` chunks.

    A node without a right neighbour moves up as it is.
    """
    nodes = dict(partials)
    level, width = 0, chunks
    while width > 1:
        if width % 2 and (level, width - 1) in nodes:
            nodes[level + 1, width // 2] = nodes.pop((level, width - 1))
        nodes = merge_within(nodes)
        level, width = level + 1, (width + 1) // 2
    (root,) = nodes.values()
    return root


def cut(cohort: Sequence[int], chunk: int) -> list[tuple[int, ...]]:
    """Cut a sorted cohort into chunks of `chunk` clients, the last one shorter."""
    return [tuple(cohort[i : i + chunk]) for i in range(0, len(cohort), chunk)]


def chunk_size(clients: int, stack: int) -> int:
    """Return the clients of a chunk: at most 16 chunks, which do not cut up stacks of `stack` clients."""
    stacks = -(-clients // stack)
    return max(-(-clients // 16), -(-clients // stacks)) if stack > 1 else -(-clients // 16)


def share(weights: Sequence[float], workers: int) -> list[range]:
    """Deal chunks to workers as contiguous ranges of about equal weight, in order; some may be empty."""
    ends = np.cumsum(weights)
    total = float(ends[-1]) if len(weights) else 0.0
    middles = ends - np.asarray(weights, dtype=float) / 2
    bounds = [int(np.searchsorted(middles, total * w / workers)) for w in range(workers)] + [len(weights)]
    return [range(a, b) for a, b in pairwise(bounds)]


@dataclass(frozen=True)
class CohortUpdate:
    """The folded cohort as the server sees it.

    Args:
        partial: the merged fold.
        records: one for each client that was asked, in order of id, whether or not its update counts.
    """

    partial: Partial
    records: tuple[ClientRecord, ...] = field(default=())

    def mean(self, otherwise: Params | None = None) -> Params:
        """Return the mask-aware mean of the fold; `otherwise` (zeros if None) where no client holds."""
        return self.partial.mean(otherwise)

    def sum(self, name: str) -> torch.Tensor:
        """Return a named sum over the cohort, or raise MethodError with the names there are."""
        if name not in self.partial.sums:
            raise MethodError(
                f"no client sent a sum {name!r}; sent were: {sorted(self.partial.sums) or 'none'}"
            )
        return torch.from_numpy(np.array(self.partial.sums[name]))

    @property
    def each(self) -> Mapping[int, Mapping[str, torch.Tensor]]:
        """Client → the tensors that it sent in `each`."""
        return self.partial.each

    @property
    def updates(self) -> Mapping[int, ClientUpdate]:
        """Client → its model, where the fold keeps them."""
        return self.partial.updates

    @property
    def metrics(self) -> dict[str, float]:
        """Means over the folded clients whose value is finite, weighted as the fold weights them."""
        return {name: total / count for name, (total, count) in self.partial.metrics.items() if count}

    @property
    def unmeasured(self) -> Mapping[str, tuple[int, ...]]:
        """Metric → clients whose value was NaN or infinite, and is not in the mean."""
        return self.partial.unmeasured

    @property
    def folded(self) -> tuple[ClientRecord, ...]:
        """Records of the clients whose update counts."""
        return tuple(r for r in self.records if r.fate == "folded")

    @property
    def num_examples(self) -> int:
        """Examples of the folded clients: Σ n_k."""
        return sum(r.num_examples for r in self.folded)

    @property
    def cost(self) -> Cost:
        """The cost of all asked clients; its seconds are those of the slowest."""
        total = sum((r.cost for r in self.records), Cost())
        return replace(total, seconds=max((r.cost.seconds for r in self.records), default=0.0))
