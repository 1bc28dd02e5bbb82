"""Differences of which every entry is sent, with fewer bits: rounded at random (FedPAQ), or to 8 bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from fedray.costs.codec import Codec
from fedray.costs.delta import DeltaCodec
from fedray.errors import WireError
from fedray.types import Mask, Params

_Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class FedPAQ(DeltaCodec):
    """Sends every entry of the difference, rounded at random to a few levels, so that its mean is exact.

    An entry of a tensor whose largest magnitude is m lies between two of the levels −m, …, 0, …, m; it
    becomes one of them, with the probabilities by which the expected value is the entry itself.

    Args:
        bits: of an entry; there are 2^bits − 1 levels.
        feedback: add the rounding errors to the client's next difference; without, no device keeps anything.
    """

    citation: ClassVar[str] = "Reisizadeh et al., AISTATS 2020; Alistarh et al., NeurIPS 2017"

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    feedback: bool = False

    @property
    def steps(self) -> int:
        """Levels above zero."""
        return (1 << (self.bits - 1)) - 1

    def encode(self, difference: Params, mask: Mask) -> bytes:
        """Write a difference with random numbers that are always the same; a run draws others."""
        return self.encode_drawing(difference, mask, np.random.default_rng(0))

    def encode_drawing(self, difference: Params, mask: Mask, rng: np.random.Generator) -> bytes:
        """Write each tensor's largest magnitude, and a level for each entry; NaN if one is not finite."""
        values = difference.flat.numpy()[mask.flat.numpy()].astype(np.float64)
        codes, scales = np.zeros(len(values), np.uint8), []
        for span in _spans(mask):
            scale = np.float32(np.abs(values[span]).max())  # NaN if one is NaN
            if not np.isfinite(scale):
                scale = np.float32("nan")
            scales.append(scale)
            if scale > 0:
                levels = values[span] / np.float64(scale) * self.steps
                below = np.floor(levels)
                codes[span] = below + (rng.random(len(levels)) < levels - below) + self.steps
        bits = np.unpackbits(codes[:, None], axis=1)[:, 8 - self.bits :]
        return np.array(scales, "<f4").tobytes() + np.packbits(bits).tobytes()

    def decode(self, payload: bytes, mask: Mask) -> Params:
        """Return the level of each entry.

        Raises:
            WireError: if the payload is not whole.
        """
        spans, held = list(_spans(mask)), mask.count
        if len(payload) != self.size(mask):
            raise WireError(f"payload of levels: {len(payload)} bytes, expected {self.size(mask)}")
        scales = np.frombuffer(payload, "<f4", len(spans))
        bits = np.unpackbits(np.frombuffer(payload, "u1", offset=4 * len(spans)), count=held * self.bits)
        wide = np.zeros((held, 8), np.uint8)
        wide[:, 8 - self.bits :] = bits.reshape(held, self.bits)
        levels = np.packbits(wide, axis=1).ravel().astype(np.float64) - self.steps
        values = np.zeros(held, "<f4")
        with np.errstate(over="ignore", invalid="ignore"):  # a scale of NaN is meant
            for span, scale in zip(spans, scales, strict=True):
                values[span] = levels[span] * (np.float64(scale) / self.steps) if scale != 0 else 0.0
        flat = torch.zeros(mask.layout.size)
        flat[mask.flat] = torch.from_numpy(values)
        return Params(flat, mask.layout)

    def size(self, mask: Mask) -> int:
        """Return the length: 4 bytes for each tensor of which the mask holds something, and the levels."""
        return 4 * len(list(_spans(mask))) - (-mask.count * self.bits // 8)


@dataclass(frozen=True, kw_only=True)
class Int8(DeltaCodec):
    """Sends every entry of the difference as one byte of its tensor's range.

    Args:
        feedback: add the rounding errors to the client's next difference; the device keeps them.
    """

    citation: ClassVar[str] = "Karimireddy et al., ICML 2019, for the feedback"

    def encode(self, difference: Params, mask: Mask) -> bytes:
        """Write all entries of the mask, which the receiver knows."""
        return Codec("int8").encode(difference, mask, known=mask.digest)

    def decode(self, payload: bytes, mask: Mask) -> Params:
        """Return the rounded entries."""
        return Codec().decode(payload, mask.layout, known={mask.digest: mask}).params

    def size(self, mask: Mask) -> int:
        """Return the length, which depends on the mask alone."""
        return Codec("int8").size(mask, known=mask.digest)


def _spans(mask: Mask) -> Iterator[slice]:
    """Yield where a tensor's entries are among all that the mask holds, for tensors that hold some."""
    sizes = [0, *np.cumsum([int(mask[name].count_nonzero()) for name in mask.layout.names]).tolist()]
    yield from (slice(start, stop) for start, stop in pairwise(sizes) if start < stop)
