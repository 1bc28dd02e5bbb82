"""CEAFL: communication-efficient adaptive federated pruning, a RECONSTRUCTION.  Pei et al., 2026.

Clients score the weights of the untrained model by gradient importance, and the server prunes it once before
round 1. Every few rounds it prunes again: more, the more the loss has fallen since the last event, and
nothing if that would raise the validation loss too much. Some of the removed weights are grown elsewhere,
where gradients are large. After such an event clients fine-tune for an epoch, taught by an ensemble of the
cohort's classifiers.

Differs from the paper: unknown, only the abstract was available (Journal of Chinese Computer Systems 47(5),
1225-1235). The abstract names an initial and an adaptive stage, both by gradient importance, and a
fine-tuning that reuses an ensemble of classifiers and respects the distribution of the data. The rest is
ours:
* importance is |g·w|: `importance`; in the second stage g is how a weight moved, without a backward pass;
* the extent of an event: `kappa`, `kappa0`, `min_density`; its rollback: `rollback`;
* growing where the gradient of one batch is largest: `regrow`;
* a class's row of a classifier counts by the client's examples of that class: `alpha`; the ensemble is
  distilled: `kd_weight`, `temperature`.

An ensemble Σ_k α_k,c (W_k φ + b_k)_c of linear classifiers IS one linear classifier, with the rows
Σ_k α_k,c W_k,c. So clients get this one classifier, and the server needs only sums for it.
"""

from dataclasses import dataclass, replace
from math import ceil, isfinite
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedray.comparing import no_worse
from fedray.errors import MethodError
from fedray.federation.aggregate import CohortUpdate
from fedray.federation.client import Client, Step
from fedray.federation.method import Method, ServerContext, Setting
from fedray.pruning.masks import grow, top_k
from fedray.pruning.recovery import classifier, classify, distillation, ensemble
from fedray.pruning.schedules import due, events, no_event
from fedray.pruning.scores import sensitivity
from fedray.pruning.votes import cast, tally
from fedray.types import (
    ClientInfo,
    ClientUpdate,
    Density,
    Extra,
    Fraction,
    Mask,
    NonNegativeFloat,
    NonNegativeInt,
    Params,
    PositiveFloat,
    PositiveInt,
    ServerState,
    Task,
)

Share = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class CEAFLMemory:
    """The server's memory.

    Args:
        events: the rounds after which it may prune; their step is the interval.
        losses: mean training loss of each round of the last two intervals.
        done: the round of the last event that was decided; 0 before the first.
        finetune: the round after the last event, in which clients recover; 0 before the first.
        teacher: (classes, width + 1), weights and bias of the ensemble, for that round.
    """

    events: range
    losses: tuple[float, ...] = ()
    done: int = 0
    finetune: int = 0
    teacher: Tensor | None = None

    def due(self, round: int) -> bool:
        """Whether a round has an event: a scheduled one, or an earlier one that had no update."""
        return due(self.events, self.done, round)


@dataclass(frozen=True, kw_only=True)
class CEAFL(Method[CEAFLMemory]):
    """Prune before training, prune again as the loss falls, and fine-tune with an ensemble of classifiers.

    Args:
        importance: of a weight: |g·w|, |g| or g².
        initial_density: share of the prunable weights that is kept before round 1.
        scorers: clients that compute the importance in the untrained model.
        scorer_batches: batches for that, of each of them.
        interval: rounds between events; None: a tenth of the run, at most 10.
        until: last event, as a share of the run's rounds.
        min_density: the model is never pruned below this.
        kappa: an event lowers the density by this factor times the relative fall of the loss in an interval.
        kappa0: an event lowers the density by this share in addition.
        mu: weight of the past in a client's running mean of importance.
        rollback: an event that raises the validation loss by a larger share is undone.
        regrow: weights that an event grows, as a share of the weights that it removes.
        finetune_epochs: of a client after an event, before its local ones; 0 for no fine-tuning.
        kd_weight: of the distillation in its loss; 0 for no ensemble.
        temperature: of the distillation.
        alpha: weight of a client's classifier: its examples of each class, or the same for all clients.
    """

    citation: ClassVar[str] = "Pei et al., Journal of Chinese Computer Systems 47(5), 2026"
    prunes: ClassVar[bool] = True
    needs: ClassVar[str] = "a linear classifier; validation data"

    importance: Literal["gw", "g", "g2"] = "gw"
    initial_density: Density = 0.7
    scorers: PositiveInt = 10
    scorer_batches: PositiveInt = 4
    interval: PositiveInt | None = None
    until: Fraction = 0.6
    min_density: Density = 0.3
    kappa: NonNegativeFloat = 1.0
    kappa0: Fraction = 0.02
    mu: Share = 0.9
    rollback: NonNegativeFloat = 0.05
    regrow: Share = 0.2
    finetune_epochs: NonNegativeInt = 1
    kd_weight: Fraction = 0.5
    temperature: PositiveFloat = 2.0
    alpha: Literal["class", "uniform"] = "class"

    @property
    def uses_validation_data(self) -> bool:
        """Whether there are events: the rollback needs it."""
        return self.until > 0

    @property
    def taught(self) -> bool:
        """Whether an ensemble teaches."""
        return self.finetune_epochs > 0 and self.kd_weight > 0

    def events(self, rounds: int) -> range:
        """Return the rounds after which the server may prune."""
        return events(rounds, self.interval, self.until, parts=10, most=10)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The mean loss of its clients, by which it rolls back."""
        return ("train/loss",)

    def check(self, setting: Setting) -> str | None:
        """Refuse a floor above the start, an interval without event, fine-tuning without a classifier."""
        if self.min_density > self.initial_density:
            above = f"method.initial_density={self.initial_density}"
            return f"method.min_density={self.min_density} is above {above}"
        found = self.events(setting.rounds)
        asked = self.interval is not None and self.until > 0
        if asked and (fault := no_event(found, found.step, self.until, setting.rounds, "prunes on")):
            return fault
        if self.finetune_epochs and not any(isinstance(m, nn.Linear) for m in setting.model.module.modules()):
            return (
                f"method.finetune_epochs must be 0: {setting.model.name} has no linear layer as a classifier"
            )
        return None

    @property
    def depends_on_rounds(self) -> str | None:
        """The last event."""
        return "method.until is a share of the run's rounds"

    def setup(self, state: ServerState[CEAFLMemory], ctx: ServerContext) -> ServerState[CEAFLMemory]:
        """Stage 1: ask some clients for the importance in the untrained model, and prune it."""
        task = Task(state.params, state.mask)
        scored = ctx.ask(self.first_scores, {client: task for client in ctx.sample(self.scorers)})
        if not scored.folded:
            raise MethodError(
                f"the scores of all {len(scored.records)} scorers are not finite: check the data and model"
            )
        mask = top_k(
            self.scores(scored, state.mask), self.initial_density, ctx.layout, min_layer=self.min_layer
        )
        return replace(state, mask=mask, memory=CEAFLMemory(self.events(ctx.rounds)))

    def first_scores(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: the importance of each weight in the untrained model."""
        gradient = client.grad(task.params, task.mask, batches=self.scorer_batches)
        weights = client.model.forward_params(task.params, task.mask)
        scores = self.shares(self.score(weights, gradient), task.mask, client)
        return ClientUpdate(task.params, Mask.none(task.mask.layout), sums={"importance": scores})

    def configure(self, state: ServerState[CEAFLMemory], client: ClientInfo) -> Task:
        """Ask a client to keep scores, to send them, or to recover from the last event, beside training."""
        memory, extras = state.memory, dict[str, Extra]()
        if memory.due(state.round) or (memory.events and state.round <= memory.events[-1]):
            extras["track"] = True
        removed, grown = self.plan(state)
        if removed:
            extras["grow"] = grown
        if self.finetune_epochs and state.round == memory.finetune:
            extras["finetune"] = True
            if memory.teacher is not None:
                extras["teacher"] = memory.teacher
        return Task(state.params, state.mask, extras=extras)

    def plan(self, state: ServerState[CEAFLMemory]) -> tuple[int, int]:
        """Return the numbers of weights that this round's event removes and grows; 0, 0 without an event.

        It uses the losses up to the round before, since clients vote for growth while they train.
        """
        memory, layout = state.memory, state.mask.layout
        if not memory.due(state.round):
            return 0, 0
        every = memory.events.step
        last, before = memory.losses[-every:], memory.losses[-2 * every : -every]
        fall = 1 - (sum(last) / len(last)) / (sum(before) / len(before)) if sum(before) else 0.0
        fall = fall if isfinite(fall) else 0.0  # a loss of NaN or infinity has not fallen
        target = state.mask.density * (1 - self.kappa * min(1.0, max(0.0, fall)) - self.kappa0)
        size = layout.prunable_count
        held = round(state.mask.density * size)
        fewer = held - round(max(self.min_density, target) * size)
        # as many more are removed as grow, so that the density meets the target
        grown = min(round(fewer * self.regrow / (1 - self.regrow)), size - held, held - fewer)
        return fewer + grown, grown

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: recover after an event, train, keep scores, and send them if asked to."""
        start = self.finetune(task, client) if "finetune" in task.extras else task.params
        params, mask = client.sgd(start, task.mask), task.mask
        if "track" not in task.extras:
            client.memory.clear()
            return ClientUpdate(params, mask)
        metrics = {"loss": client.meter.loss}
        scores = self.remember(start, params, mask, client)
        if "grow" not in task.extras:
            return ClientUpdate(params, mask, metrics=metrics)
        sums = {"importance": self.shares(scores, mask, client)} | self.lesson(params, client)
        count = task.extra("grow", int)
        vote = cast(client.grad(params, mask, batches=1), count, mask) if count else {}
        return ClientUpdate(params, mask, sums=sums, each=vote, metrics=metrics)

    def score(self, params: Params, gradient: Tensor) -> Tensor:
        """Return the importance (size,) of each weight."""
        if self.importance == "gw":
            return sensitivity(params, gradient)
        return gradient.abs() if self.importance == "g" else gradient.square()

    def shares(self, scores: Tensor, mask: Mask, client: Client) -> Tensor:
        """Return the scores of prunable weights held, as shares of their sum, times the client's examples."""
        held = scores[mask.flat & mask.layout.prunable_flat]
        return held * (client.num_examples / held.sum().clamp_min(1e-30))

    def remember(self, before: Params, after: Params, mask: Mask, client: Client) -> Tensor:
        """Return the client's mean importance (size,) of each weight over its rounds, this one included."""
        steps = self.local_steps(client.num_examples)
        now = self.score(after, (before.flat - after.flat) / (client.lr * steps))
        past = client.recall("importance", Tensor)
        past = now if past is None else past
        # the mean of a new weight starts with this round; a past of 0 would get it pruned first
        mean = torch.where(past > 0, self.mu * past + (1 - self.mu) * now, now)
        client.memory["importance"] = torch.where(mask.flat, mean, 0.0)
        return mean

    def lesson(self, params: Params, client: Client) -> dict[str, Tensor]:
        """Return the client's classifier, its rows times their weights in the ensemble; and these weights."""
        if not self.taught:
            return {}
        rows = classifier(params, client.model.head)
        weights = torch.bincount(client.y, minlength=len(rows)).float()
        if self.alpha == "uniform":
            weights = torch.ones(len(rows))
        return {"classifiers": rows * weights[:, None], "weights": weights}

    def finetune(self, task: Task, client: Client) -> Params:
        """ON THE DEVICE: recover, taught by the ensemble; the classifier is frozen in the first half."""
        teacher = task.extra("teacher", Tensor) if "teacher" in task.extras else None
        head = client.model.head
        resting = self.finetune_epochs * ceil(client.num_examples / self.batch_size) // 2

        def loss(step: Step) -> Tensor:
            logits = step.logits
            if step.index < resting and step.features.requires_grad:  # else there is only the classifier
                logits = classify(classifier(step.weights, head).detach(), step.features)
            value = cross_entropy(logits, step.y)
            if teacher is None:
                return value
            taught = classify(teacher.to(logits.device), step.features)
            divergence = distillation(logits, taught, self.temperature)
            return (1 - self.kd_weight) * value + self.kd_weight * divergence

        return client.sgd(task.params, task.mask, epochs=self.finetune_epochs, loss=loss)

    def prune(
        self, state: ServerState[CEAFLMemory], cohort: CohortUpdate, ctx: ServerContext
    ) -> ServerState[CEAFLMemory]:
        """Stage 2: at an event prune and grow, unless the validation loss rises too much; keep the losses."""
        memory = state.memory
        if state.round == memory.finetune and cohort.folded:  # the cohort had its lesson
            memory = replace(memory, teacher=None)
        elif state.round == memory.finetune:  # the next cohort gets it
            memory = replace(memory, finetune=state.round + 1)
        if "loss" not in cohort.metrics:  # no update counted, or the last event is over
            return replace(state, memory=memory)
        removed, grown = self.plan(state)
        losses = (*memory.losses, cohort.metrics["loss"])[-2 * memory.events.step :]
        done = state.round if memory.due(state.round) else memory.done
        memory = replace(memory, losses=losses, done=done)
        state = replace(state, memory=memory)
        if not removed:
            return state
        density = state.mask.density - removed / ctx.layout.prunable_count
        scores = self.scores(cohort, state.mask)
        kept = top_k(scores, density, ctx.layout, within=state.mask, min_layer=self.min_layer)
        votes = [(ctx.clients[k].num_examples, vote) for k, vote in sorted(cohort.each.items())]
        mask = grow(tally(votes, state.mask), grown, ctx.layout, within=kept)
        params = state.params.masked(state.mask)  # grown weights start from zero
        before, after = (ctx.validate(params, held)[1] for held in (state.mask, mask))
        if not no_worse(after, (1 + self.rollback) * before):
            return state
        teacher = None
        if self.taught:
            own = classifier(params, ctx.model.head)
            teacher = ensemble(cohort.sum("classifiers"), cohort.sum("weights"), otherwise=own)
        memory = replace(memory, finetune=state.round + 1, teacher=teacher)
        return replace(state, params=params, mask=mask, memory=memory)

    def forgets(self, state: ServerState[CEAFLMemory]) -> bool:
        """Whether the last event is over: no client is asked for its importance after it."""
        memory = state.memory
        return bool(memory.events) and memory.done == state.round >= memory.events[-1]

    def scores(self, cohort: CohortUpdate, mask: Mask) -> Tensor:
        """Return the cohort's importance (size,) of the weights held, up to a factor."""
        scores = torch.zeros(mask.layout.size)
        scores[mask.flat & mask.layout.prunable_flat] = cohort.sum("importance")
        return scores
