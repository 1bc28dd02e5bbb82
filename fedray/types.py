"""The types that all rooms share: model, mask, task, update, device, cost, round.

A model is ONE contiguous float32 vector with named views (`Params`), a mask is one bool vector of the same
layout (`Mask`). Aggregation, masking, top-k and shipping are then single operations, and names stay readable
in methods.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b, sha256
from math import isfinite, prod
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from typing_extensions import TypeVar

Density = Annotated[float, Field(gt=0, le=1)]
"""Share of the prunable weights that are kept, in (0, 1]."""
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(gt=0, le=2**63 - 1)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**63 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**64 - 1)]
"""A seed that torch's and NumPy's generators take."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()  # trials and resumed runs work in other directories
    except RuntimeError as error:  # ~user of an unknown user
        raise ValueError(f"must be a path: {error}") from None


LocalPath = Annotated[Path, AfterValidator(_absolute)]
"""A path of a config; validation makes it absolute."""

Direction = Literal["max", "min"]
"""Whether more of a metric is better, or less."""

METRICS: Mapping[str, Direction | None] = {
    "val/accuracy": "max",
    "val/loss": "min",
    "train/loss": "min",
    "test/accuracy": "max",
    "test/loss": "min",
    "density/global": "min",
    "density/client_mean": "min",
    "bytes/up": "min",
    "bytes/down": "min",
    "flops/clients": "min",
    "flops/executed": "min",
    "flops/server": "min",
    "time/simulated_s": "min",
    "time/compute_bound_s": "min",
    "time/network_bound_s": "min",
    "time/server_s": "min",
    "time/wall_s": "min",
    "time/server_wall_s": "min",
    "energy/clients_j": "min",
    "energy/server_j": "min",
    "clients/selected": None,
    "clients/dropped": "min",
    "clients/failed": "min",
    "clients/memory_bytes": "min",
}
"""Metric that every run reports → its better direction, None if it has none.

Costs (bytes, flops, time, energy) also exist as `total/…`. A round also reports `density/asked` if the method
has a target, and the method's own metrics, `train/<name>` and `method/<name>`.
"""

FINAL_METRICS: Mapping[str, Direction] = {
    "clients/accuracy_mean": "max",
    "clients/accuracy_std": "min",
    "clients/accuracy_worst_decile": "max",
}
"""Metric that only the result of a finished run has → its better direction."""


def direction_of(metric: str) -> Direction | None:
    """Return the better direction of a metric, totals included; None if its name does not determine it."""
    name = metric.removeprefix("total/")
    return METRICS.get(name) or FINAL_METRICS.get(name)


@dataclass(frozen=True)
class Layout:
    """The position of each named tensor in a model's flat vector, and whether it is pruned and trained.

    Args:
        names: dotted names, in the order of the vector.
        shapes: shape of each tensor; convolutions are (out, in, kh, kw), linear layers (out, in).
        prunable: whether the tensor's entries may be pruned.
        trainable: False for running statistics, which are averaged but get no gradient.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    prunable: tuple[bool, ...]
    trainable: tuple[bool, ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    @cached_property
    def spans(self) -> dict[str, slice]:
        """Name → its slice of the flat vector."""
        ends = np.cumsum((0, *self.sizes)).tolist()
        return {n: slice(a, b) for n, a, b in zip(self.names, ends, ends[1:], strict=False)}

    @cached_property
    def shape_of(self) -> dict[str, tuple[int, ...]]:
        """Name → shape."""
        return dict(zip(self.names, self.shapes, strict=True))

    @cached_property
    def prunable_names(self) -> tuple[str, ...]:
        """Names of the tensors whose entries may be pruned."""
        return tuple(n for n, p in zip(self.names, self.prunable, strict=True) if p)

    @cached_property
    def prunable_flat(self) -> Tensor:
        """Bool vector (size,), True where an entry may be pruned."""
        return self._spread(self.prunable)

    @cached_property
    def trainable_flat(self) -> Tensor:
        """Bool vector (size,), True where an entry gets a gradient."""
        return self._spread(self.trainable)

    @cached_property
    def prunable_count(self) -> int:
        """Number of prunable entries: the denominator of every density."""
        return sum(s for s, p in zip(self.sizes, self.prunable, strict=True) if p)

    def _spread(self, flags: tuple[bool, ...]) -> Tensor:
        return torch.tensor(flags).repeat_interleave(torch.tensor(self.sizes))

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return name → view into `flat` (size,) in that tensor's shape; nothing is copied."""
        return {n: flat[span].view(self.shape_of[n]) for n, span in self.spans.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the four fields without the cached properties."""
        return {name: self.__dict__[name] for name in ("names", "shapes", "prunable", "trainable")}


@dataclass(frozen=True)
class ChannelGroup:
    """The channels between two layers of a model, and where each of them lies.

    Args:
        name: dotted name of the layer that makes them.
        size: how many there are.
        rows: tensors with one row or entry for each channel: that layer's weight first, then its bias and the
            normalisation behind it.
        columns: the weight that takes them in.
        spread: how many of its columns each channel enters; more than 1 where images are flattened.
    """

    name: str
    size: int
    rows: tuple[str, ...]
    columns: str
    spread: int


class _Flat(Mapping[str, Tensor]):
    """A flat vector with named views: the common part of Params and Mask."""

    dtype: torch.dtype

    def __init__(self, flat: Tensor, layout: Layout) -> None:
        """Wrap `flat` (size,), which is not copied.

        Raises:
            ValueError: if length or dtype do not fit.
        """
        if flat.shape != (layout.size,) or flat.dtype != self.dtype:
            kind = type(self).__name__
            raise ValueError(
                f"{kind}: got {tuple(flat.shape)} of {flat.dtype}, "
                f"the layout needs ({layout.size},) of {self.dtype}"
            )
        self.flat, self.layout = flat, layout

    def __getitem__(self, name: str) -> Tensor:
        return self.flat[self.layout.spans[name]].view(self.layout.shape_of[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.names)

    def __len__(self) -> int:
        return len(self.layout.names)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, _Flat)
        return self.layout == other.layout and torch.equal(self.flat, other.flat)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} tensors, {self.layout.size:,} entries)"

    def clone(self) -> Self:
        """Return a copy that shares nothing."""
        return type(self)(self.flat.clone(), self.layout)


def within(values: Tensor, bound: float) -> bool:
    """Tell whether every entry of a tensor is finite, and none exceeds `bound` in magnitude."""
    if not values.numel() or values.dtype == torch.bool:
        return True
    low, high = (bounds.item() for bounds in values.aminmax())
    return -bound <= low and high <= bound  # never true of NaN


class Params(_Flat):
    """A model's weights: one contiguous float32 vector `.flat` (size,) with named views."""

    dtype = torch.float32

    def masked(self, mask: "Mask") -> "Params":
        """Return a copy with exact zeros wherever `mask` is False, also in place of NaN."""
        out = torch.empty_like(self.flat)
        self.write_masked(mask, out)
        return Params(out, self.layout)

    def write_masked(self, mask: "Mask", out: Tensor) -> None:
        """Write what `masked` returns into a float32 vector (size,)."""
        if mask.is_full:  # its bits would take as much memory as the weights
            out.copy_(self.flat)
            return
        # an `and` of the bits; torch.where takes ten times as long if the mask is scattered
        torch.bitwise_and(self.flat.view(torch.int32), mask.bits, out=out.view(torch.int32))

    def is_finite(self) -> bool:
        """Tell whether every entry of the vector is finite."""
        # one pass without a temporary; if the sum of finite values overflows, each is checked
        return isfinite(float(self.flat.sum())) or bool(torch.isfinite(self.flat).all())

    def within(self, bound: float) -> bool:
        """Tell whether every entry is finite, and none exceeds `bound` (at least 2·10¹⁹) in magnitude."""
        # one pass without a temporary: only weights beyond 1.8·10¹⁹ make the sum of squares overflow
        if isfinite(float(torch.dot(self.flat, self.flat))):
            return True
        return within(self.flat, bound)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the little-endian bytes of the vector, as in `result.json`."""
        return sha256(np.ascontiguousarray(self.flat.numpy(), dtype="<f4").tobytes()).hexdigest()


class Mask(_Flat):
    """Which entries a model holds: one bool vector `.flat` (size,). Treat it as immutable.

    A server's mask is True on everything that is not prunable, except in channels that it removed as a whole.
    An update's mask marks the entries that count in the mean; it may be False anywhere.
    """

    dtype = torch.bool

    @classmethod
    def full(cls, layout: Layout) -> "Mask":
        """Return the mask that holds everything."""
        return cls(torch.ones(layout.size, dtype=torch.bool), layout)

    @classmethod
    def none(cls, layout: Layout) -> "Mask":
        """Return the mask that holds nothing, for an update without weights."""
        return cls(torch.zeros(layout.size, dtype=torch.bool), layout)

    @cached_property
    def packed(self) -> bytes:
        """The mask at one bit per entry, first entry in the highest bit."""
        return np.packbits(self.flat.numpy()).tobytes()

    @cached_property
    def digest(self) -> bytes:
        """Eight bytes that identify this mask; a payload without positions refers to it by them."""
        return blake2b(self.packed, digest_size=8).digest()

    @cached_property
    def bits(self) -> Tensor:
        """Int32 (size,), all bits set where an entry is held and none elsewhere."""
        return self.flat.to(torch.int32).neg_()

    @cached_property
    def count(self) -> int:
        """Number of entries held, prunable or not."""
        return int(np.count_nonzero(self.flat.numpy()))  # torch's takes five times as long

    @cached_property
    def is_full(self) -> bool:
        """Whether everything is held."""
        return self.count == self.layout.size

    @cached_property
    def density(self) -> float:
        """Share of the *prunable* entries that are held, in [0, 1]; 1 where nothing is prunable."""
        prunable = self.layout.prunable_count
        kept = int(np.count_nonzero((self.flat & self.layout.prunable_flat).numpy()))
        return kept / prunable if prunable else 1.0

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the vector and the layout without the cached properties."""
        return {"flat": self.flat, "layout": self.layout}


Exploits = Literal["nothing", "structured", "unstructured"]
"""Which zeros a device can skip: none, whole rows and channels, or any."""


@dataclass(frozen=True)
class DeviceProfile:
    """A simulated device on its link.

    Args:
        name: as in the table of devices.
        flops_per_s: sustained float32 FLOP/s while training, > 0.
        downlink_bytes_per_s: server → device, > 0.
        uplink_bytes_per_s: device → server, > 0.
        latency_s: added once to each exchange, ≥ 0.
        memory_bytes: memory for training, > 0.
        availability: probability that the device can be asked in a round, in (0, 1].
        dropout: probability that an asked device never answers, in [0, 1).
        exploits: which zeros of a mask make it faster.
        sources: field → source of its number, with a date.
        step_s: seconds of a step of SGD beside its FLOPs, ≥ 0.
        round_s: seconds of an exchange beside its steps and its bytes, ≥ 0.
        compute_w: watts while it computes, ≥ 0; 0 where they are unknown.
        idle_w: watts while it waits for bytes, ≥ 0.
        down_j_per_byte: joules of a byte received, ≥ 0, beside those of idling.
        up_j_per_byte: joules of a byte sent.
    """

    name: str
    flops_per_s: float
    downlink_bytes_per_s: float
    uplink_bytes_per_s: float
    latency_s: float
    memory_bytes: float
    availability: float = 1.0
    dropout: float = 0.0
    exploits: Exploits = "structured"
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    step_s: float = 0.0
    round_s: float = 0.0
    compute_w: float = 0.0
    idle_w: float = 0.0
    down_j_per_byte: float = 0.0
    up_j_per_byte: float = 0.0


@dataclass(frozen=True)
class ClientInfo:
    """The server's knowledge of a client: its number of examples and its device."""

    id: int
    num_examples: int
    profile: DeviceProfile


@dataclass(frozen=True)
class Cost:
    """Bytes, FLOPs, steps, seconds and joules. The pool and the client's meter fill it, never a method.

    Args:
        bytes_down: bytes of the encoded payloads, server → client.
        bytes_up: bytes of the encoded payloads, client → server.
        flops: FLOPs of training and scoring, counting only unmasked weights (the theoretical count).
        executed_flops: FLOPs that the device runs; it skips only some zeros.
        seconds: simulated seconds on the device's clock.
        steps: batches of which the device took a gradient.
        energy_j: joules that the device and its link take.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    flops: float = 0.0
    executed_flops: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    energy_j: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        """Add field by field; seconds too, as of consecutive work."""
        return Cost(
            self.bytes_down + other.bytes_down,
            self.bytes_up + other.bytes_up,
            self.flops + other.flops,
            self.executed_flops + other.executed_flops,
            self.seconds + other.seconds,
            self.steps + other.steps,
            self.energy_j + other.energy_j,
        )


Extra = bool | int | float | str | Tensor
"""A value that travels with a model; it is encoded, and its bytes are counted."""


E = TypeVar("E")


def expect(value: object, kind: type[E], what: str) -> E:
    """Return a value if it is of a type.

    Raises:
        TypeError: otherwise, with both types; `what` names the value.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


@dataclass(frozen=True)
class Task:
    """Server → client: a model, the mask it is held under, and named extras."""

    params: Params
    mask: Mask
    extras: Mapping[str, Extra] = field(default_factory=dict)

    def extra(self, name: str, kind: type[E]) -> E:
        """Return an extra of a type: bool, int, float, str or Tensor.

        Raises:
            KeyError: if the task has no such extra; ask by `name in task.extras`.
            TypeError: if it is of another type.
        """
        return expect(self.extras[name], kind, f"the extra {name!r}")


@dataclass(frozen=True)
class ClientUpdate:
    """Client → server: WEIGHTS, not deltas.

    Args:
        params: the trained weights; only entries under `mask` are sent.
        mask: the entries that the client sends, and that count in the mean.
        sums: named vectors or numbers that the server gets as sums over the cohort.
        each: named tensors that the server gets for each client.
        metrics: named numbers for the report, e.g. `loss`; averaged over the cohort by examples. One that is
            not finite is left out of its mean.
    """

    params: Params
    mask: Mask
    sums: Mapping[str, Tensor] = field(default_factory=dict)
    each: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


Fate = Literal["folded", "late", "dropped", "failed", "malformed", "non-finite", "too-large"]
"""The fate of an update: only `folded` ones count in the mean. `failed`: the client's code raised."""

FAULTS: tuple[Fate, ...] = ("failed", "malformed", "non-finite", "too-large")
"""Fates that neither a device nor a deadline explains: `clients.max_failed` limits them."""


@dataclass(frozen=True)
class Fault:
    """A client that was asked and sent no update that can be used.

    Args:
        client: its id.
        fate: one of FAULTS.
        cause: in one line.
        traceback: of its code, if it raised.
    """

    client: int
    fate: Fate
    cause: str
    traceback: str = ""


@dataclass(frozen=True)
class ClientRecord:
    """One client in one round: a row of `clients.parquet`."""

    client: int
    device: str
    num_examples: int
    fate: Fate
    cost: Cost
    density: float
    loss: float
    memory_bytes: int = 0


M = TypeVar("M", default=Any)
"""Type of a method's memory: its frozen dataclass, or None."""
M_co = TypeVar("M_co", default=Any, covariant=True)


@dataclass(frozen=True)
class ServerState(Generic[M_co]):
    """Everything of the server that survives a round; a checkpoint holds it.

    Args:
        round: the same number in every hook of a round; advances after the report.
        params: the weights. Values behind the mask may stay (shadow weights); the server sends, evaluates
            and saves `params ⊙ mask`.
        mask: True on everything that is not prunable.
        memory: of the method; None before its `setup`.
    """

    round: int
    params: Params
    mask: Mask
    memory: M_co = None  # type: ignore[assignment]  # until `setup`


@dataclass(frozen=True)
class RoundReport:
    """The metrics, client records and notes of a round.

    Args:
        round: 1 for the first. Round 0 is the set-up (initial pruning, exploration, server pre-training).
        metrics: names of METRICS (and their totals) → value. `val/…` only where the round was evaluated.
        clients: a record for each client of the cohort, in order of id.
        notes: remarks for the reader of the run, e.g. updates that were left out.
        faults: clients that failed, in the training and in every other exchange.
    """

    round: int
    metrics: Mapping[str, float]
    clients: tuple[ClientRecord, ...] = ()
    notes: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()
