"""FedAvg: communication-efficient learning of deep networks from decentralized data.  McMahan et al., 2017.

Clients train the broadcast model on their own examples; the server averages what comes back, weighted by
numbers of examples. All of it is the defaults of `Method`.

Differs from the paper: nothing known; momentum, where asked for, starts from zero in each round.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedray.federation.method import Method


@dataclass(frozen=True, kw_only=True)
class FedAvg(Method[None]):
    """The dense reference; every option is one that all methods have."""

    citation: ClassVar[str] = "McMahan et al., AISTATS 2017"
