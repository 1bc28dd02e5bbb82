"""How a model crosses the wire: (params, mask, extras) → bytes, and back. A run is charged their length.

    header 32 B │ values of the held entries │ which entries are held │ extras

Values are `fp32` (bit for bit), `fp16`, or `int8` (one byte each, and a scale and zero point per tensor).
Values in vectors (biases, normalisation) may stay `fp32`. Positions are written in the smallest of these
forms:

    dense     nothing: every entry is held
    known     8 bytes: the digest of a mask that the receiver holds already ("values only")
    bitmap    one bit per entry of the model
    gaps      one or two bytes per held entry: its distance to the one before; 0 means "advance by the
              largest distance, no entry is held there"
    runs      the same for the entries at which held and not held alternate: rows, channels, whole layers

A mask that holds nothing (a client that stays silent) is a header only. All numbers are little endian.
Decoding reads numbers and JSON, never code; any other payload is a WireError. `extras.py` writes extras.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from struct import Struct
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch

from fedray.costs.extras import decode_extras, encode_extras, extras_size
from fedray.errors import ConfigError, WireError, unknown
from fedray.types import Extra, Layout, Mask, Params

ValueKind = Literal["fp32", "fp16", "int8"]
"""How one weight is written: exactly, as an IEEE half, or as one byte of its tensor's range."""

_Array = npt.NDArray[Any]

_VALUES: tuple[ValueKind, ...] = get_args(ValueKind)
_VALUE_BYTES: Mapping[ValueKind, int] = {"fp32": 4, "fp16": 2, "int8": 1}
_POSITIONS = ("dense", "known", "bitmap", "gaps u8", "gaps u16", "runs u8", "runs u16")
_DENSE, _KNOWN, _BITMAP, *_ = range(len(_POSITIONS))
_GAPS = {3: "u1", 4: "<u2"}
_RUNS = {5: "u1", 6: "<u2"}

_MAGIC, _VERSION = b"FRAY", 1
_EXACT_VECTORS = 128  # added to the value kind
_COUNT = Struct("<I")
_HEADER = Struct("<4sHBBQQQ")  # magic, version, value kind, position kind, entries, held, bytes of extras
HEADER_BYTES = _HEADER.size
DIGEST_BYTES = 8
_AFFINE_BYTES = 5  # per tensor: scale (float32) and zero point (uint8)
_HALF_MAX = 65504.0
_FLOAT_MAX = np.finfo(np.float32).max

_CACHED_MASKS = 1024
_POSITIONS_BYTES: dict[tuple[bytes, int, bool], int] = {}  # digest, length, whether it is known → bytes
_LAST_INDEX: dict[bytes, _Array] = {}  # digest of the recurring mask used last → where it is True


@dataclass(frozen=True)
class Decoded:
    """The contents of a payload.

    Args:
        params: the values where `mask` is True, exact zeros elsewhere.
        mask: which entries travelled; the receiver's own object where the payload named it by its digest.
        extras: what travelled beside the model, with equal Python types.
    """

    params: Params
    mask: Mask
    extras: Mapping[str, Extra]


@dataclass(frozen=True)
class Codec:
    """Turns a model into the bytes that cross the wire, and back.

    Args:
        values: how a weight is written.
            `fp32`: 4 bytes, bit for bit (also NaN payloads, −0 and denormals).
            `fp16`: 2 bytes, rounded to nearest even; a finite weight beyond ±65504 becomes ±65504, not inf.
            `int8`: 1 byte, affine over the held entries of each tensor as in FL-PQSU (IEEE Access 2021),
            over a range that includes 0; |x − x̂| ≤ scale = range / 255. A tensor that holds NaN or infinity
            arrives as NaN in all its held entries, so that the server sees it and leaves the update out.
        exact_vectors: whether tensors of one dimension (biases, normalisation and its running statistics)
            always travel in `fp32`. They are few, and a small variance rounded to 0 ruins the model.

    Raises:
        ConfigError: for an unknown kind of values.
    """

    values: ValueKind = "fp32"
    exact_vectors: bool = False

    def __post_init__(self) -> None:
        if self.values not in _VALUES:
            raise ConfigError(unknown("values of a codec", self.values, _VALUES))

    @property
    def lossless(self) -> bool:
        """Whether the held weights arrive bit for bit."""
        return self.values == "fp32"

    @property
    def _apart(self) -> bool:
        """Whether vectors are written apart from the rest."""
        return self.exact_vectors and not self.lossless

    def encode(
        self, params: Params, mask: Mask, *, known: bytes | None = None, extras: Mapping[str, Extra] = {}
    ) -> bytes:
        """Write the entries of `params` under `mask`.

        Args:
            params: the weights, float32 (n,).
            mask: which of them travel, bool (n,).
            known: digest of the mask that the receiver holds; where it is this one, positions shrink to the
                digest (unless they are smaller still: a full mask needs none).
            extras: what travels beside the model; see `encode_extras`.

        Returns:
            A payload of exactly `size(mask, known=known, extras=extras)` bytes.

        Raises:
            ValueError: if params and mask differ in length.
            MethodError: for an extra that cannot travel.
        """
        if params.layout.size != mask.layout.size:
            raise ValueError(f"params have {params.layout.size} entries, the mask has {mask.layout.size}")
        flat = params.flat.numpy()
        index = None if mask.is_full else _index(mask, recurring=_is_known(mask, known))
        pack = _pack_apart if self._apart else _pack
        values = pack(self.values, flat if index is None else flat.take(index), index, mask.layout)
        positions, where = _positions(mask, known, index)
        beside = encode_extras(extras)
        kind = _VALUES.index(self.values) + _EXACT_VECTORS * self._apart
        header = _HEADER.pack(_MAGIC, _VERSION, kind, positions, mask.layout.size, mask.count, len(beside))
        return b"".join((header, *values, where, beside))  # the one copy of the values

    def size(self, mask: Mask, *, known: bytes | None = None, extras: Mapping[str, Extra] = {}) -> int:
        """Return the length in bytes of `encode(…)` for any weights under this mask without encoding them."""
        exact = _held_in_vectors(mask) if self._apart else None
        values_bytes = _values_bytes(self.values, mask.count, mask.layout, exact)
        return HEADER_BYTES + values_bytes + _positions_bytes(mask, known) + extras_size(extras)

    def decode(self, payload: bytes, layout: Layout, *, known: Mapping[bytes, Mask] = {}) -> Decoded:
        """Read a payload. Its header says how values are written: any codec reads what any other wrote.

        Args:
            payload: what `encode` returned.
            layout: of the model that the receiver expects.
            known: digest → mask, for the masks that the receiver holds.

        Raises:
            WireError: if this is not a whole payload for this layout, or names a mask that is not in `known`.
        """
        header = _read_header(payload, layout)
        rest = memoryview(payload)[HEADER_BYTES:]
        exact = _read_exact(header, rest)
        values_bytes = _values_bytes(header.values, header.held, layout, exact)
        _expect(
            values_bytes + header.extras_bytes <= len(rest),
            "bytes after the header",
            len(rest),
            f"{values_bytes} of values and {header.extras_bytes} of extras: it is truncated",
        )
        # every length is known to fit the buffer, or the layout, before anything is allocated from it
        split = len(rest) - header.extras_bytes
        mask, index = _read_positions(header, rest[values_bytes:split], layout, known)
        unpack = _unpack if exact is None else _unpack_apart
        values = unpack(header.values, rest[:values_bytes], index, layout)
        if index is not None:
            flat = np.zeros(layout.size, "<f4")
            flat[index] = values
            values = flat
        extras = decode_extras(bytes(rest[split:]))
        return Decoded(Params(torch.from_numpy(values), layout), mask, extras)


def encode_mask(mask: Mask, known: bytes | None = None) -> bytes:
    """Write a mask without values: the number of its entries, and their positions in the smallest form.

    Args:
        mask: bool (n,).
        known: digest of the mask that the receiver holds.
    """
    kind, positions = _positions(mask, known)
    return _COUNT.pack(mask.count) + bytes([kind]) + positions


def mask_size(mask: Mask, known: bytes | None = None) -> int:
    """Return the length in bytes of `encode_mask`."""
    return _COUNT.size + 1 + _positions_bytes(mask, known)


def decode_mask(data: bytes, layout: Layout, known: Mapping[bytes, Mask]) -> Mask:
    """Read what `encode_mask` wrote.

    Raises:
        WireError: if this is not a whole mask for this layout, or names a mask that `known` lacks.
    """
    _expect(len(data) > _COUNT.size, "bytes of a mask", len(data), f"more than {_COUNT.size}")
    held, kind = _COUNT.unpack_from(data)[0], data[_COUNT.size]
    _expect(kind < len(_POSITIONS), "kind of positions", kind, f"below {len(_POSITIONS)}")
    _expect(held <= layout.size, "held entries", held, f"at most {layout.size}")
    header = _Header("fp32", False, kind, held, 0)
    return _read_positions(header, memoryview(data)[_COUNT.size + 1 :], layout, known)[0]


class _Header(NamedTuple):
    values: ValueKind
    exact_vectors: bool
    positions: int
    held: int
    extras_bytes: int


def _expect(ok: bool, what: str, found: object, expected: object) -> None:
    if not ok:
        raise WireError(f"payload, {what}: found {found}, expected {expected}")


def _read_header(payload: bytes, layout: Layout) -> _Header:
    _expect(len(payload) >= HEADER_BYTES, "bytes", len(payload), f"{HEADER_BYTES} of header: it is truncated")
    magic, version, values, positions, entries, held, extras_bytes = _HEADER.unpack_from(payload)
    _expect(magic == _MAGIC, "magic", magic, _MAGIC)
    _expect(version == _VERSION, "version", version, _VERSION)
    apart, kind = divmod(values, _EXACT_VECTORS)
    _expect(kind < len(_VALUES), "kind of values", values, f"below {len(_VALUES)}")
    _expect(positions < len(_POSITIONS), "kind of positions", positions, f"below {len(_POSITIONS)}")
    _expect(entries == layout.size, "entries of the model", entries, f"{layout.size} as in the layout")
    _expect(held <= entries, "held entries", held, f"at most {entries}")
    return _Header(_VALUES[kind], bool(apart), positions, held, extras_bytes)


def _is_known(mask: Mask, known: bytes | None) -> bool:
    return known is not None and known == mask.digest


def _positions(mask: Mask, known: bytes | None, index: _Array | None = None) -> tuple[int, bytes]:
    """Return kind and bytes of the smallest form of a mask; `index` is where it is True, if known."""
    if mask.is_full:
        return _DENSE, b""
    best = _BITMAP, mask.packed
    if _is_known(mask, known) and len(mask.packed) > DIGEST_BYTES:
        best = _KNOWN, mask.digest
    if mask.count < len(best[1]):  # each gap takes a byte or more
        best = _smallest(best, _GAPS, _index(mask) if index is None else index)
    turns = np.diff(mask.flat.numpy(), prepend=False)
    if np.count_nonzero(turns) < len(best[1]):
        best = _smallest(best, _RUNS, np.flatnonzero(turns))
    return best


def _positions_bytes(mask: Mask, known: bytes | None) -> int:
    """Return the length of the bytes of `_positions`; cached, since clients share few masks."""
    key = mask.digest, mask.layout.size, _is_known(mask, known)  # a digest is of whole bytes
    if key not in _POSITIONS_BYTES:
        if len(_POSITIONS_BYTES) >= _CACHED_MASKS:
            del _POSITIONS_BYTES[next(iter(_POSITIONS_BYTES))]  # the oldest
        _POSITIONS_BYTES[key] = len(_positions(mask, known)[1])
    return _POSITIONS_BYTES[key]


def _smallest(best: tuple[int, bytes], kinds: Mapping[int, str], index: _Array) -> tuple[int, bytes]:
    for kind, dtype in kinds.items():
        gaps = _pack_gaps(index, dtype, below_bytes=len(best[1]))
        if gaps is not None:
            best = kind, gaps
    return best


def _read_positions(
    header: _Header, data: memoryview, layout: Layout, known: Mapping[bytes, Mask]
) -> tuple[Mask, _Array | None]:
    """Return the mask and the indices it holds (None: all)."""
    if header.positions == _DENSE:
        _expect(len(data) == 0, "bytes of positions", len(data), "none, since it is dense")
        _expect(header.held == layout.size, "held entries", header.held, f"{layout.size}, since it is dense")
        return Mask.full(layout), None
    if header.positions == _KNOWN:
        _expect(len(data) == DIGEST_BYTES, "bytes of a mask's digest", len(data), DIGEST_BYTES)
        mask = known.get(bytes(data))
        names = ", ".join(digest.hex() for digest in known) or "none"
        if mask is None or mask.layout.size != layout.size:
            raise WireError(f"payload, values only: found mask {data.hex()}, the receiver holds: {names}")
        index = _index(mask, recurring=True)
    elif header.positions in _GAPS:
        index = _unpack_gaps(data, _GAPS[header.positions], layout.size)
        bits = np.zeros(layout.size, np.bool_)
        bits[index] = True
        mask = Mask(torch.from_numpy(bits), layout)
    else:
        read = _read_bitmap if header.positions == _BITMAP else _read_runs
        mask = Mask(torch.from_numpy(read(header, data, layout)), layout)
        index = _index(mask)
    _expect(index.size == header.held, "positions", index.size, f"{header.held} as in the header")
    return mask, index


def _read_bitmap(header: _Header, data: memoryview, layout: Layout) -> _Array:
    _expect(len(data) == -(-layout.size // 8), "bytes of the bitmap", len(data), -(-layout.size // 8))
    return np.unpackbits(np.frombuffer(data, "u1"), count=layout.size).view(np.bool_)


def _read_runs(header: _Header, data: memoryview, layout: Layout) -> _Array:
    turns = _unpack_gaps(data, _RUNS[header.positions], layout.size)
    lengths = np.diff(turns, prepend=0, append=layout.size)  # not held, held, not held, …
    return np.repeat(np.arange(lengths.size) % 2 == 1, lengths)


def _index(mask: Mask, recurring: bool = False) -> _Array:
    """Return where `mask` is True; cached for the last `recurring` mask.

    If all clients share a mask, this is most of the work of encoding and decoding values only.
    """
    if not recurring:
        return np.flatnonzero(mask.flat.numpy())
    index = _LAST_INDEX.get(mask.digest)
    if index is None:
        index = np.flatnonzero(mask.flat.numpy())
        _LAST_INDEX.clear()
        _LAST_INDEX[mask.digest] = index
    return index


def _pack_gaps(index: _Array, dtype: str, below_bytes: int) -> bytes | None:
    """Code the distance of each index to the one before; None where that takes `below_bytes` or more."""
    distances = np.diff(index, prepend=-1)  # ≥ 1, so that 0 is free for "advance by `reach`"
    reach = int(np.iinfo(dtype).max)
    advances = (distances - 1) // reach
    codes = index.size + int(advances.sum())
    if codes * np.dtype(dtype).itemsize >= below_bytes:
        return None
    if codes == index.size:
        return distances.astype(dtype).tobytes()
    gaps = np.zeros(codes, dtype)
    gaps[np.arange(index.size) + np.cumsum(advances)] = distances - reach * advances
    return gaps.tobytes()


def _unpack_gaps(data: memoryview, dtype: str, entries: int) -> _Array:
    width = np.dtype(dtype).itemsize
    _expect(len(data) % width == 0, "bytes of gaps", len(data), f"a multiple of {width}")
    gaps = np.frombuffer(data, dtype)
    kept = gaps != 0
    ends = np.cumsum(np.where(kept, gaps, np.iinfo(dtype).max), dtype=np.int64)
    if gaps.size:
        _expect(ends[-1] <= entries, "end of the gaps", ends[-1], f"at most {entries}")
        _expect(kept[-1], "last gap", "an advance", "a distance")
    index: _Array = ends[kept] - 1
    return index


def _read_exact(header: _Header, rest: memoryview) -> int | None:
    """Return how many entries are written exactly; None if the values are not in two parts."""
    if not header.exact_vectors or not header.held:
        return None
    _expect(len(rest) >= _COUNT.size, "bytes after the header", len(rest), "a count: it is truncated")
    exact: int = _COUNT.unpack_from(rest)[0]
    _expect(exact <= header.held, "exact entries", exact, f"at most {header.held}")
    return exact


def _values_bytes(kind: ValueKind, held: int, layout: Layout, exact: int | None = None) -> int:
    """Return the bytes of `held` values, `exact` of them (None: all are of one kind) apart in fp32."""
    if exact is not None and held:
        return _COUNT.size + 4 * exact + _values_bytes(kind, held - exact, layout)
    affine = _AFFINE_BYTES * len(layout.names) if kind == "int8" and held else 0
    return _VALUE_BYTES[kind] * held + affine


def _pack(kind: ValueKind, values: _Array, index: _Array | None, layout: Layout) -> tuple[memoryview, ...]:
    """Return the buffers of the held `values` float32 (held,), which stand at `index` (None: everywhere)."""
    if kind == "fp32":
        return (np.ascontiguousarray(values, "<f4").data,)
    if kind == "fp16":
        # torch converts halves some 25 times as fast as numpy
        half = torch.from_numpy(values).clamp(-_HALF_MAX, _HALF_MAX).half().numpy()
        infinite = np.isinf(values)
        half[infinite] = values[infinite]
        return (half.astype("<f2", copy=False).data,)
    if values.size == 0:
        return ()
    scales, zeros = np.zeros(len(layout.names), "<f4"), np.zeros(len(layout.names), "u1")
    codes = np.zeros(values.size, "u1")
    for tensor, span in _held_spans(index, layout):
        scales[tensor], zeros[tensor] = _affine(values[span])
        if scales[tensor] > 0:  # neither all zeros nor NaN
            scaled = values[span] / scales[tensor] + zeros[tensor]
            codes[span] = np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled)
    return scales.data, zeros.data, codes.data


def _unpack(kind: ValueKind, data: memoryview, index: _Array | None, layout: Layout) -> _Array:
    """Return the held values as a new float32 array (held,)."""
    if kind == "fp32":
        return np.frombuffer(data, "<f4").copy()
    if kind == "fp16":
        return torch.from_numpy(np.frombuffer(data, "<f2").copy()).float().numpy()
    if len(data) == 0:
        return np.zeros(0, "<f4")
    tensors = len(layout.names)
    scales, zeros = np.frombuffer(data, "<f4", tensors), np.frombuffer(data, "u1", tensors, 4 * tensors)
    values = np.frombuffer(data, "u1", offset=_AFFINE_BYTES * tensors).astype("<f4")
    with np.errstate(over="ignore", invalid="ignore"):  # a scale of NaN is meant
        for tensor, span in _held_spans(index, layout):
            values[span] -= zeros[tensor]
            values[span] *= scales[tensor]
    # half a step beyond the largest weight may be beyond the largest float
    return np.clip(values, -_FLOAT_MAX, _FLOAT_MAX, out=values)


def _in_vectors(index: _Array | None, layout: Layout) -> _Array:
    """Return whether each held entry is in a tensor of one dimension (or none), bool (held,)."""
    flags = np.repeat([len(shape) < 2 for shape in layout.shapes], layout.sizes)
    return flags if index is None else flags[index]


def _held_in_vectors(mask: Mask) -> int:
    return sum(
        int(mask[name].count_nonzero()) for name, shape in mask.layout.shape_of.items() if len(shape) < 2
    )


def _pack_apart(
    kind: ValueKind, values: _Array, index: _Array | None, layout: Layout
) -> tuple[memoryview, ...]:
    """Return the number of values in vectors, these values in fp32, and the buffers of all others."""
    if values.size == 0:
        return ()
    vector = _in_vectors(index, layout)
    exact = np.ascontiguousarray(values[vector], "<f4")
    rest = np.flatnonzero(~vector) if index is None else index[~vector]
    return memoryview(_COUNT.pack(exact.size)), exact.data, *_pack(kind, values[~vector], rest, layout)


def _unpack_apart(kind: ValueKind, data: memoryview, index: _Array | None, layout: Layout) -> _Array:
    """Return the held values as a new float32 array (held,)."""
    vector = _in_vectors(index, layout)
    exact: int = _COUNT.unpack_from(data)[0]
    found = int(np.count_nonzero(vector))
    _expect(exact == found, "exact entries", exact, f"{found}, as many as are held in vectors")
    split = _COUNT.size + 4 * exact
    rest = np.flatnonzero(~vector) if index is None else index[~vector]
    values = np.empty(vector.size, "<f4")
    values[vector] = np.frombuffer(data[_COUNT.size : split], "<f4")
    values[~vector] = _unpack(kind, data[split:], rest, layout)
    return values


def _held_spans(index: _Array | None, layout: Layout) -> Iterator[tuple[int, slice]]:
    """Yield (number of the tensor, where its held entries are among all held), for tensors that hold any."""
    bounds = np.cumsum((0, *layout.sizes))
    held = bounds if index is None else np.searchsorted(index, bounds)
    for tensor, (start, stop) in enumerate(pairwise(held.tolist())):
        if start < stop:
            yield tensor, slice(start, stop)


def _affine(values: _Array) -> tuple[np.float32, int]:
    """Return FL-PQSU's scale and zero point of `values` (k ≥ 1,); the scale is NaN if one is not finite.

    The range includes 0 (theirs may not, which destroys the tensor). The scale is rounded up, so that the
    range fits into 255 steps even at the limits of float32. The zero point is truncated to an integer, as in
    their code.
    """
    with np.errstate(invalid="ignore"):
        smallest, largest = float(values.min()), float(values.max())
    if not (isfinite(smallest) and isfinite(largest)):
        return np.float32("nan"), 0
    low, high = min(smallest, 0.0), max(largest, 0.0)
    exact = (high - low) / 255
    scale = np.float32(exact)
    if float(scale) < exact:
        scale = np.nextafter(scale, _FLOAT_MAX)
    return scale, int(-low * 255 / (high - low)) if scale > 0 else 0
