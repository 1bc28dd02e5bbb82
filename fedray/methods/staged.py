"""Staged: prune a little, train on, prune again.  After Zhu and Gupta, "To prune, or not to prune", 2017.

The model may be pruned before training; then, at a few stages spread over the first part of the run, the
least important weights go. How many is set by a schedule of target densities, or by an importance
*threshold*. Importance is |w|, or |g·w| from gradients that the stage's cohort computes after its local
training. Pruned weights stay pruned.

Differs from the paper: stages are rounds of a federation instead of training steps; the threshold mode
follows Han et al., "Learning both weights and connections", NeurIPS 2015, where a layer's threshold is a
multiple of its own scale.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext, Setting
from fedray.pruning.masks import at_least, top_k
from fedray.pruning.schedules import SCHEDULES
from fedray.pruning.scores import in_units_of_layer, magnitude, sensitivity
from fedray.types import (
    ClientInfo,
    ClientUpdate,
    Density,
    Fraction,
    Mask,
    NonNegativeFloat,
    PositiveInt,
    ServerState,
    Task,
)


@dataclass(frozen=True)
class StagedMemory:
    """The rounds after which weights are removed."""

    stages: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Staged(Method):
    """Prune in stages, to a density or by a threshold.

    Args:
        density: share of the prunable weights that is left after the last stage (schedule mode).
        threshold: if given, each stage removes what scores less, and `density` and `schedule` are not used.
        threshold_unit: `layer`: in units of the layer's mean importance over the weights held; `absolute`: as
            it is.
        min_density: a threshold never prunes below this.
        initial_density: pruned to this before training, by magnitude of the initial weights.
        importance: `magnitude` |w|, or `gradient` |g·w|, for which clients upload one value per weight held.
        schedule: how density falls from stage to stage.
        stages: how many there are.
        start: the first stage, as a share of the run's rounds.
        until: the last stage, as a share of the run's rounds.
    """

    citation: ClassVar[str] = "Zhu and Gupta, 2017; Han et al., NeurIPS 2015"

    density: Density = 0.1
    threshold: NonNegativeFloat | None = None
    threshold_unit: Literal["layer", "absolute"] = "layer"
    min_density: Density = 0.01
    initial_density: Density = 1.0
    importance: Literal["magnitude", "gradient"] = "magnitude"
    schedule: Literal["linear", "cubic", "cosine", "geometric"] = "cubic"
    stages: PositiveInt = 4
    start: Fraction = 0.1
    until: Fraction = 0.5

    def check(self, setting: Setting) -> str | None:
        """Refuse stages that run backwards, or a target above the start."""
        if self.start > self.until:
            return f"method.start={self.start} comes after method.until={self.until}"
        if self.threshold is None and self.density > self.initial_density:
            return f"method.density={self.density} is above method.initial_density={self.initial_density}"
        return None

    def setup(self, state: ServerState, ctx: ServerContext) -> ServerState:
        """Fix the stages; prune the initial weights if asked to."""
        span = (self.until - self.start) / max(1, self.stages - 1)
        shares = [self.start + i * span for i in range(self.stages)]
        stages = tuple(sorted({max(1, round(share * ctx.rounds)) for share in shares}))
        mask = top_k(magnitude(state.params), self.initial_density, ctx.layout)
        return replace(state, mask=mask, memory=StagedMemory(stages))

    def configure(self, state: ServerState, client: ClientInfo) -> Task:
        """At a stage that prunes by gradients, ask for them."""
        wanted = self.importance == "gradient" and state.round in state.memory.stages
        return Task(state.params, state.mask, extras={"score": True} if wanted else {})

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: masked local SGD; at a stage also |g·w|, of the weights held."""
        params, mask = client.sgd(task.params, task.mask), task.mask
        if not task.extras.get("score"):
            return ClientUpdate(params, mask)
        scores = sensitivity(params, client.grad(params, mask)) * client.num_examples
        return ClientUpdate(params, mask, sums={"importance": scores[mask.flat]})

    def prune(self, state: ServerState, cohort: CohortUpdate, ctx: ServerContext) -> ServerState:
        """At a stage, remove what matters least."""
        if state.round not in state.memory.stages or not cohort.folded:
            return state
        scores = self.scores(state, cohort)
        if self.threshold is not None:
            if self.threshold_unit == "layer":
                scores = in_units_of_layer(scores, state.mask)
            return replace(state, mask=self.cut_at_threshold(scores, state.mask))
        done = state.memory.stages.index(state.round) + 1
        progress = done / len(state.memory.stages)
        target = SCHEDULES[self.schedule](progress, self.initial_density, self.density)
        return replace(state, mask=top_k(scores, target, ctx.layout, within=state.mask))

    def scores(self, state: ServerState, cohort: CohortUpdate) -> Tensor:
        """Return the importance (size,) of each weight, now."""
        if self.importance == "magnitude":
            return magnitude(state.params)
        scores = torch.zeros(state.mask.layout.size)
        scores[state.mask.flat] = cohort.sum("importance") / cohort.num_examples
        return scores

    def cut_at_threshold(self, scores: Tensor, mask: Mask) -> Mask:
        """Keep what scores at least the threshold."""
        assert self.threshold is not None
        return at_least(scores, self.threshold, mask.layout, within=mask, min_density=self.min_density)
