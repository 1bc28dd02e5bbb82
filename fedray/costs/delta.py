"""What a codec of updates is: `UplinkCodec`, and `DeltaCodec` for those that send differences."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import ConfigDict

from fedray.costs.codec import Codec
from fedray.types import Mask, Params


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

    def encode_drawing(self, difference: Params, mask: Mask, rng: np.random.Generator) -> bytes:
        """Write a difference as `encode` does, for codecs that round at random.

        Args:
            difference: float32 (n,), zeros outside the mask.
            mask: the entries that the update holds.
            rng: of this client in this round, the same wherever it trains.
        """
        return self.encode(difference, mask)

    def decode(self, payload: bytes, mask: Mask) -> Params:
        """Read what `encode` wrote, under the same mask; float32 (n,)."""
        raise NotImplementedError

    def size(self, mask: Mask) -> int:
        """Return the length that `encode` is expected to have, by which times are predicted."""
        return Codec().size(mask, known=mask.digest)
