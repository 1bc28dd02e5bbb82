"""AutoFLIP: automated federated learning by informed pruning.  Internò et al., arXiv 2405.10271, 2024.

Before round 1 clients explore: each trains the initial model on its own examples for some epochs and reports
how far each weight moved. The mean of the squared movements, scaled to [0, 1] in each tensor, is the
guidance. The server prunes weights below its quantile T_p, and neurons and filters without incoming weights.
The mask follows the participants: it is rebuilt after each round from the movements of the round's clients.

Differs from the paper (of its later versions, 2025 and 2026, only the abstracts were read, beside the code of
2024; readings, with the flag that restores the other one):
* each explorer starts from the same model; in that code they train one model in turn, and only the last
  one's movement counts: `scouts="aliased"`. There the rounds start from that trained model: `warm_start`;
* exploration is charged as round 0, and far shorter than its 150 epochs: `explore_epochs=150`;
* biases and the classifier are not prunable, and the mask is one of zeros and ones in every round;
* `scaling="robust"` has the mean of the two middle scores as the median, that code the lower one (no flag);
* a tensor that did not move stays whole, where min-max divides 0 by 0 and prunes all of it;
* the removal of channels, and client agreement (`agreement`, off), are interpretations: the code has neither;
* a regrown weight resumes from its last value; the server has no momentum: `server_momentum=0.9`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedray.comparing import as_loss
from fedray.errors import MethodError
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext, Setting
from fedray.models.spec import ModelSpec
from fedray.pruning.channels import channel_mask, removed_entries
from fedray.pruning.masks import filled
from fedray.pruning.schedules import part_of
from fedray.pruning.scores import Scaling, above_quantile, loss_deviation, scaled_per_layer
from fedray.types import (
    ClientUpdate,
    Density,
    Fraction,
    Layout,
    Mask,
    Params,
    PositiveInt,
    ServerState,
    Task,
)

Share = Annotated[float, Field(ge=0, lt=1)]
DIVERGED = "all {} explorers diverged; lower method.lr"


@dataclass(frozen=True)
class AutoFLIPMemory:
    """The server's memory.

    Args:
        scouts: explorer → squared movement of each prunable weight; empty if the mask stays.
        velocity: (size,), the server's momentum; None before its first step.
    """

    scouts: Mapping[int, Tensor] = field(default_factory=dict)
    velocity: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class AutoFLIP(Method[AutoFLIPMemory]):
    """Let clients explore, then prune the weights that moved least.

    Args:
        explorers: share of the clients that explore, of those available before round 1.
        explore_epochs: largest number of epochs of an explorer; None: a twentieth of the run's rounds, from 1
            to 150.
        patience: an explorer stops after this many epochs without a new lowest loss of the last batch.
        scouts: explorers start from the same model, or train one model in turn, and the last one counts.
        scaling: of the guidance in each tensor: by its range, or by its median and quartiles.
        threshold: quantile T_p of the guidance; weights that are not above it are pruned.
        quantile: of all prunable weights together, or of each tensor.
        structured: remove neurons and filters without incoming weights as a whole.
        agreement: weight, in the score, of the share of explorers that would keep a weight by their own
            guidance; the rest is the guidance.
        mask_from: the mask is rebuilt after each round from the movements of the round's clients, or made
            once from those of all explorers. With `explorers` below 1 or aliased `scouts` it is made once.
        warm_start: start round 1 from the model of the aliased scouts.
        server_momentum: β of the server's step, v ← β v + (1 − β)(mean − w).
    """

    citation: ClassVar[str] = "Internò et al., arXiv 2405.10271, 2024"
    prunes: ClassVar[bool] = True

    explorers: Density = 1.0
    explore_epochs: PositiveInt | None = None
    patience: PositiveInt = 40
    scouts: Literal["independent", "aliased"] = "independent"
    scaling: Scaling = "minmax"
    threshold: Share = 0.3
    quantile: Literal["global", "layer"] = "global"
    structured: bool = True
    agreement: Fraction = 0.0
    mask_from: Literal["participants", "all"] = "participants"
    warm_start: bool = False
    server_momentum: Share = 0.0

    @property
    def follows(self) -> bool:
        """Whether the mask follows the clients of each round."""
        every = self.explorers == 1 and self.scouts == "independent"
        return every and self.mask_from == "participants"

    def check(self, setting: Setting) -> str | None:
        """Refuse a warm start without a trained model."""
        if self.warm_start and self.scouts == "independent":
            return "method.warm_start=true needs method.scouts=aliased: there is no one model to start from"
        return None

    @property
    def depends_on_rounds(self) -> str | None:
        """The exploration, unless its epochs are given."""
        if self.explore_epochs is not None:
            return None
        return "method.explore_epochs is a twentieth of the run's rounds where it is not given"

    def setup(self, state: ServerState[AutoFLIPMemory], ctx: ServerContext) -> ServerState[AutoFLIPMemory]:
        """Let clients explore; make the first mask from all their movements."""
        epochs = self.explore_epochs or part_of(ctx.rounds, 20, 150)
        explorers = ctx.sample(max(1, round(self.explorers * len(ctx.clients))))
        if self.scouts == "aliased":
            return self.explored_in_turn(state, ctx, explorers, epochs)
        task = Task(state.params, state.mask, extras={"epochs": epochs})
        found = ctx.ask(self.scout, dict.fromkeys(explorers, task))
        if not found.folded:
            raise MethodError(DIVERGED.format(len(explorers)))
        if self.follows:
            scouts = {client: sent["movement"] for client, sent in found.each.items()}
            mask = self.mask_from_scouts(list(scouts.values()), ctx.model)
            return replace(state, mask=mask, memory=AutoFLIPMemory(scouts))
        moved = found.sum("movement") / len(found.folded)
        votes = found.sum("votes") / len(found.folded) if self.agreement else torch.zeros_like(moved)
        return replace(state, mask=self.mask_of(moved, votes, ctx.model), memory=AutoFLIPMemory())

    def explored_in_turn(
        self, state: ServerState[AutoFLIPMemory], ctx: ServerContext, explorers: Sequence[int], epochs: int
    ) -> ServerState[AutoFLIPMemory]:
        """Pass one model from explorer to explorer; make the mask from the last one's movement."""
        before = after = state.params
        for client in explorers:
            task = Task(after, state.mask, extras={"epochs": epochs})
            answer = ctx.ask(self.take_turn, {client: task}, keep_updates=True, among=len(explorers))
            for update in answer.updates.values():  # none if it diverged
                flat = torch.where(update.mask.flat, update.params.flat, after.flat)
                before, after = after, Params(flat, ctx.layout)
        if after is state.params:
            raise MethodError(DIVERGED.format(len(explorers)))
        moved = loss_deviation(before, after)[ctx.layout.prunable_flat]
        params = after if self.warm_start else state.params
        mask = self.mask_from_scouts([moved], ctx.model)
        return replace(state, params=params, mask=mask, memory=AutoFLIPMemory())

    def explore(self, task: Task, client: Client) -> Params:
        """ON THE DEVICE: train for some epochs, or until the loss has not fallen for a while."""
        params, best, waited = task.params, inf, 0
        for _ in range(task.extra("epochs", int)):
            params = client.sgd(params, task.mask, epochs=1)
            loss = as_loss(client.meter.last_loss)
            waited = 0 if loss < best else waited + 1
            best = min(best, loss)
            if waited == self.patience:
                break
        return params

    def take_turn(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: explore, and return the model."""
        return ClientUpdate(self.explore(task, client), task.mask)

    def scout(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: explore, and return the squared movement of each prunable weight."""
        layout, nothing = task.mask.layout, Mask.none(task.mask.layout)
        moved = loss_deviation(task.params, self.explore(task, client))[layout.prunable_flat]
        if self.follows:
            return ClientUpdate(task.params, nothing, each={"movement": moved})
        if not self.agreement:
            return ClientUpdate(task.params, nothing, sums={"movement": moved})
        return ClientUpdate(task.params, nothing, sums={"movement": moved, "votes": self.vote(moved, layout)})

    def aggregate(
        self, state: ServerState[AutoFLIPMemory], cohort: CohortUpdate
    ) -> ServerState[AutoFLIPMemory]:
        """Take the mean, or a step with momentum towards it."""
        if not self.server_momentum or not cohort.folded:
            return super().aggregate(state, cohort)
        params, mean = state.params, cohort.mean(otherwise=state.params)
        past = 0.0 if state.memory.velocity is None else state.memory.velocity
        velocity = self.server_momentum * past + (1 - self.server_momentum) * (mean.flat - params.flat)
        # a pruned weight forgets its momentum; running statistics have none
        moves = state.mask.flat & params.layout.trainable_flat
        velocity = torch.where(moves, velocity, 0.0)
        flat = torch.where(moves, params.flat + velocity, mean.flat)
        memory = replace(state.memory, velocity=velocity)
        return replace(state, params=Params(flat, params.layout), memory=memory)

    def prune(
        self, state: ServerState[AutoFLIPMemory], cohort: CohortUpdate, ctx: ServerContext
    ) -> ServerState[AutoFLIPMemory]:
        """Rebuild the mask from the explorations of the round's clients."""
        scouts = state.memory.scouts
        present = [scouts[record.client] for record in cohort.folded if record.client in scouts]
        if not present:
            return state
        return replace(state, mask=self.mask_from_scouts(present, ctx.model))

    def mask_from_scouts(self, scouts: Sequence[Tensor], model: ModelSpec) -> Mask:
        """Return the mask of some explorers, each given as the squared movement of prunable weights."""
        moved, votes = torch.zeros_like(scouts[0]), torch.zeros_like(scouts[0])
        for scout in scouts:
            moved += scout / len(scouts)
            if self.agreement:
                votes += self.vote(scout, model.layout) / len(scouts)
        return self.mask_of(moved, votes, model)

    def vote(self, moved: Tensor, layout: Layout) -> Tensor:
        """Return the prunable weights that one explorer's guidance keeps: bool, like the movement."""
        return self.keep(self.guidance(moved, layout), layout).flat[layout.prunable_flat]

    def mask_of(self, moved: Tensor, votes: Tensor, model: ModelSpec) -> Mask:
        """Return the mask for a mean movement and a mean vote of each prunable weight."""
        layout = model.layout
        guidance, agreed = self.guidance(moved, layout), torch.zeros(layout.size)
        agreed[layout.prunable_flat] = votes.float()
        scores = (1 - self.agreement) * guidance + self.agreement * agreed
        mask = self.keep(torch.where(guidance.isinf(), guidance, scores), layout)
        for group in model.channel_groups if self.structured else ():
            # in order: a removed channel may leave a row of the next layer empty
            alive = mask[group.rows[0]].reshape(group.size, -1).any(1)
            if bool(alive.any()):  # a layer that lost all its weights keeps its biases, to pass something on
                mask = channel_mask(layout, (group,), {group.name: alive}, within=mask)
        # a layer whose last columns went with channels before it takes others
        removed = removed_entries(mask, model.channel_groups)
        return filled(mask, scores, self.min_layer, among=~removed)

    def guidance(self, moved: Tensor, layout: Layout) -> Tensor:
        """Return the scaled movement as a score (size,) of each weight."""
        scores = torch.zeros(layout.size)
        scores[layout.prunable_flat] = moved
        return scaled_per_layer(scores, layout, self.scaling)

    def keep(self, scores: Tensor, layout: Layout) -> Mask:
        """Keep scores above the quantile, of all tensors or of each, and at least `min_layer` of each."""
        kept, prunable = torch.ones(layout.size, dtype=torch.bool), layout.prunable_flat
        if self.quantile == "global":
            kept[prunable] = above_quantile(scores[prunable], self.threshold)
            return filled(Mask(kept, layout), scores, self.min_layer)
        for name in layout.prunable_names:
            span = layout.spans[name]
            kept[span] = above_quantile(scores[span], self.threshold)
        return filled(Mask(kept, layout), scores, self.min_layer)
