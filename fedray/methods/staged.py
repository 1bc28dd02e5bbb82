"""Staged: prune a little, train on, prune again.  After Zhu and Gupta, "To prune, or not to prune", 2017.

The model may be pruned before training. At a few stages over the first part of the run, the least important
weights are removed: down to a scheduled density, or below an importance *threshold*. Importance is |w|, or
|g·w| from gradients that the stage's cohort computes after its local training. Pruned weights stay pruned.
With `policy`, a trained agent or a bandit chooses at each stage how much to prune, from the situation of the
run; it may also restore weights.

Differs from the paper: stages are rounds of a federation instead of training steps; the threshold mode
follows Han et al., "Learning both weights and connections", NeurIPS 2015, where a layer's threshold is a
multiple of the layer's scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext, Setting
from fedray.policies.decider import Decider, PolicyName
from fedray.policies.history import MEASURES, History
from fedray.policies.situation import MOVED, distance
from fedray.policies.stages import MILDEST
from fedray.pruning.masks import RegrowFrom, at_least, top_k
from fedray.pruning.schedules import SCHEDULES, ScheduleName, due, spread
from fedray.pruning.scores import in_units_of_layer, magnitude, sensitivity
from fedray.types import (
    ClientInfo,
    ClientUpdate,
    Density,
    Extra,
    Fraction,
    LocalPath,
    Mask,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ServerState,
    Task,
)


@dataclass(frozen=True)
class StagedMemory:
    """The server's memory.

    Args:
        stages: rounds of the stages.
        done: round of the last stage that was carried out; 0 before the first.
        history: of the policy; None: a schedule or a threshold decides.
    """

    stages: tuple[int, ...]
    done: int = 0
    history: History | None = None

    def due(self, round: int) -> bool:
        """Whether a round has a stage: a scheduled one, or an earlier one that had no answer."""
        return due(self.stages, self.done, round)

    def progress(self, round: int) -> float:
        """Return the share of the stages that are over after a round."""
        return sum(stage <= round for stage in self.stages) / len(self.stages)


@dataclass(frozen=True, kw_only=True)
class Staged(Method[StagedMemory]):
    """Prune in stages, to a density or by a threshold.

    Args:
        density: share of the prunable weights after the last stage of a schedule.
        threshold: each stage removes weights that score less; replaces `density` and `schedule`.
        threshold_unit: `layer`: in units of the layer's mean importance over the weights held; `absolute`: of
            the importance itself.
        min_density: limit below which no threshold and no policy prunes.
        initial_density: density before training, by magnitude of the initial weights.
        importance: `magnitude` |w|, or `gradient` |g·w|, for which clients upload one value per weight held.
        schedule: form of the density's fall from stage to stage.
        policy: `schedule` prunes by `density` or `threshold`; a trained agent or a bandit chooses one of
            `fedray.policies.stages.ACTIONS` at each stage.
        agent: folder written by `fedray agent train`; None: the shipped agent.
        preference: λ of agent and bandit: points of accuracy, in hundreds, that the dense model's whole
            traffic is worth. 0.01 keeps accuracy, 1 saves bytes.
        budget: limit of the run's traffic, as a share of the dense model's. λ then starts at `preference` and
            follows the remaining budget from stage to stage; None: λ stays.
        rollback: largest factor by which an action of a policy may raise the validation loss; else the next
            milder action is taken.
        steepest: smallest factor of the density by one action of a policy.
        regrow_from: value of a weight that a policy restores: zero, or its value behind the mask.
        stages: number of stages; None: 4, or 12 for an agent or a bandit.
        start: the first stage, as a share of the run's rounds; None: 0.1, or 0 for an agent or a bandit.
        until: the last stage, as a share of the run's rounds; None: 0.5, or 0.9 for an agent or a bandit.
    """

    citation: ClassVar[str] = "Zhu and Gupta, 2017; Han et al., NeurIPS 2015"
    prunes: ClassVar[bool] = True
    may_change: ClassVar[frozenset[str]] = Method.may_change | {"density", "threshold", "min_density"}

    density: Density = 0.1
    threshold: NonNegativeFloat | None = None
    threshold_unit: Literal["layer", "absolute"] = "layer"
    min_density: Density = 0.01
    initial_density: Density = 1.0
    importance: Literal["magnitude", "gradient"] = "magnitude"
    schedule: ScheduleName = "cubic"
    policy: Literal["schedule", PolicyName] = "schedule"
    agent: LocalPath | None = None
    preference: PositiveFloat = 0.1
    budget: Density | None = None
    rollback: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5
    steepest: Fraction = 0.0
    regrow_from: RegrowFrom = "zero"
    stages: Annotated[PositiveInt, Field(le=100_000)] | None = None
    start: Fraction | None = None
    until: Fraction | None = None

    @property
    def decider(self) -> Decider | None:
        """The policy and its limits; None: a schedule or a threshold decides."""
        if self.policy == "schedule":
            return None
        return Decider(
            self.policy,
            self.agent,
            self.budget,
            self.min_density,
            self.rollback,
            self.steepest,
            self.regrow_from,
            self.min_layer,
        )

    @property
    def uses_validation_data(self) -> bool:
        """Whether a policy decides: it measures validation accuracy and loss."""
        return self.decider is not None

    @property
    def span(self) -> tuple[int, float, float]:
        """Number of stages; the first and the last as shares of the run."""
        stages, start, until = (12, 0.0, 0.9) if self.decider else (4, 0.1, 0.5)
        return (
            stages if self.stages is None else self.stages,
            start if self.start is None else self.start,
            until if self.until is None else self.until,
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """A policy's decisions, and the movement of the clients, in the rounds of its stages."""
        if self.decider is None:
            return ()
        return (f"train/{MOVED}", *(f"method/{name}" for name in MEASURES))

    @property
    def target(self) -> float | None:
        """The density after the last stage; a threshold and a policy have none."""
        return None if self.decider or self.threshold is not None else self.density

    def check(self, setting: Setting) -> str | None:
        """Refuse a first stage after the last, a target above the start, and an agent that cannot be used."""
        _, start, until = self.span
        if start > until:
            return f"method.start={start} comes after method.until={until}"
        if self.decider and (self.threshold is not None or self.importance != "magnitude"):
            return (
                f"method.policy={self.policy} prunes by magnitude, and itself chooses how much: leave out "
                "method.threshold and method.importance, or set method.policy=schedule"
            )
        if self.agent is not None and self.policy != "agent":
            return f"method.agent is given, but method.policy={self.policy}: set method.policy=agent"
        if self.budget is not None and not self.decider:
            return "method.budget is given, but a schedule has no budget: set method.policy=agent"
        if fault := self.cannot_move():
            return fault
        problem = self.decider.problem() if self.decider else None
        return f"method.agent: {problem}" if problem else None

    def cannot_move(self) -> str | None:
        """Return which limits leave nothing to prune, or None."""
        if self.target is not None:
            if self.density <= self.initial_density:
                return None
            return f"method.density={self.density} is above method.initial_density={self.initial_density}"
        if self.min_density >= self.initial_density:
            return (
                f"method.min_density={self.min_density} is not below method.initial_density="
                f"{self.initial_density}, so that nothing can be pruned; lower it"
            )
        if self.decider and self.steepest > MILDEST:
            return (
                f"method.steepest={self.steepest} lets a policy prune nothing: its mildest action keeps "
                f"{MILDEST} of the weights held; lower it to that, or further"
            )
        return None

    @property
    def depends_on_rounds(self) -> str | None:
        """The stages."""
        return "method.start and method.until are shares of the run's rounds"

    def setup(self, state: ServerState[StagedMemory], ctx: ServerContext) -> ServerState[StagedMemory]:
        """Fix the stages; prune the initial weights if asked to."""
        rounds = spread(ctx.rounds, *self.span)
        mask = top_k(magnitude(state.params), self.initial_density, ctx.layout, min_layer=self.min_layer)
        history = History(self.preference) if self.decider else None
        return replace(state, mask=mask, memory=StagedMemory(rounds, history=history))

    def configure(self, state: ServerState[StagedMemory], client: ClientInfo) -> Task:
        """At a stage, ask for gradients to prune by, or for a client's movement."""
        extras: dict[str, Extra] = {}
        if state.memory.due(state.round):
            extras |= {"score": True} if self.importance == "gradient" else {}
            extras |= {"moved": True} if self.decider else {}
        return Task(state.params, state.mask, extras=extras)

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: masked local SGD; at a stage also |g·w| of the weights held, or the movement."""
        params, mask = client.sgd(task.params, task.mask), task.mask
        metrics = {MOVED: distance(task.params, params, mask)} if task.extras.get("moved") else {}
        if not task.extras.get("score"):
            return ClientUpdate(params, mask, metrics=metrics)
        weights = client.model.forward_params(params, mask)
        scores = sensitivity(weights, client.grad(params, mask)) * client.num_examples
        return ClientUpdate(params, mask, sums={"importance": scores[mask.flat]})

    def aggregate(self, state: ServerState[StagedMemory], cohort: CohortUpdate) -> ServerState[StagedMemory]:
        """Take the mask-aware mean; at a stage, a policy also keeps the model that the clients were sent."""
        memory = state.memory
        if memory.history is not None and memory.due(state.round) and cohort.folded:
            memory = replace(memory, history=memory.history.send(state.params))
        return super().aggregate(replace(state, memory=memory), cohort)

    def prune(
        self, state: ServerState[StagedMemory], cohort: CohortUpdate, ctx: ServerContext
    ) -> ServerState[StagedMemory]:
        """At a stage, let the policy, the threshold or the schedule move the mask.

        If a stage's round has no update, the next round with one takes its place.
        """
        memory = state.memory
        if memory.history is not None:
            memory = replace(memory, history=memory.history.spend(state, cohort, ctx))
        if not memory.due(state.round) or not cohort.folded:
            return replace(state, memory=memory)
        memory = replace(memory, done=state.round)
        if self.decider and memory.history is not None:
            left = 1 - memory.progress(state.round)
            state, history = self.decider.decide(state, cohort, ctx, memory.history, left)
            return replace(state, memory=replace(memory, history=history))
        return replace(state, mask=self.pruned(state, cohort), memory=memory)

    def pruned(self, state: ServerState[StagedMemory], cohort: CohortUpdate) -> Mask:
        """Return the mask after a stage of the threshold or the schedule."""
        scores, mask = self.scores(state, cohort), state.mask
        if self.threshold is None:
            return top_k(scores, self.scheduled(state), mask.layout, within=mask, min_layer=self.min_layer)
        if self.threshold_unit == "layer":
            scores = in_units_of_layer(scores, mask)
        return at_least(
            scores,
            self.threshold,
            mask.layout,
            within=mask,
            min_density=self.min_density,
            min_layer=self.min_layer,
        )

    def scheduled(self, state: ServerState[StagedMemory]) -> float:
        """Return the schedule's density after the state's round."""
        progress = state.memory.progress(state.round)
        return SCHEDULES[self.schedule](progress, self.initial_density, self.density)

    def density_asked(self, state: ServerState[StagedMemory]) -> float | None:
        """Return the schedule's density; a threshold and a policy have none."""
        return None if self.target is None else self.scheduled(state)

    def measures(self, state: ServerState[StagedMemory]) -> Mapping[str, float]:
        """Return the policy's decision in the round, if it made one."""
        history = state.memory.history
        return {} if history is None else history.measures(state.round)

    def scores(self, state: ServerState[StagedMemory], cohort: CohortUpdate) -> Tensor:
        """Return the importance (size,) of each weight."""
        if self.importance == "magnitude":
            return magnitude(state.params)
        scores = torch.zeros(state.mask.layout.size)
        scores[state.mask.flat] = cohort.sum("importance") / cohort.num_examples
        return scores
