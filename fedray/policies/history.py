"""The history of a stage policy: its decisions and their rewards, and the traffic and FLOPs of the run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedray.comparing import as_gain
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.method import ServerContext
from fedray.policies.situation import Situation, Spent
from fedray.policies.stages import dual, reward
from fedray.types import Params, ServerState


@dataclass(frozen=True)
class Decision:
    """One decision of a policy.

    Args:
        round: of the decision.
        situation: seen by the policy.
        asked: action that the policy chose.
        action: action that was carried out, after the safety check.
        factor: density after the action over density before it.
    """

    round: int
    situation: Situation
    asked: int
    action: int
    factor: float


@dataclass(frozen=True)
class History:
    """A policy's memory of a run; each method returns a new history.

    Args:
        preference: λ of the next decision.
        spent: traffic and FLOPs so far.
        sent: model that this round's clients were sent; kept in the rounds of a stage only.
        last: the last decision; None before the first.
        best: highest validation accuracy at a stage so far.
        tried: actions and their rewards, in order.
    """

    preference: float
    spent: Spent = field(default_factory=Spent)
    sent: Params | None = None
    last: Decision | None = None
    best: float = 0.0
    tried: tuple[tuple[int, float], ...] = ()

    def send(self, params: Params) -> "History":
        """Record the model that the clients of a stage's round were sent."""
        return replace(self, sent=params)

    def spend(self, state: ServerState[object], cohort: CohortUpdate, ctx: ServerContext) -> "History":
        """Add the traffic and the FLOPs of a round."""
        return replace(self, spent=self.spent.plus(state, cohort, ctx))

    def reward(self, now: Situation) -> "History":
        """Append the last action's reward, measured now.

        If a milder action than the chosen one was carried out, both get the reward. The bandit would else ask
        again and again for an action that is never carried out.

        Source: Mannor and Shamir, "From bandits to experts: on the value of side-observations", NeurIPS 2011,
            for one reward that informs about two actions.
        """
        if self.last is None:
            return self
        gained = reward(self.last.situation, now, self.preference)
        credited = dict.fromkeys((self.last.action, self.last.asked), gained)
        return replace(self, tried=(*self.tried, *credited.items()))

    def keep_to(self, budget: float | None, now: Situation) -> "History":
        """Set λ for the next decision by a budget of traffic; None leaves λ as it is."""
        return self if budget is None else replace(self, preference=dual(self.preference, now, budget))

    def record(self, decision: Decision) -> "History":
        """Add a decision."""
        best = max(self.best, as_gain(decision.situation.accuracy))
        return replace(self, last=decision, best=best, sent=None)

    def measures(self, round: int) -> Mapping[str, float]:
        """Return the decision of a round for its report; nothing if the round had none."""
        last = self.last
        if last is None or last.round != round:
            return {}
        values = (last.action, last.asked, last.factor, self.preference)
        return dict(zip(MEASURES, values, strict=True))


MEASURES = ("action", "asked", "factor", "preference")
"""Names of what `History.measures` returns."""
