"""FedAvg with server data: the control for FRLP.  McMahan et al., 2017; Nie et al., 2024.

FRLP trains on examples that other methods do not have: before round 1, and at each pruning round. Here the
server does the same work and prunes nothing: the difference to FRLP is the pruning, and the gain over FedAvg
is the value of the server's examples.

Differs from the paper: FRLP's has no such control. An event fine-tunes once, where FRLP fine-tunes each
candidate of its search. The models equal, bit for bit, those of an FRLP whose candidates all keep every
weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from fedray.federation.aggregate import CohortUpdate
from fedray.federation.method import Method, ServerContext, Setting
from fedray.pruning.schedules import events
from fedray.types import Fraction, NonNegativeInt, PositiveInt, ServerState


@dataclass(frozen=True)
class FedAvgServerMemory:
    """The server's memory.

    Args:
        events: rounds after which the server fine-tunes.
    """

    events: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FedAvgServer(Method[FedAvgServerMemory]):
    """FedAvg whose server trains on its own examples in the rounds of FRLP's events.

    Args:
        finetune_rounds: rounds after which the server fine-tunes; None: every `interval` up to `until`.
        interval: rounds between events; None: a fifth of the run, at most 20.
        until: last event, as a share of the run's rounds.
        pretrain_epochs: epochs of the server on its own data before round 1.
        finetune_epochs: epochs of the server at each event.
    """

    citation: ClassVar[str] = "McMahan et al., AISTATS 2017; Nie et al., CSA 33(5), 2024"
    uses_server_data: ClassVar[bool] = True

    finetune_rounds: tuple[PositiveInt, ...] | None = None
    interval: PositiveInt | None = None
    until: Fraction = 0.6
    pretrain_epochs: NonNegativeInt = 5
    finetune_epochs: NonNegativeInt = 1

    def events(self, rounds: int) -> Sequence[int]:
        """Return the rounds after which the server fine-tunes."""
        if self.finetune_rounds is not None:
            return self.finetune_rounds
        return events(rounds, self.interval, self.until, parts=5, most=20)

    def check(self, setting: Setting) -> str | None:
        """Refuse rounds that the run never reaches."""
        beyond = [event for event in self.finetune_rounds or () if event > setting.rounds]
        if beyond:
            late = ", ".join(map(str, beyond))
            return (
                f"method.finetune_rounds asks to fine-tune after round(s) {late}, "
                f"but the run has {setting.rounds} round(s)"
            )
        return None

    @property
    def depends_on_rounds(self) -> str | None:
        """The rounds of fine-tuning, unless they are given."""
        if self.finetune_rounds is not None:
            return None
        return "method.until is a share of the run's rounds; method.finetune_rounds is not"

    def setup(
        self, state: ServerState[FedAvgServerMemory], ctx: ServerContext
    ) -> ServerState[FedAvgServerMemory]:
        """Pre-train on the server's data; fix the events by FRLP's rule."""
        trained = ctx.server.sgd(state.params, state.mask, epochs=self.pretrain_epochs)
        given = self.finetune_rounds  # these do not depend on the planned rounds
        rounds = tuple(self.events(ctx.rounds)) if given is None else given
        return replace(state, params=trained, memory=FedAvgServerMemory(rounds))

    def prune(
        self, state: ServerState[FedAvgServerMemory], cohort: CohortUpdate, ctx: ServerContext
    ) -> ServerState[FedAvgServerMemory]:
        """At an event, fine-tune the averaged model; the mask stays full."""
        if state.round not in state.memory.events:
            return state
        # the seed of FRLP's candidates: the same examples in the same order
        tuned = ctx.server.sgd(state.params, state.mask, epochs=self.finetune_epochs, seed=state.round)
        return replace(state, params=tuned)
