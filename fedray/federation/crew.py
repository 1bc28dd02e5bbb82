"""The client actors of a pool: created, called, watched, and replaced when they are lost.

    works → idle actors → answers          an actor that dies, hangs or lacks memory → its work in parts

The actors that are left do the work of a lost one, in smaller parts each time, down to single clients; so a
client is known whose actor is lost again and again. A new actor is created, and takes part once it is ready.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedray.errors import FedrayError, RunError
from fedray.federation.losses import Loss, cause_of, first_line, too_little_memory
from fedray.federation.patience import Clock, Patience, Size

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

logger = logging.getLogger(__name__)

STRIKES = 3
"""Actors that may be lost to one client that trains alone."""
TICK_S = 1.0
"""Seconds between two looks at calls that are not answered."""
REST_S = 60.0
"""Seconds before another actor takes the place of one that ran out of memory; doubled each time."""
FIRST_LOOK_S, LOOK_S = 10.0, 60.0
"""Seconds without an actor until the crew asks what it waits for, and until it asks again."""


Busy = Callable[[int, Any], str | None]
"""Of the group and the handle of an actor: what it waits for; None if other work does not hold its place."""

Key = tuple[int, ...]
"""Names a work among those that are done together."""


@dataclass(frozen=True, eq=False)
class Work:
    """One call to an actor.

    Args:
        key: names its answer.
        method: of the actor.
        arguments: of the method.
        size: what its time limit follows.
        group: of the actors that may do it; None: any.
        seat: of the actor that should do it, as long as that one is ready; None: any.
        keeps: the method returns two values, of which the second one stays in the object store.
        parts: makes smaller works that do as well; None if it has no parts.
        abandon: makes the answer of a work without parts to which too many actors were lost; None: it is
            tried again.
        tries: actors that may be lost before it is done in parts, or abandoned.
        losses: actors that were lost to it.
    """

    key: Key
    method: str
    arguments: tuple[Any, ...]
    size: Size
    group: int | None = None
    seat: int | None = None
    keeps: bool = False
    parts: "Callable[[], Sequence[Work]] | None" = None
    abandon: Callable[[Loss], Any] | None = None
    tries: int = 1
    losses: int = 0


class Head:
    """The head of a cluster, as a crew asks it; this one is never lost."""

    def check(self, *, now: bool = False) -> None:
        """Raise if the head is lost. `now`: ask it in any case, since the next call to Ray needs it.

        Raises:
            RunError: if it is.
        """

    def answers(self) -> bool:
        """Tell whether the head answers at once."""
        return True


@dataclass(eq=False)
class Seat:
    """A place for an actor: empty, or with an actor that starts or is ready.

    Args:
        number: place among the seats.
        group: group of the actor.
        start: answered once the actor is ready; None before and afterwards.
        since: when the actor was created.
        rests_until: when another actor may be created, by `time.monotonic`.
        shortages: how often an actor in it ran out of memory.
        is_late: whether its actor was not placed in time.
    """

    number: int
    group: int
    actor: "ActorHandle | None" = None
    start: "ObjectRef | None" = None
    since: float = 0.0
    rests_until: float = 0.0
    shortages: int = 0
    is_late: bool = False

    @property
    def is_ready(self) -> bool:
        """Tell whether there is an actor that can be called."""
        return self.actor is not None and self.start is None


class Crew:
    """The actors of a pool.

    Args:
        create: creates the actor of a group.
        groups: group of each actor.
        patience: how long calls may take.
        ready_timeout_s: how long placing and starting actors may take.
        max_deaths: how many losses of actors one exchange survives, beside those to a client alone.
        wanted: the wanted resources, for messages.
        busy: tells what an actor of a group waits for, if other work holds its place. If it does so for all
            actors, the wait has no limit: the crew holds nothing for which others wait.
        head: of the cluster; without it, calls to Ray wait, and cannot be interrupted.
    """

    def __init__(
        self,
        create: "Callable[[int], ActorHandle]",
        groups: Sequence[int],
        *,
        patience: Patience,
        ready_timeout_s: float,
        max_deaths: int,
        wanted: str,
        busy: "Busy" = lambda group, actor: None,
        head: "Head | None" = None,
    ) -> None:
        import ray

        self._ray = ray
        errors = ray.exceptions
        self.losses = (
            errors.RayActorError,
            errors.OutOfMemoryError,
            errors.WorkerCrashedError,
            errors.ObjectLostError,  # of an answer, with the node of its actor
        )
        self.create, self.patience, self.wanted, self.busy = create, patience, wanted, busy
        self.head = head or Head()
        self.ready_timeout_s, self.max_deaths = ready_timeout_s, max_deaths
        self.clock = Clock()
        self.seats = [Seat(number, group) for number, group in enumerate(groups)]
        self.deaths = 0
        self._counted = 0
        self._are_started = False
        self._waits_since: float | None = None
        self._look_at = 0.0
        self.fill()

    def do(self, works: Iterable[Work]) -> dict[Key, Any]:
        """Do works, on whichever actors there are; return the answers by key.

        Raises:
            RunError: if too many actors are lost, or no actor is placed in time.
            FedrayError: of the method or of a client.
        """
        self._counted = 0
        self.assemble()
        return Shift(self, works).finish()

    def ready(self, group: int) -> list[Seat]:
        """Return the seats of a group with an actor that can be called."""
        return [seat for seat in self.seats if seat.group == group and seat.is_ready]

    def close(self) -> None:
        """End the actors; without a head they end with this process."""
        for seat in self.seats if self.head.answers() else ():
            self._dismiss(seat)
        self.seats = []

    def assemble(self) -> None:
        """Note which actors are ready; wait for all of them once, before the first call."""
        self.fill()
        if self._are_started:
            self.watch([], 0)
        while not self._are_started:
            self.watch([])
            self.fill()
            self._are_started = all(seat.start is None or seat.is_late for seat in self.seats)

    def fill(self) -> None:
        """Create an actor in each empty seat that does not rest."""
        for seat in self.seats:
            if seat.actor is None and time.monotonic() >= seat.rests_until:
                seat.actor = self.create(seat.group)
                seat.start, seat.since = seat.actor.ready.remote(), self.clock.now()

    def watch(self, calls: "Iterable[ObjectRef]", timeout_s: float = TICK_S) -> "list[ObjectRef]":
        """Wait a second, at most, for calls and for new actors; return the calls that are answered.

        Raises:
            RunError: if the head of the cluster is lost.
        """
        self.head.check()
        starting = {seat.start: seat for seat in self.seats if seat.start is not None}
        refs = [*calls, *starting]
        if not refs:
            time.sleep(timeout_s)
            return []
        done, _ = self._ray.wait(refs, num_returns=1 if timeout_s else len(refs), timeout=timeout_s)
        for ref in done:
            if ref in starting:
                self._started(starting[ref])
        now = self.clock.now()
        late = [seat for seat in starting.values() if seat.start is not None]
        if any(seat.is_ready for seat in self.seats):
            self._waits_since = None
        elif late:
            self._look(late, now)
        for seat in late:
            if now - seat.since > self.ready_timeout_s:
                self._not_started(seat)
        return [ref for ref in done if ref not in starting]

    def _look(self, starting: Sequence[Seat], now: float) -> None:
        """Say now and then that other work holds the places of all actors, and let the limit begin anew."""
        if self._waits_since is None:
            self._waits_since, self._look_at = now, now + FIRST_LOOK_S
        if now < self._look_at:
            return
        self._look_at = now + LOOK_S
        reasons = [self.busy(seat.group, seat.actor) for seat in starting if seat.actor is not None]
        if reasons and None not in reasons:
            waited_s = now - self._waits_since
            logger.warning("the client actors have waited %.0f s for room: %s", waited_s, reasons[0])
            for seat in starting:
                seat.since = now

    def lost(self, seat: Seat, loss: Loss, *, again: str = "", counts: bool = True) -> None:
        """End what is left of a lost actor, count it, and let the seat rest if memory is short.

        Args:
            seat: of the actor.
            loss: how it was lost.
            again: what becomes of its work, for the log.
            counts: whether it is one of the losses that an exchange survives.

        Raises:
            RunError: if too many actors were lost in this exchange, or the head of the cluster with them.
        """
        self.head.check(now=True)
        self._dismiss(seat)
        self.deaths += 1
        self._counted += counts
        if self._counted > self.max_deaths:
            raise RunError(
                f"{self._counted} client actors were lost in one exchange; the last one {loss.how}: "
                f"{loss.said}"
            )
        logger.warning("client actor %d %s (%s)%s", seat.number, loss.how, loss.said, again)
        if loss.how == "ran out of memory" and self.has_others(seat):
            seat.rests_until = time.monotonic() + REST_S * 2**seat.shortages
            seat.shortages += 1
            logger.warning(
                "%d client actor(s) train until there is more memory",
                sum(s.actor is not None for s in self.seats),
            )

    def has_others(self, seat: Seat) -> bool:
        """Tell whether a seat's group has other actors, ready or not."""
        return any(s is not seat and s.group == seat.group and s.actor is not None for s in self.seats)

    def loss_of(self, error: Exception) -> Loss:
        """Return how an actor was lost, by the error of a call to it."""
        if isinstance(error, self._ray.exceptions.OutOfMemoryError):
            return Loss("ran out of memory", first_line(error))
        return Loss("died", cause_of(error))

    def _started(self, seat: Seat) -> None:
        try:
            self._ray.get(seat.start)
        except self.losses as error:
            if getattr(error, "actor_init_failed", False):
                raise RunError(f"a client actor could not be set up: {error}") from error
            self.lost(seat, self.loss_of(error), again=" before it was ready")
        seat.start, seat.is_late = None, False

    def _not_started(self, seat: Seat) -> None:
        """Create an actor that is not ready in time anew, if others work meanwhile.

        Raises:
            RunError: if no actor of the group is ready.
        """
        told = f"placed within {self.ready_timeout_s:.0f} s"
        if self.ready(seat.group):
            logger.warning("client actor %d was not %s; the others train without it", seat.number, told)
            self._dismiss(seat)
            self.fill()
            seat.is_late = True
            return
        raise RunError(
            f"the client actors were not {told}: wanted are {self.wanted}; the cluster has "
            f"{self._ray.cluster_resources()}, free are {self._ray.available_resources()}. "
            "Lower clients.actors or clients.resources"
        )

    def _dismiss(self, seat: Seat) -> None:
        if seat.actor is not None:
            with suppress(Exception):  # a handle of a dead actor
                self._ray.kill(seat.actor)
        seat.actor = seat.start = None


@dataclass(frozen=True)
class Call:
    """A call that is not answered yet."""

    work: Work
    seat: Seat
    began: float
    refs: "tuple[ObjectRef, ...]"


@dataclass
class Shift:
    """Works that are done together."""

    crew: Crew
    works: Iterable[Work]
    answers: dict[Key, Any] = field(default_factory=dict)

    def finish(self) -> dict[Key, Any]:
        """Do all works; return the answers by key."""
        self._queue = deque(self.works)
        self._calls: dict[ObjectRef, Call] = {}
        while self._queue or self._calls:
            self.crew.fill()
            self._deal()
            for ref in self.crew.watch(self._calls):
                self._answered(self._calls.pop(ref))
            self._look_for_hung()
        return self.answers

    def _deal(self) -> None:
        """Give works to idle actors."""
        busy = {call.seat.number for call in self._calls.values()}
        for seat in self.crew.seats if self._queue else ():
            if seat.is_ready and seat.number not in busy:
                work = next((work for work in self._queue if self._suits(work, seat)), None)
                if work is not None:
                    self._queue.remove(work)
                    self._submit(work, seat)

    def _suits(self, work: Work, seat: Seat) -> bool:
        if work.group not in (None, seat.group):
            return False
        return work.seat in (None, seat.number) or not self.crew.seats[work.seat].is_ready

    def _submit(self, work: Work, seat: Seat) -> None:
        method = getattr(seat.actor, work.method)
        if work.keeps:
            refs = tuple(method.options(num_returns=2).remote(*work.arguments))
        else:
            refs = (method.remote(*work.arguments),)
        self._calls[refs[0]] = Call(work, seat, self.crew.clock.now(), refs)

    def _answered(self, call: Call) -> None:
        crew, work = self.crew, call.work
        errors = crew._ray.exceptions
        try:
            value = crew._ray.get(call.refs[0])
        except crew.losses as error:
            self._lost(call, crew.loss_of(error))
        except errors.RayTaskError as error:
            if isinstance(error.cause, FedrayError | errors.ObjectLostError):
                raise error.cause from None
            raise
        else:
            crew.patience.learn(work.size, crew.clock.now() - call.began)
            self.answers[work.key] = (value, call.refs[1]) if work.keeps else value

    def _look_for_hung(self) -> None:
        """Give up actors whose calls take longer than they may."""
        now, patience = self.crew.clock.now(), self.crew.patience
        for ref, call in list(self._calls.items()):
            limit_s = patience.limit_s(call.work.size, call.work.losses)
            if now - call.began > limit_s:
                del self._calls[ref]
                said = f"no answer within {limit_s:.0f} s; clients.patience={patience.factor:g}"
                self._lost(call, Loss("hung", said))

    def _lost(self, call: Call, loss: Loss) -> None:
        """Put the work of a lost actor back into the queue, in parts if it has parts.

        Raises:
            RunError: if there is too little memory for a single part on a single actor.
        """
        crew, work = self.crew, call.work
        is_short = loss.how == "ran out of memory"
        was_alone = not crew.has_others(call.seat)
        crew.lost(call.seat, loss, again="; its work is done again", counts=work.abandon is None)
        if is_short and not was_alone and work.parts is None:
            self._queue.appendleft(work)  # the others may have taken the memory
            return
        work = replace(work, losses=work.losses + 1)
        if work.losses < work.tries:
            self._queue.appendleft(work)
        elif work.parts is not None:
            self._queue.extendleft(reversed(work.parts()))
        elif is_short:
            raise RunError(too_little_memory(work.losses, work.size, loss))
        elif work.abandon is not None:
            self.answers[work.key] = work.abandon(loss)
        else:
            self._queue.appendleft(work)
