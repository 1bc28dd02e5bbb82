"""A new codec: one bit for the sign of each entry, and one scale; error feedback sends the rest later.

    fedray run tune_configs/quickstart.yaml --import examples/new_codec.py clients.uplink.name=sign

EF-signSGD: Karimireddy et al., "Error feedback fixes SignSGD and other gradient compression schemes", ICML
2019.
"""

from dataclasses import dataclass

import numpy as np
import torch

import fedray


@dataclass(frozen=True, kw_only=True)
class Sign(fedray.DeltaCodec):
    """Sends the signs of the difference and its mean magnitude.

    Args:
        feedback: add the rest to the client's next difference; the device keeps it.
    """

    def encode(self, difference: fedray.Params, mask: fedray.Mask) -> bytes:
        """Write a scale, and a bit for each entry under the mask."""
        held = difference.flat[mask.flat].numpy()
        scale = np.array([np.abs(held).mean()], "<f4")
        return scale.tobytes() + np.packbits(held >= 0).tobytes()

    def decode(self, payload: bytes, mask: fedray.Mask) -> fedray.Params:
        """Return plus or minus the scale under the mask."""
        scale = float(np.frombuffer(payload, "<f4", 1)[0])
        positive = np.unpackbits(np.frombuffer(payload, "u1", offset=4), count=mask.count).astype(bool)
        flat = torch.zeros(mask.layout.size)
        flat[mask.flat] = torch.from_numpy(np.where(positive, scale, -scale).astype("f4"))
        return fedray.Params(flat, mask.layout)

    def size(self, mask: fedray.Mask) -> int:
        """Return the length of `encode`, by which the time of an upload is predicted."""
        return 4 + -(-mask.count // 8)


fedray.CODECS["sign"] = Sign
