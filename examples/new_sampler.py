"""A client sampler of your own: clients take part in turn, those first that waited longest.

fedray run tune_configs/quickstart.yaml --import examples/new_sampler.py clients.sampler.name=in_turn
"""

from collections.abc import Sequence
from dataclasses import dataclass

import fedray


@dataclass(frozen=True, kw_only=True)
class InTurn(fedray.Sampler):
    """Among the available clients drawn, those whose last round is longest ago.

    Args:
        candidates: available clients drawn, as a multiple of the cohort.
    """

    candidates: int = 3

    def draw(self, memory: dict[int, int] | None, ctx: fedray.SamplerContext) -> tuple[int, ...]:
        """Return the cohort; a client that never took part comes first."""
        drawn, last = ctx.available(self.candidates * ctx.cohort), memory or {}
        return tuple(sorted(drawn, key=lambda client: (last.get(client, 0), client))[: ctx.cohort])

    def learn(
        self, memory: dict[int, int] | None, records: Sequence[fedray.ClientRecord], round: int
    ) -> dict[int, int]:
        """Note the round of each client of the cohort."""
        return (memory or {}) | {record.client: round for record in records}


fedray.SAMPLERS["in_turn"] = InTurn
