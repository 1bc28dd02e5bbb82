"""The largest entries of a difference: exact, or all of one size with a sign (sparse ternary compression)."""

from dataclasses import dataclass
from math import floor, log, log2, sqrt
from struct import Struct
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from fedray.costs.codec import Codec, ValueKind
from fedray.costs.delta import DeltaCodec
from fedray.errors import WireError
from fedray.shares import ceil_of
from fedray.types import Mask, Params

Share = Annotated[float, Field(gt=0, le=1)]

_Array = npt.NDArray[Any]
_TERNARY = Struct("<If")  # number of entries, and their size
_GOLDEN = (1 + sqrt(5)) / 2


def largest(values: _Array, share: float) -> _Array:
    """Return where the ⌈share · n⌉ entries of largest magnitude are, in order; of equal ones the first.

    Args:
        values: float32 (n,), n ≥ 1. NaN counts as infinite: the server must see it.
        share: in (0, 1].
    """
    size = np.nan_to_num(np.abs(values), nan=np.inf)
    count = ceil_of(share, len(values))
    least = np.partition(size, len(size) - count)[len(size) - count]
    above, equal = np.flatnonzero(size > least), np.flatnonzero(size == least)
    return np.sort(np.concatenate((above, equal[: count - len(above)])))


@dataclass(frozen=True, kw_only=True)
class TopK(DeltaCodec):
    """Sends the largest entries of the difference: their positions and values.

    Args:
        share: share of the update's entries that are sent, rounded up.
        values: bytes of an entry's value, as in `method.uplink_values`.
        feedback: add the entries that were not sent to the client's next difference; the device keeps them.
    """

    citation: ClassVar[str] = "Stich et al., NeurIPS 2018; Karimireddy et al., ICML 2019"

    share: Share = 0.01
    values: ValueKind = "fp32"

    def encode(self, difference: Params, mask: Mask) -> bytes:
        """Write the entries of largest magnitude; of equal ones those that come first."""
        held = torch.nonzero(mask.flat).flatten()
        chosen = torch.zeros(mask.layout.size, dtype=torch.bool)
        chosen[held[torch.from_numpy(largest(difference.flat[held].numpy(), self.share))]] = True
        return Codec(self.values).encode(difference, Mask(chosen, mask.layout))

    def decode(self, payload: bytes, mask: Mask) -> Params:
        """Return the entries that were sent, zeros elsewhere."""
        return Codec().decode(payload, mask.layout).params

    def size(self, mask: Mask) -> int:
        """Return the length for entries that are spread evenly over the mask."""
        held = torch.nonzero(mask.flat).flatten()
        count = ceil_of(self.share, len(held))
        chosen = torch.zeros(mask.layout.size, dtype=torch.bool)
        chosen[held[torch.arange(count) * len(held) // max(count, 1)]] = True
        return Codec(self.values).size(Mask(chosen, mask.layout))


@dataclass(frozen=True, kw_only=True)
class STC(DeltaCodec):
    """Sends the signs of the largest entries of the difference, one size for all, and coded positions.

    Sparse ternary compression. Positions are Golomb codes of the distances between entries, counted over the
    update's own entries, so that a pruned model has shorter ones.

    Args:
        share: share of the update's entries that are sent, rounded up; entries that are zero are left out.
        feedback: add what was not sent to the client's next difference; the device keeps it.
    """

    citation: ClassVar[str] = "Sattler et al., TNNLS 2020"

    share: Share = 0.01

    def encode(self, difference: Params, mask: Mask) -> bytes:
        """Write number, mean magnitude, positions and signs of the largest entries."""
        values = difference.flat.numpy()[mask.flat.numpy()]
        chosen = largest(values, self.share)
        chosen = chosen[values[chosen] != 0]
        sent = values[chosen]
        size = float(np.abs(sent).mean(dtype=np.float64)) if len(sent) else 0.0
        bits = golomb(np.diff(chosen, prepend=-1) - 1, width_of(len(chosen), len(values)))
        packed = np.packbits(np.concatenate((bits, sent < 0)))
        return _TERNARY.pack(len(chosen), size) + packed.tobytes()

    def decode(self, payload: bytes, mask: Mask) -> Params:
        """Return ± the mean magnitude where entries were sent, zeros elsewhere.

        Raises:
            WireError: if the payload is not whole.
        """
        if len(payload) < _TERNARY.size:
            raise WireError(f"payload of signs: {len(payload)} bytes, at least {_TERNARY.size} expected")
        (count, size), held = _TERNARY.unpack_from(payload), mask.count
        if count > held:
            raise WireError(f"payload of signs: {count} entries, and the mask holds {held}")
        bits = np.unpackbits(np.frombuffer(payload, "u1", offset=_TERNARY.size))
        gaps, used = read_golomb(bits, count, width_of(count, held), held)
        if len(payload) != _TERNARY.size - (-(used + count) // 8):
            raise WireError(f"payload of signs: {len(payload)} bytes, which is not its length")
        chosen = np.cumsum(gaps + 1) - 1
        if count and chosen[-1] >= held:
            raise WireError(f"payload of signs: entry {chosen[-1]}, and the mask holds {held}")
        values = np.zeros(held, "<f4")
        values[chosen] = np.where(bits[used : used + count] == 1, -size, size)
        flat = torch.zeros(mask.layout.size)
        flat[mask.flat] = torch.from_numpy(values)
        return Params(flat, mask.layout)

    def size(self, mask: Mask) -> int:
        """Return the expected length: entries are sent anywhere with equal probability."""
        held = mask.count
        count = ceil_of(self.share, held)
        return _TERNARY.size - int(-count * (expected_bits(count, held) + 1) // 8)


def width_of(count: int, of: int) -> int:
    """Return b*, the bits of a Golomb code's remainder, for `count` entries among `of`.

    b* = 1 + ⌊log₂(ln(φ − 1) / ln(1 − p))⌋ with p = count / of and the golden ratio φ; at least 0.
    """
    if not 0 < count < of:
        return 0
    return max(0, 1 + floor(log2(log(_GOLDEN - 1) / log(1 - count / of))))


def expected_bits(count: int, of: int) -> float:
    """Return the expected bits of a position, b* + 1 / (1 − (1 − p)^(2^b*))."""
    width = width_of(count, of)
    return width + 1 / (1 - (1 - count / of) ** 2**width) if count else 0.0


def golomb(gaps: _Array, width: int) -> _Array:
    """Return bits (0 or 1) of gaps ≥ 0: of each ⌊gap / 2^width⌋ ones and a zero, then all remainders.

    A code as usual, but with quotients and remainders apart, which takes as many bits.
    """
    quotients = gaps >> width
    unary = np.ones(int(quotients.sum()) + len(gaps), np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 0
    shifts = np.arange(width - 1, -1, -1)
    return np.concatenate((unary, ((gaps[:, None] >> shifts) & 1).astype(np.uint8).ravel()))


def read_golomb(bits: _Array, count: int, width: int, most: int) -> tuple[_Array, int]:
    """Return `count` gaps (int64), and the number of bits that they took.

    Raises:
        WireError: if the bits end before, or if the gaps are more than `most` together.
    """
    ends = np.flatnonzero(bits == 0)[:count]
    unary = int(ends[-1]) + 1 if len(ends) else 0
    used = unary + count * width
    if len(ends) < count or used > len(bits):
        raise WireError(f"payload of signs: {len(bits)} bits end within the positions of {count} entries")
    quotients = np.diff(ends, prepend=-1) - 1
    if (int(quotients.sum()) << width) > most:
        raise WireError(f"payload of signs: its positions go beyond the {most} entries of the mask")
    rest = bits[unary:used].reshape(count, width).astype(np.int64)
    return (quotients << width) + rest @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64)), used
