"""Who decides at the stages of a run: a trained agent or a bandit, one of `stages.ACTIONS` at a time.

look → price (λ, under a budget) → choose → act, as far as it is safe. What is remembered from stage to stage
is a `Journey`, which a method keeps in its memory; the environment in which an agent is trained steps `look`
and `act` too, and chooses itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fedray.federation.aggregate import CohortUpdate
from fedray.federation.method import ServerContext
from fedray.policies import observation, stages
from fedray.policies.observation import Journey, Situation
from fedray.policies.situation import look
from fedray.policies.trained import TrainedPolicy, policy_problem
from fedray.pruning.masks import RegrowFrom
from fedray.types import Mask, ServerState

PolicyName = Literal["agent", "bandit"]


@dataclass(frozen=True)
class Decider:
    """Somebody who decides, and within what bounds.

    Args:
        policy: the agent or the bandit.
        agent: folder of a trained agent; None: the one that ships.
        preference: λ, or where it starts under a budget.
        budget: traffic to keep to, as a share of the dense model's; None: none.
        min_density: nothing is pruned below it.
        rollback: largest factor by which pruning may raise the validation loss at once.
        steepest: smallest factor of the density at once.
        regrow_from: what comes back starts from zero, or has its value from behind the mask.
        min_layer: weights that each layer keeps at least.
    """

    policy: PolicyName
    agent: Path | None
    preference: float
    budget: float | None
    min_density: float
    rollback: float
    steepest: float
    regrow_from: RegrowFrom
    min_layer: int = 0

    def problem(self) -> str | None:
        """Return why the agent cannot be used, or None; costs no process."""
        if self.policy == "bandit":
            return None
        return policy_problem(self.agent, stages.INTERFACE)

    def decide(
        self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext, journey: Journey, left: float
    ) -> tuple[ServerState, Journey]:
        """Return the state after a stage, and the journey.

        Args:
            state: after aggregation.
            cohort: of the round; at least one update counted.
            ctx: of the round.
            journey: what came before, this round's traffic included.
            left: share of the stages that follow.
        """
        now = look(state, cohort, ctx, journey, left)
        journey = self.priced(journey, now)
        return self.act(state, ctx, journey, now, self.choose(journey, now))

    def priced(self, journey: Journey, now: Situation) -> Journey:
        """Return the journey with λ for the decision, and with what the last one brought."""
        preference = journey.preference or self.preference
        journey = stages.told(journey, now, preference)
        if self.budget is not None:
            preference = stages.dual(preference, now, self.budget)
        return replace(journey, preference=preference)

    def choose(self, journey: Journey, now: Situation) -> int:
        """Return the action that is asked for: one that `steepest` allows.

        A bandit asks for what could move the mask, or to hold. An agent may also ask for what cannot move it,
        as in its training: that is to hold.
        """
        if self.policy == "bandit":
            possible = stages.possible(now.density, self.min_density, self.steepest)
            return stages.bandit(journey.tried, possible)
        agent = TrainedPolicy.load(self.agent, stages.INTERFACE)
        seen = observation.observe(now, journey, journey.preference)
        return agent.act(seen, stages.allowed(self.steepest))

    def act(
        self, state: ServerState, ctx: ServerContext, journey: Journey, now: Situation, chosen: int
    ) -> tuple[ServerState, Journey]:
        """Carry out an action as far as it is safe; return the state and the journey after it."""
        params, mask = state.params, state.mask

        def loss(candidate: Mask) -> float:
            return ctx.validate(params, candidate)[1]

        action, moved = stages.safe(
            chosen,
            params,
            mask,
            loss,
            min_density=self.min_density,
            rollback=self.rollback,
            steepest=self.steepest,
            min_layer=self.min_layer,
        )
        factor = moved.density / mask.density if mask.density else 1.0
        if self.regrow_from == "zero":
            params = stages.regrown(params, mask, moved)
        state = replace(state, params=params, mask=moved)
        return state, stages.after(journey, state.round, now, chosen, action, factor)


DECIDED = ("action", "asked", "factor", "preference")
"""Names of what `decided` returns."""


def decided(journey: Journey, round: int) -> Mapping[str, float]:
    """Return what was decided in a round, for its report: action after safety, asked for, factor, λ."""
    if journey.decided != round or not journey.decided:
        return {}
    return {
        "action": journey.action,
        "asked": journey.chosen,
        "factor": journey.factor,
        "preference": journey.preference,
    }
