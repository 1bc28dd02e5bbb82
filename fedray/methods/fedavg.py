"""FedAvg: communication-efficient learning of deep networks from decentralized data.  McMahan et al., 2017.

Clients train the broadcast model on their own examples; the server averages their models, weighted by numbers
of examples. These are the defaults of `Method`.

Differs from the paper: no known difference; momentum, an option, starts from zero in each round.
"""

from dataclasses import dataclass
from typing import ClassVar

from fedray.federation.method import Method


@dataclass(frozen=True, kw_only=True)
class FedAvg(Method[None]):
    """The dense reference; it has only the options that all methods have."""

    citation: ClassVar[str] = "McMahan et al., AISTATS 2017"
