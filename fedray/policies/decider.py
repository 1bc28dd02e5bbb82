"""A decision at a stage of a run: look → reward the last action → choose → act, as far as it is safe.

`Staged` makes such decisions in a run. The environment in which an agent is trained calls `situation` and
`act` too, and chooses the action in between.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedray.federation.aggregate import CohortUpdate
from fedray.federation.method import ServerContext
from fedray.policies import stages
from fedray.policies.history import Decision, History
from fedray.policies.observation import INTERFACE, observe
from fedray.policies.situation import Situation, look
from fedray.policies.trained import TrainedPolicy, policy_problem
from fedray.pruning.masks import RegrowFrom
from fedray.types import M, Mask, ServerState

PolicyName = Literal["agent", "bandit"]


@dataclass(frozen=True)
class Decider:
    """A pruning policy and the limits on its actions.

    Args:
        policy: the trained agent, or the bandit.
        agent: folder of a trained agent; None: the shipped agent.
        budget: limit of the run's traffic, as a share of the dense model's; None: no limit.
        min_density: no action prunes below it.
        rollback: largest factor by which one action may raise the validation loss, ≥ 1.
        steepest: smallest factor of the density by one action, in [0, 1].
        regrow_from: value of a weight that is held again.
        min_layer: weights that each layer keeps at least.
    """

    policy: PolicyName
    agent: Path | None
    budget: float | None
    min_density: float
    rollback: float
    steepest: float
    regrow_from: RegrowFrom
    min_layer: int = 0

    def problem(self) -> str | None:
        """Return why the agent cannot be used, or None; starts no process."""
        return policy_problem(self.agent, INTERFACE) if self.policy == "agent" else None

    def decide(
        self,
        state: ServerState[M],
        cohort: CohortUpdate,
        ctx: ServerContext,
        history: History,
        stages_left: float,
    ) -> tuple[ServerState[M], History]:
        """Return state and history after the decision of a stage; arguments as for `situation`."""
        now, history = self.situation(state, cohort, ctx, history, stages_left)
        return self.act(state, ctx, now, history, self.choose(now, history))

    def situation(
        self,
        state: ServerState[object],
        cohort: CohortUpdate,
        ctx: ServerContext,
        history: History,
        stages_left: float,
    ) -> tuple[Situation, History]:
        """Measure the situation; return it and the history with the last action's reward and the new λ.

        Args:
            state: after aggregation.
            cohort: of the round; at least one update counted.
            ctx: of the round.
            history: with this round's traffic.
            stages_left: share of the run's stages that follow.
        """
        now = look(state, cohort, ctx, stages_left=stages_left, spent=history.spent, sent=history.sent)
        return now, history.reward(now).keep_to(self.budget, now)

    def choose(self, now: Situation, history: History) -> int:
        """Return the action that the policy asks for, among those that `steepest` allows.

        The bandit asks only for actions that can change the mask, or for HOLD. An agent may ask for one that
        cannot, as in its training; it then holds.
        """
        if self.policy == "bandit":
            possible = stages.possible(now.density, self.min_density, self.steepest)
            return stages.bandit(history.tried, possible)
        agent = TrainedPolicy.load(self.agent, INTERFACE)
        return agent.act(observe(now, history), stages.allowed(self.steepest))

    def act(
        self, state: ServerState[M], ctx: ServerContext, now: Situation, history: History, asked: int
    ) -> tuple[ServerState[M], History]:
        """Carry out an action as far as it is safe; return the state and the history with the decision."""
        params, mask = state.params, state.mask

        def loss(candidate: Mask) -> float:
            return ctx.validate(params, candidate)[1]

        action, new = stages.safe(
            asked,
            params,
            mask,
            loss,
            min_density=self.min_density,
            rollback=self.rollback,
            steepest=self.steepest,
            min_layer=self.min_layer,
        )
        factor = new.density / mask.density if mask.density else 1.0
        if self.regrow_from == "zero":
            params = stages.regrown(params, mask, new)
        decision = Decision(state.round, now, asked, action, factor)
        return replace(state, params=params, mask=new), history.record(decision)
