"""Codecs that send an update as its difference to the task, with or without error feedback.

    8 B lengths │ mask of the entries that the client vouches for │ extras │ the encoded difference

A device and the server both have the task, so the difference is enough. Error feedback (Stich et al., NeurIPS
2018; Karimireddy et al., ICML 2019) adds the entries that a codec left out to the client's next difference.

A new codec subclasses `DeltaCodec`; a line in `CODECS` gives it a name for `clients.uplink.name`.
"""

from collections.abc import Mapping
from struct import Struct

import numpy as np

from fedray.costs.codec import decode_mask, encode_mask, mask_size
from fedray.costs.delta import DeltaCodec, UplinkCodec
from fedray.costs.extras import decode_extras, encode_extras
from fedray.costs.rounded import FedPAQ, Int8
from fedray.costs.topk import STC, TopK
from fedray.errors import MethodError, WireError
from fedray.types import Extra, Layout, Mask, Params

__all__ = [
    "CODECS",
    "PLAIN",
    "STC",
    "DeltaCodec",
    "FedPAQ",
    "Int8",
    "TopK",
    "UplinkCodec",
    "decode_update",
    "encode_update",
    "update_size",
]

_LENGTHS = Struct("<II")  # bytes of the mask, and of the extras

CODECS: dict[str, type[UplinkCodec]] = {
    "plain": UplinkCodec,
    "topk": TopK,
    "stc": STC,
    "fedpaq": FedPAQ,
    "int8": Int8,
}
"""Name, for `clients.uplink.name` → codec of updates."""

PLAIN = UplinkCodec()


def encode_update(
    codec: DeltaCodec,
    difference: Params,
    mask: Mask,
    known: bytes,
    extras: Mapping[str, Extra],
    rng: np.random.Generator | None = None,
) -> bytes:
    """Write a difference with its mask and extras.

    Args:
        codec: writes the difference.
        difference: float32 (n,).
        mask: entries that the client vouches for; at least one.
        known: digest of the task's mask, which the server has.
        extras: named values that travel beside the model.
        rng: for codecs that round at random; None: they draw the same numbers every time.

    Raises:
        MethodError: for an extra that cannot travel, or a codec that does not write bytes.
    """
    positions, beside = encode_mask(mask, known), encode_extras(extras)
    written: object = (
        codec.encode(difference, mask) if rng is None else codec.encode_drawing(difference, mask, rng)
    )
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
