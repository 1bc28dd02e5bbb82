"""FRLP: distributed model pruning by federated reinforcement learning.  Nie et al., CSA 33(5), 2024.

The server pre-trains on its own data. At pruning rounds it searches the rate at which the fine-tuned model
has moved a set distance (RGP: an agent walks the rate up or down in small steps), prunes by global magnitude,
and broadcasts. The mask-aware mean of the clients' models is FedSA.

Differs from the paper (readings of unclear points, with the flag that restores the other one):
* distance is measured from the random initialisation: `winit`; the rate is an absolute global one;
* every candidate restarts from the same weights, data order and mask; the pruned *and fine-tuned* model is
  broadcast: `broadcast_finetuned`;
* pruning "before training" in round t+1 is pruning at the end of round t;
* clients keep zeros at zero (`zeros="enforce"`); literal regrowth is `regrow`, re-pruning before the upload
  `reprune`;
* FedSA takes the holders of a weight from the masks; the literal `w ≠ 0` is `aggregation="nonzero"`, the
  paper's FedAvg of sparse models `aggregation="everyone"`;
* bisection solves the process, with the result of the optimal policy if the distance never falls;
  `solver="scan"` walks over any distance, and `solver="dqn"` is the agent trained by `rllib_pruner`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedray.federation.aggregate import CohortUpdate, CountedBy, Fold
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext, Setting, ZeroPolicy
from fedray.policies.line_search import Solver, solve
from fedray.policies.rate_search import INTERFACE, RateSearch
from fedray.policies.trained import policy_problem
from fedray.pruning.masks import support, top_k
from fedray.pruning.schedules import events, no_event
from fedray.pruning.scores import l2_distance, magnitude
from fedray.types import (
    ClientUpdate,
    Density,
    Fraction,
    LocalPath,
    Mask,
    NonNegativeInt,
    Params,
    PositiveFloat,
    PositiveInt,
    ServerState,
    Task,
)


@dataclass(frozen=True)
class FRLPMemory:
    """The server's memory.

    Args:
        initial: reference of the learning distance.
        events: pruning rounds.
    """

    initial: Params
    events: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FRLP(Method[FRLPMemory]):
    """Prune by learning distance on the server, aggregate by FedSA.

    Args:
        solver: of the rate: a trained agent, a scan step by step, or bisection.
        policy: folder of the agent for `dqn`, written by `fedray agent train`; None: the shipped agent.
        prune_rounds: rounds after which the server prunes; None: every `interval` up to `until`.
        interval: rounds between events; None: a fifth of the run, at most 20.
        until: last event, as a share of the run's rounds.
        single_shot: largest drop of density in one event.
        min_density: the model is never pruned below this.
        samples: rates that are tried to find the start of the search, both ends of the range included.
        step: width of a state of the process, in rate.
        stride: states that `scan` and `dqn` advance at a time.
        ratio: growth of the distance at which the search ends.
        tolerance: half the width of that window.
        pretrain_epochs: epochs of the server on its own data before round 1.
        finetune_epochs: epochs of the server for each candidate.
        broadcast_finetuned: send the fine-tuned candidate, or the pruned model without fine-tuning.
        winit: reference of the distance: the random initialisation, the pre-trained model, or the model
            before each event.
        zeros: clients keep pruned weights at zero, let them regrow, or prune again before the upload.
        aggregation: updates that count in the mean of a weight: those that hold it by the mask (FedSA), those
            with `w ≠ 0` (FedSA to the letter), or all (plain FedAvg, the paper's alternative).
    """

    citation: ClassVar[str] = "Nie et al., CSA 33(5), 2024"
    prunes: ClassVar[bool] = True
    uses_server_data: ClassVar[bool] = True

    solver: Solver = "bisect"
    policy: LocalPath | None = None
    prune_rounds: tuple[PositiveInt, ...] | None = None
    interval: PositiveInt | None = None
    until: Fraction = 0.6
    single_shot: Fraction = 0.5
    min_density: Density = 0.2
    samples: Annotated[int, Field(ge=2)] = 6
    step: PositiveFloat = 0.0005
    stride: PositiveInt = 10
    ratio: PositiveFloat = 1.05
    tolerance: PositiveFloat = 0.015
    pretrain_epochs: NonNegativeInt = 5
    finetune_epochs: NonNegativeInt = 1
    broadcast_finetuned: bool = True
    winit: Literal["random", "pretrained", "preprune"] = "random"
    zeros: ZeroPolicy = "enforce"
    aggregation: CountedBy = "mask"

    @property
    def zero_policy(self) -> ZeroPolicy:
        """The option `zeros`."""
        return self.zeros

    @property
    def fold(self) -> Fold:
        """FedSA: the mask-aware mean, or its literal form; or plain FedAvg."""
        return Fold(by=self.aggregation)

    def events(self, rounds: int) -> Sequence[int]:
        """Return the rounds after which the server prunes."""
        if self.prune_rounds is not None:
            return self.prune_rounds
        return events(rounds, self.interval, self.until, parts=5, most=20)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Only those of every run."""
        return ()

    def check(self, setting: Setting) -> str | None:
        """Refuse a run without pruning, pruning rounds beyond its end, and an agent that cannot be used."""
        beyond = [event for event in self.prune_rounds or () if event > setting.rounds]
        if beyond:
            late = ", ".join(map(str, beyond))
            return (
                f"method.prune_rounds asks to prune after round(s) {late}, "
                f"but the run has {setting.rounds} round(s)"
            )
        if fault := self.never(setting.rounds):
            return fault
        if self.solver == "dqn":
            problem = policy_problem(self.policy, INTERFACE)
            return problem and f"method.policy: {problem}"
        if self.policy is not None:
            return f"method.policy is the agent of method.solver=dqn, but the solver is {self.solver}"
        return None

    @property
    def depends_on_rounds(self) -> str | None:
        """The pruning rounds, unless they are given."""
        if self.prune_rounds is not None:
            return None
        return "method.until is a share of the run's rounds; method.prune_rounds is not"

    def never(self, rounds: int) -> str | None:
        """Return why the server prunes after no round, or None."""
        if self.single_shot == 0:
            return "method.single_shot=0 lets no event prune; raise it, or set method.name=fedavg_server"
        pruned = self.events(rounds)
        if isinstance(pruned, range):
            return no_event(pruned, pruned.step, self.until, rounds, "prunes")
        if not pruned:
            return "method.prune_rounds=[] never prunes; name rounds, or set method.name=fedavg_server"
        return None

    def setup(self, state: ServerState[FRLPMemory], ctx: ServerContext) -> ServerState[FRLPMemory]:
        """Pre-train on the server's data; keep the reference of the distance."""
        trained = ctx.server.sgd(state.params, state.mask, epochs=self.pretrain_epochs)
        given = self.prune_rounds  # these do not depend on the planned rounds
        rounds = tuple(self.events(ctx.rounds)) if given is None else given
        initial = trained if self.winit == "pretrained" else state.params
        return replace(state, params=trained, memory=FRLPMemory(initial, rounds))

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: local SGD under the policy for zeros."""
        if self.zeros == "enforce":
            return super().client_update(task, client)
        everything = Mask.full(task.mask.layout)
        params = client.sgd(task.params, everything)  # from the zeroed weights: the server sent params ⊙ mask
        if self.zeros == "regrow":
            return ClientUpdate(params, everything)
        scores, layout = magnitude(params), task.mask.layout
        return ClientUpdate(params, top_k(scores, task.mask.density, layout, min_layer=self.min_layer))

    def aggregate(self, state: ServerState[FRLPMemory], cohort: CohortUpdate) -> ServerState[FRLPMemory]:
        """FedSA: the mask-aware mean, and zero for a weight that no client holds, as in eq. 7.

        The server's old value would restore weights that all clients have pruned.
        """
        return replace(state, params=cohort.mean()) if cohort.folded else state

    def prune(
        self, state: ServerState[FRLPMemory], cohort: CohortUpdate, ctx: ServerContext
    ) -> ServerState[FRLPMemory]:
        """RGP: search the density at a pruning round, and prune to it."""
        if self.zeros != "enforce":
            state = replace(state, mask=support(state.params))  # with the regrown weights
        now = state.mask.density
        stop = max(self.min_density, now - self.single_shot)
        if state.round not in state.memory.events or now <= stop:
            return state
        params = state.params.masked(state.mask)
        initial = params if self.winit == "preprune" else state.memory.initial

        def pruned(density: float) -> Mask:
            scores = magnitude(params)
            return top_k(scores, density, ctx.layout, within=state.mask, min_layer=self.min_layer)

        @lru_cache(maxsize=16)  # a scan has too many models to keep all
        def candidate(density: float) -> Params:
            # always from the same weights, in the same order of the data
            return ctx.server.sgd(params, pruned(density), epochs=self.finetune_epochs, seed=state.round)

        def distance(density: float) -> float:
            return l2_distance(initial, candidate(density))

        search = RateSearch(
            now,
            stop,
            distance,
            samples=self.samples,
            step=self.step,
            ratio=self.ratio,
            tolerance=self.tolerance,
        )
        density = solve(search, self.solver, self.stride, self.policy)
        after = candidate(density) if self.broadcast_finetuned else params
        return replace(state, params=after, mask=pruned(density))
