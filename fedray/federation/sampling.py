"""Client samplers: step 1 of a round, who takes part.

A sampler draws the cohort and learns from its records. It is a frozen dataclass of options; the server
keeps its memory in the checkpoint. No sampler walks over all registered clients in a round.

A new sampler subclasses `Sampler`, and a line in `SAMPLERS` gives it a name for `clients.sampler.name`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf, isfinite, log
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import ConfigDict, Field

from fedray.errors import MethodError
from fedray.federation.client import Client
from fedray.federation.population import Population, sample, wait_for_any
from fedray.types import (
    ClientRecord,
    ClientUpdate,
    Fraction,
    Mask,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Task,
)

Ids = tuple[int, ...]

Share = Annotated[float, Field(gt=0, le=1)]

MOST_OVER_SELECTION = 1000


@dataclass
class SamplerContext:
    """The tools of a sampler in one round: clients, availability, predicted times, losses.

    Args:
        round: the round, from 1.
        cohort: number of clients that the round should train.
        clients: all registered clients; looking one up is cheap, walking over all of them is not.
        rng: the round's generator for sampling.
        predicted_seconds: client → simulated seconds that its part of the round will take.
        losses: clients → mean loss of the current model on the examples of each. The server sends the model,
            each client makes one forward pass, and all of it is metered. A client without an answer is
            missing.

    Attributes:
        present: clients found available in this round.
        waited_s: simulated seconds that the server waited for the first available client.
    """

    round: int
    cohort: int
    clients: Population
    rng: np.random.Generator
    predicted_seconds: Callable[[int], float]
    losses: Callable[[Sequence[int]], Mapping[int, float]]
    present: set[int] = field(default_factory=set, init=False)
    waited_s: float = field(default=0.0, init=False)

    def available(self, count: int) -> Ids:
        """Draw up to `count` different available clients, uniformly; their ids, sorted.

        The server waits until at least one client is available, and charges the wait.

        Raises:
            RunError: if no client becomes available.
        """
        count = min(count, len(self.clients))
        if self.present:
            drawn = sample(self.clients, count, self.rng)
        else:
            drawn, waited_s = wait_for_any(self.clients, count, self.rng)
            self.waited_s += waited_s
        self.present.update(drawn)
        return drawn

    def is_available(self, client: int) -> bool:
        """Draw whether a client is available now; one found available stays so for the round."""
        if client not in self.present and self.rng.random() < self.clients.fleet.availability[client]:
            self.present.add(client)
        return client in self.present


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws available clients uniformly.

    The base class of every sampler.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
    citation: ClassVar[str] = "McMahan et al., AISTATS 2017"

    def draw(self, memory: Any, ctx: SamplerContext) -> Ids:
        """Return the cohort: different ids, at least one.

        For a client that neither `ctx.available` nor `ctx.is_available` found, the server waits until it is
        available, and charges the wait.

        Args:
            memory: the result of the last `learn`; None in the first round.
            ctx: the sampler's tools in this round.
        """
        return ctx.available(ctx.cohort)

    def learn(self, memory: Any, records: Sequence[ClientRecord], round: int) -> Any:
        """Return the memory after a round: a new object, never the old one changed.

        Args:
            memory: before the round.
            records: one for each client of the cohort, with its fate, cost and training loss.
            round: the round that ended.
        """
        return memory


@dataclass(frozen=True, kw_only=True)
class Fastest(Sampler):
    """Over-selection: draws more clients than needed and keeps the fastest, by predicted seconds.

    Args:
        over_selection: share of the cohort drawn in excess; Bonawitz et al. take 0.3.
    """

    citation: ClassVar[str] = "Bonawitz et al., MLSys 2019"

    over_selection: Annotated[NonNegativeFloat, Field(le=MOST_OVER_SELECTION)] = 0.3

    def draw(self, memory: Any, ctx: SamplerContext) -> Ids:
        """Return the fastest of the clients drawn."""
        return fastest(ctx.available(round(ctx.cohort * (1 + self.over_selection))), ctx)


@dataclass(frozen=True)
class Losses:
    """The last known loss of each client that ever trained."""

    of: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PowerOfChoice(Sampler):
    """Power of choice: draws candidates and keeps those with the highest loss.

    Candidates are drawn in proportion to their numbers of examples, among four times as many available
    clients drawn uniformly; the paper draws among all clients, which would walk over them.

    Args:
        candidates: candidates per client of the cohort (d of the paper is their number); 1 is sampling in
            proportion to examples.
        ask: candidates report the loss of the current model, for a download and a forward pass each (π_pow-d
            of the paper). False takes the last training loss that the server knows, at no cost; a client that
            never trained comes first (π_rpow-d).

    Source: Cho, Wang and Joshi, "Client selection in federated learning: convergence analysis and
        power-of-choice selection strategies", 2020.
    """

    citation: ClassVar[str] = "Cho et al., arXiv 2010.01243, 2020"

    candidates: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    ask: bool = True

    def draw(self, memory: Losses | None, ctx: SamplerContext) -> Ids:
        """Return the candidates with the highest losses; of equals the one with the lower id."""
        candidates = self._candidates(ctx)
        if len(candidates) <= ctx.cohort:
            return candidates
        known = ctx.losses(candidates) if self.ask else (memory or Losses()).of
        silent = -inf if self.ask else inf
        value = {k: _as_worst(known.get(k, silent)) for k in candidates}
        return tuple(sorted(sorted(candidates, key=lambda k: (-value[k], k))[: ctx.cohort]))

    def learn(self, memory: Losses | None, records: Sequence[ClientRecord], round: int) -> Losses | None:
        """Note the training losses of the round, unless candidates are asked for theirs."""
        if self.ask:
            return memory
        new = {r.client: r.loss for r in records if isfinite(r.loss)}
        return Losses({**(memory or Losses()).of, **new})

    def _candidates(self, ctx: SamplerContext) -> Ids:
        """Draw d available clients in proportion to their examples."""
        wanted = min(len(ctx.clients), ceil(self.candidates * ctx.cohort))
        sizes = ctx.clients.partition.sizes
        pool = ctx.available(min(len(ctx.clients), 4 * wanted))
        if len(pool) <= wanted:
            return pool
        # exponential races: the smallest of Exp(1)/n_k are a draw without replacement in proportion to n_k
        races = ctx.rng.exponential(size=len(pool)) / np.maximum(sizes[list(pool)], 1e-9)
        return tuple(sorted(pool[i] for i in np.argsort(races, kind="stable")[:wanted]))


@dataclass(frozen=True, eq=False)
class OortMemory:
    """What Oort knows of the clients that ever took part; arrays are parallel, in order of client.

    Args:
        clients: int64 (e,), ids of the explored clients, ascending.
        utility: float64 (e,), statistical utility when each took part last.
        seconds: float64 (e,), simulated seconds that it took then.
        seen: int64 (e,), the round in which it took part last.
        times: int64 (e,), how often it took part.
        preferred_s: T, the preferred duration of a round; 0 before the first round.
        history: the summed utility of each round so far, for the pacer.
    """

    clients: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    utility: np.ndarray = field(default_factory=lambda: np.zeros(0))
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(0))
    seen: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    times: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    preferred_s: float = 0.0
    history: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Oort(Sampler):
    """Oort: prefers fast clients of high statistical utility; a share of each cohort never took part.

        utility_k = |B_k| · loss_k   (+ clip)   + √(0.1 ln R / last_k),   × (T / t_k)^penalty where t_k > T

    The artifact scales utilities to [0, 1] before it adds the bonus for clients not seen for long; the
    paper's Algorithm 1 does not (`scaled`).

    Differs from the paper: its utility is |B|·√(mean of squared losses) over examples; a client's record
    carries the mean training loss, which stands in for the root (it is at most as large). Speeds of
    unexplored clients are predicted from their profiles, as the paper does from device models.

    Args:
        exploration: share of clients in the first cohort that never took part.
        exploration_decay: factor of that share from round to round.
        exploration_min: lower bound of that share.
        penalty: exponent α for clients that are slower than the preferred duration.
        pacer_rounds: rounds whose summed utility the pacer compares (W of the paper).
        pacer_step_s: simulated seconds that the pacer adds (Δ); null adds a tenth of the preferred duration.
        cut_off: clients whose utility is at least this share of the last admitted one may be drawn.
        clip: utilities above this quantile count as the quantile: outliers do not monopolise a cohort.
        most_times: rounds after which a client is not exploited any more; null sets no limit.
        scaled: scale utilities to [0, 1] before the bonus is added.

    Source: Lai, Zhu, Madhyastha and Chowdhury, "Oort: efficient federated learning via guided participant
        selection", OSDI 2021, Algorithm 1; defaults as in its artifact.
    """

    citation: ClassVar[str] = "Lai et al., OSDI 2021"

    exploration: Fraction = 0.9
    exploration_decay: Share = 0.98
    exploration_min: Fraction = 0.2
    penalty: NonNegativeFloat = 2.0
    pacer_rounds: PositiveInt = 20
    pacer_step_s: PositiveFloat | None = None
    cut_off: Share = 0.95
    clip: Share = 0.95
    most_times: PositiveInt | None = None
    scaled: bool = True

    def draw(self, memory: OortMemory | None, ctx: SamplerContext) -> Ids:
        """Return explored clients of high utility, and unexplored ones that are predicted to be fast."""
        memory = memory or OortMemory()
        share = max(self.exploration_min, self.exploration * self.exploration_decay ** (ctx.round - 1))
        exploited = self._exploit(memory, ctx, ctx.cohort - round(share * ctx.cohort))
        missing = ctx.cohort - len(exploited)
        explored = self._explore(memory, ctx, missing, exploited)
        drawn = {*exploited, *explored}
        if len(drawn) < ctx.cohort:  # too few are new or available: fill up with any available client
            others = [k for k in ctx.available(min(len(ctx.clients), 2 * ctx.cohort)) if k not in drawn]
            drawn |= set(others[: ctx.cohort - len(drawn)])
        return tuple(sorted(drawn))

    def learn(self, memory: OortMemory | None, records: Sequence[ClientRecord], round: int) -> OortMemory:
        """Note utility and seconds of the clients that counted; move the pacer."""
        memory = memory or OortMemory()
        counted = {r.client: r for r in records if r.fate == "folded"}
        utility = {k: r.num_examples * max(0.0, _as_worst(r.loss)) for k, r in counted.items()}
        utility = {k: value for k, value in utility.items() if isfinite(value)}
        history = (*memory.history, sum(utility.values()))
        memory = _noted(memory, {k: (utility[k], counted[k].cost.seconds) for k in utility}, round)
        return replace(memory, history=history, preferred_s=self._paced(memory, history))

    def _paced(self, memory: OortMemory, history: tuple[float, ...]) -> float:
        """Return T: the median of what clients took at first; longer whenever utility has fallen."""
        if not memory.preferred_s:
            return float(np.median(memory.seconds)) if len(memory.seconds) else 0.0
        window = self.pacer_rounds
        due = len(history) >= 2 * window and len(history) % window == 0
        if due and sum(history[-2 * window : -window]) > sum(history[-window:]):
            return memory.preferred_s + (self.pacer_step_s or memory.preferred_s / 10)
        return memory.preferred_s

    def _exploit(self, memory: OortMemory, ctx: SamplerContext, count: int) -> list[int]:
        """Draw explored clients in proportion to utility, among those above the cut-off."""
        if count <= 0 or not len(memory.clients):
            return []
        utility = np.minimum(memory.utility, np.quantile(memory.utility, self.clip))
        if self.scaled:
            utility = (utility - utility.min()) / max(float(np.ptp(utility)), 1e-12)
        utility = utility + np.sqrt(0.1 * log(max(ctx.round, 2)) / np.maximum(memory.seen, 1))
        slow = memory.seconds > memory.preferred_s if memory.preferred_s else np.zeros(len(utility), bool)
        utility[slow] *= (memory.preferred_s / memory.seconds[slow]) ** self.penalty
        if self.most_times is not None:
            utility[memory.times >= self.most_times] = 0.0
        order = np.argsort(-utility, kind="stable")
        bar = self.cut_off * utility[order[min(count, len(order)) - 1]]
        admitted = order[(utility[order] >= bar) & (utility[order] > 0)]
        races = ctx.rng.exponential(size=len(admitted)) / np.maximum(utility[admitted], 1e-12)
        chosen: list[int] = []
        for index in admitted[np.argsort(races, kind="stable")].tolist():
            client = int(memory.clients[index])
            if len(chosen) < count and ctx.is_available(client):
                chosen.append(client)
        return chosen

    def _explore(
        self, memory: OortMemory, ctx: SamplerContext, count: int, taken: Sequence[int]
    ) -> list[int]:
        """Draw unexplored clients, those first that are predicted to be fast."""
        if count <= 0:
            return []
        drawn = ctx.available(min(len(ctx.clients), 4 * count))
        place = np.searchsorted(memory.clients, drawn)
        known = np.append(memory.clients, -1)[np.minimum(place, len(memory.clients))] == np.array(drawn)
        new = [k for k, seen in zip(drawn, known.tolist(), strict=True) if not seen and k not in taken]
        return sorted(new, key=lambda k: (ctx.predicted_seconds(k), k))[:count]


SAMPLERS: dict[str, type[Sampler]] = {
    "uniform": Sampler,
    "fastest": Fastest,
    "power_of_choice": PowerOfChoice,
    "oort": Oort,
}
"""Name → sampler: what `clients.sampler.name` chooses."""


def fastest(drawn: Sequence[int], ctx: SamplerContext) -> Ids:
    """Return the `ctx.cohort` clients of least predicted seconds, sorted by id; all if there are fewer."""
    if len(drawn) <= ctx.cohort:
        return tuple(drawn)
    return tuple(sorted(sorted(drawn, key=lambda k: (ctx.predicted_seconds(k), k))[: ctx.cohort]))


def expect_cohort(drawn: object, sampler: Sampler, population: int) -> Ids:
    """Return a sampler's cohort as sorted ids.

    Raises:
        MethodError: if it is empty, or holds anything but different ids of registered clients.
    """
    name = f"clients.sampler: the cohort that {type(sampler).__name__}.draw returned"
    if not isinstance(drawn, Sequence) or not all(isinstance(k, int | np.integer) for k in drawn):
        raise MethodError(f"{name} is {str(drawn)[:60]}; return a tuple of client ids")
    ids = sorted(map(int, drawn))
    if not ids:
        raise MethodError(f"{name} is empty; return one client or more, e.g. from ctx.available(ctx.cohort)")
    if len(set(ids)) < len(ids):
        twice = sorted({k for k in ids if ids.count(k) > 1})
        raise MethodError(f"{name} holds clients {twice[:5]} more than once")
    if ids[0] < 0 or ids[-1] >= population:
        unknown = [k for k in ids if not 0 <= k < population]
        raise MethodError(f"{name} holds clients {unknown[:5]}; the registered ones are 0 … {population - 1}")
    return tuple(ids)


def loss_of_model(task: Task, client: Client) -> ClientUpdate:
    """ON THE DEVICE: the mean loss of the task's model on the client's examples; no weights are sent."""
    silent = ClientUpdate(task.params, Mask.none(task.mask.layout))
    if not client.num_examples:
        return silent
    loss = torch.tensor(client.evaluate(task.params, task.mask).loss, dtype=torch.float32)
    # the server leaves out an update that is not finite; a loss of NaN or infinity arrives as the largest
    largest = torch.finfo(torch.float32).max
    return replace(silent, each={"loss": torch.nan_to_num(loss, nan=largest, posinf=largest)})


def _as_worst(loss: float) -> float:
    """Return a loss with NaN as infinity."""
    return inf if loss != loss else loss


def _noted(memory: OortMemory, new: Mapping[int, tuple[float, float]], round: int) -> OortMemory:
    """Return the memory with utility and seconds of some clients, in order of client."""
    if not new:
        return memory
    clients = np.array(sorted(new), dtype=np.int64)
    both = np.union1d(memory.clients, clients)
    old, fresh = np.searchsorted(both, memory.clients), np.searchsorted(both, clients)

    def merged(values: np.ndarray) -> np.ndarray:
        out = np.zeros(len(both), dtype=values.dtype)
        out[old] = values
        return out

    utility, seconds = merged(memory.utility), merged(memory.seconds)
    utility[fresh] = [new[k][0] for k in clients.tolist()]
    seconds[fresh] = [new[k][1] for k in clients.tolist()]
    seen, times = merged(memory.seen), merged(memory.times)
    seen[fresh] = round
    times[fresh] += 1
    return replace(memory, clients=both, utility=utility, seconds=seconds, seen=seen, times=times)
