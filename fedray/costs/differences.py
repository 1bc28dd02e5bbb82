"""Codecs that send an update as its difference to the task, with or without error feedback.

    8 B lengths │ mask of the entries that the client vouches for │ extras │ the encoded difference

A device and the server both have the task, so the difference is enough. Error feedback (Stich et al., NeurIPS
2018; Karimireddy et al., ICML 2019) adds the entries that a codec left out to the client's next difference.

A new codec subclasses `DeltaCodec`; a line in `CODECS` gives it a name for `clients.uplink.name`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, Field

from fedray.costs.codec import Codec, ValueKind, decode_mask, encode_mask, mask_size
from fedray.costs.extras import decode_extras, encode_extras
from fedray.errors import MethodError, WireError
from fedray.shares import ceil_of
from fedray.types import Extra, Layout, Mask, Params

_LENGTHS = Struct("<II")  # bytes of the mask, and of the extras


@dataclass(frozen=True, kw_only=True)
class UplinkCodec:
    """Sends each update as weights under its mask, written as `method.uplink_values` says.

    The base class of every codec of updates.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    citation: ClassVar[str] = ""


@dataclass(frozen=True, kw_only=True)
class DeltaCodec(UplinkCodec):
    """Sends the difference between an update and its task; subclasses say how.

    Args:
        feedback: add the entries that the codec left out to the client's next difference.
    """

    feedback: bool = True

    def encode(self, difference: Params, mask: Mask) -> bytes:
        """Write a difference; the run is charged its length.

        Args:
            difference: float32 (n,), zeros outside the mask.
            mask: the entries that the update holds, of which there is at least one; the receiver knows them.
        """
        raise NotImplementedError

    def decode(self, payload: bytes, mask: Mask) -> Params:
        """Read what `encode` wrote, under the same mask; float32 (n,)."""
        raise NotImplementedError

    def size(self, mask: Mask) -> int:
        """Return the length that `encode` is expected to have, by which times are predicted."""
        return Codec().size(mask, known=mask.digest)


@dataclass(frozen=True, kw_only=True)
class TopK(DeltaCodec):
    """Sends the largest entries of the difference: their positions and values.

    Args:
        share: share of the update's entries that are sent, rounded up.
        values: bytes of an entry's value, as in `method.uplink_values`.
        feedback: add the entries that were not sent to the client's next difference; the device keeps them.
    """

    citation: ClassVar[str] = "Stich et al., NeurIPS 2018; Karimireddy et al., ICML 2019"

    share: Annotated[float, Field(gt=0, le=1)] = 0.01
    values: ValueKind = "fp32"

    def encode(self, difference: Params, mask: Mask) -> bytes:
        """Write the entries of largest magnitude; of equal ones those that come first."""
        held = torch.nonzero(mask.flat).flatten().numpy()
        size = np.nan_to_num(np.abs(difference.flat.numpy()[held]), nan=np.inf)  # the server must see a NaN
        count = ceil_of(self.share, len(held))
        least = np.partition(size, len(size) - count)[len(size) - count]
        above = np.flatnonzero(size > least)
        equal = np.flatnonzero(size == least)[: count - len(above)]
        chosen = torch.zeros(mask.layout.size, dtype=torch.bool)
        chosen[torch.from_numpy(held[np.concatenate((above, equal))])] = True
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


CODECS: dict[str, type[UplinkCodec]] = {"plain": UplinkCodec, "topk": TopK}
"""Name, for `clients.uplink.name` → codec of updates."""

PLAIN = UplinkCodec()


def encode_update(
    codec: DeltaCodec, difference: Params, mask: Mask, known: bytes, extras: Mapping[str, Extra]
) -> bytes:
    """Write a difference with its mask and extras.

    Args:
        codec: writes the difference.
        difference: float32 (n,).
        mask: entries that the client vouches for; at least one.
        known: digest of the task's mask, which the server has.
        extras: named values that travel beside the model.

    Raises:
        MethodError: for an extra that cannot travel, or a codec that does not write bytes.
    """
    positions, beside = encode_mask(mask, known), encode_extras(extras)
    written: object = codec.encode(difference, mask)
    if not isinstance(written, bytes | bytearray | memoryview):
        raise MethodError(
            f"clients.uplink: {type(codec).__name__}.encode returned {type(written).__name__}, not bytes"
        )
    return b"".join((_LENGTHS.pack(len(positions), len(beside)), positions, beside, written))


def decode_update(codec: DeltaCodec, payload: bytes, layout: Layout, known: Mask) -> tuple[Params, Mask]:
    """Return the difference of a payload, zeros outside its mask, and the mask.

    Raises:
        WireError: if the payload is not whole.
        MethodError: if the codec does not return params of the layout.
    """
    if len(payload) < _LENGTHS.size:
        raise WireError(f"payload of a difference: {len(payload)} bytes, at least {_LENGTHS.size} expected")
    positions, beside = _LENGTHS.unpack_from(payload)
    rest = payload[_LENGTHS.size :]
    mask = decode_mask(rest[:positions], layout, {known.digest: known})
    decode_extras(rest[positions : positions + beside])
    read: object = codec.decode(rest[positions + beside :], mask)
    if not isinstance(read, Params) or read.layout != layout:
        kind = type(codec).__name__
        raise MethodError(f"clients.uplink: {kind}.decode must return Params of the mask's layout")
    return read.masked(mask), mask


def update_size(codec: DeltaCodec, mask: Mask, known: bytes) -> int:
    """Return the predicted length of `encode_update` without extras."""
    return _LENGTHS.size + mask_size(mask, known) + codec.size(mask)
