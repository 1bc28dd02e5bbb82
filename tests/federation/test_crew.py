"""How works are dealt when actors are lost: with actors that answer at once, or never, and no Ray."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray import exceptions

from fedray.errors import RunError
from fedray.federation.crew import REST_S, Crew, Key, Work
from fedray.federation.losses import Loss
from fedray.federation.patience import Clock, Patience, Size

NEVER = object()
"""The answer of an actor that hangs."""

DIED = exceptions.ActorDiedError()
SHORT = exceptions.OutOfMemoryError("3 GB used\nmore")
Answers = Callable[["Actor", str, Sequence[int]], Any]


@dataclass(eq=False)
class Ref:
    answer: Any


@dataclass(eq=False)
class Actor:
    """An actor of a made-up Ray. `number` counts the actors that were created."""

    number: int
    ray: "MadeUp"
    is_dead: bool = False

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Ref:
            items = arguments[0] if arguments else ()
            if name != "ready":
                self.ray.log.append((self.number, tuple(items)))
            return Ref(self.ray.answers(self, name, items))

        return type("Method", (), {"remote": staticmethod(remote)})


class MadeUp:
    """A made-up Ray: calls are answered as `answers` says; waiting in vain takes a second."""

    exceptions = exceptions

    def __init__(self, answers: Answers) -> None:
        self.answers, self.created, self.seconds = answers, 0, 0.0
        self.log: list[tuple[int, tuple[int, ...]]] = []

    def create(self, group: int) -> Any:
        self.created += 1
        return Actor(self.created - 1, self)

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def wait(self, refs: Sequence[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        done = [ref for ref in refs if ref.answer is not NEVER][:num_returns]
        self.seconds += 0 if done else timeout
        return done, []

    def get(self, ref: Ref) -> Any:
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer

    def kill(self, actor: Actor) -> None:
        actor.is_dead = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    available_resources = cluster_resources


def crew_of(
    answers: Answers, actors: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Crew, MadeUp]:
    ray = MadeUp(answers)
    monkeypatch.setattr("fedray.federation.crew.time", SimpleNamespace(monotonic=ray.now, sleep=ray.sleep))
    defaults: dict[str, Any] = {"ready_timeout_s": 300.0, "max_deaths": 20, "wanted": "2 × CPU"}
    patience = Patience(factor=10.0, floor_s=30.0, first_s=600.0)
    crew = Crew(ray.create, [0] * actors, patience=patience, **{**defaults, **options})
    crew._ray, crew.clock = ray, cast(Clock, ray)
    return crew, ray


def work(items: Sequence[int], tries: int = 3) -> Work:
    """Return a work that adds up items, with its parts: halves, down to single items."""
    made = Work((items[0],), "run", (items,), Size("run", len(items), len(items)))
    half = len(items) // 2
    if half:
        return replace(made, parts=lambda: [work(items[:half], tries), work(items[half:], tries)])
    return replace(made, tries=tries, abandon=lambda loss: f"given up: {loss.how}")


def added(answers: dict[Key, Any]) -> int:
    return sum(value for value in answers.values() if isinstance(value, int))


def test_idle_actors_take_the_parts_of_a_lost_one(monkeypatch):
    def answers(actor: Actor, method: str, items: Sequence[int]) -> Any:
        if method == "ready":
            return NEVER if actor.number == 2 else 1  # the new one finds no room
        return DIED if actor.number == 0 else sum(items)

    crew, ray = crew_of(answers, 2, monkeypatch)
    done = crew.do([work([0, 1, 2, 3]), work([4, 5])])
    assert added(done) == 15
    assert ray.log == [(0, (0, 1, 2, 3)), (1, (4, 5)), (1, (0, 1)), (1, (2, 3))]
    assert crew.deaths == 1 and ray.seconds == 0


def test_an_answer_that_is_lost_with_its_node_is_made_again(monkeypatch):
    def answers(actor: Actor, method: str, items: Sequence[int]) -> Any:
        return exceptions.ObjectLostError("00" * 28, "", "") if actor.number == 0 and items else sum(items)

    crew, _ = crew_of(answers, 2, monkeypatch)
    assert added(crew.do([work([0, 1, 2, 3]), work([4, 5])])) == 15


def test_a_new_actor_takes_part_once_it_is_ready(monkeypatch):
    def answers(actor: Actor, method: str, items: Sequence[int]) -> Any:
        if method == "ready":
            return NEVER if actor.number == 2 else 1
        return DIED if actor.number == 0 else sum(items)

    crew, ray = crew_of(answers, 2, monkeypatch)
    crew.do([work([0, 1]), work([4, 5])])
    start = crew.seats[0].start
    assert start is not None and len(crew.ready(0)) == 1
    cast(Any, start).answer = 1
    crew.assemble()
    assert len(crew.ready(0)) == 2
    crew.do([work([0, 1]), work([4, 5])])
    assert ray.log[-2:] == [(2, (0, 1)), (1, (4, 5))]


def test_the_first_limit_is_long_and_later_ones_follow_what_was_measured(monkeypatch):
    hangs = {0}

    def answers(actor: Actor, method: str, items: Sequence[int]) -> Any:
        return NEVER if method == "run" and actor.number in hangs else sum(items)

    crew, ray = crew_of(answers, 1, monkeypatch)
    assert added(crew.do([work([1, 2])])) == 3
    assert 600 < ray.seconds <= 602
    hangs.add(1)
    before = ray.seconds
    assert added(crew.do([work([1, 2])])) == 3
    assert 30 < ray.seconds - before <= 32
    assert crew.deaths == 2


@pytest.mark.parametrize(("answer", "how"), [(DIED, "died"), (NEVER, "hung")])
def test_what_always_loses_its_actor_is_found_and_given_up(monkeypatch, answer, how):
    def answers(actor: Actor, method: str, items: Sequence[int]) -> Any:
        return answer if 6 in items else sum(items)

    crew, ray = crew_of(answers, 2, monkeypatch)
    done = crew.do([work([0, 1, 2, 3]), work([4, 5, 6, 7])])
    assert done[6,] == f"given up: {how}" and added(done) == sum(range(8)) - 6
    assert [items for _, items in ray.log if 6 in items] == [(4, 5, 6, 7), (6, 7), (6,), (6,), (6,)]
    assert crew.deaths == 5


def test_losses_to_one_item_alone_do_not_end_an_exchange_and_others_do(monkeypatch):
    def answers(actor: Actor, method: str, items: Sequence[int]) -> Any:
        return DIED if method == "run" else 1

    crew, _ = crew_of(answers, 1, monkeypatch, max_deaths=1)
    assert set(crew.do([work([1, 2])]).values()) == {"given up: died"}
    with pytest.raises(RunError, match="2 client actors were lost in one exchange; the last one died"):
        crew.do([work([1, 2, 3, 4])])


def test_fewer_actors_train_while_memory_is_short(monkeypatch):
    crew, ray = crew_of(lambda *call: 1, 2, monkeypatch)
    crew.assemble()
    ray.answers = lambda actor, method, items: (
        1 if method == "ready" else SHORT if len(crew.ready(0)) > 1 and actor.number == 0 else sum(items)
    )
    assert added(crew.do([work([0, 1, 2, 3]), work([4, 5])])) == 15
    assert [seat.is_ready for seat in crew.seats] == [False, True]
    assert ray.created == 2
    ray.seconds += REST_S
    crew.assemble()
    assert ray.created == 3
    assert added(crew.do([work([0, 1])])) == 1
    assert crew.seats[0].shortages == 1


def test_too_little_memory_for_one_item_on_one_actor_says_what_to_change(monkeypatch):
    def answers(actor: Actor, method: str, items: Sequence[int]) -> Any:
        return SHORT if method == "run" else 1

    crew, _ = crew_of(answers, 2, monkeypatch)
    with pytest.raises(RunError) as error:
        crew.do([work([0, 1, 2, 3]), work([4, 5])])
    for word in (
        "memory monitor killed the only client actor 3 times",
        "clients.chunk",
        "method.batch_size",
        "3 GB",
    ):
        assert word in str(error.value)


def test_actors_that_die_early_are_created_again_within_the_limit(monkeypatch):
    def answers(actor: Actor, method: str, items: Sequence[int]) -> Any:
        return (DIED if actor.number < 3 else 1) if method == "ready" else sum(items)

    crew, ray = crew_of(answers, 1, monkeypatch)
    assert added(crew.do([work([1, 2])])) == 3
    assert (crew.deaths, ray.created) == (3, 4)
    crew, _ = crew_of(answers, 1, monkeypatch, max_deaths=2)
    with pytest.raises(RunError, match="3 client actors were lost"):
        crew.do([work([1, 2])])


def test_no_actor_in_time_ends_the_run_and_some_do_not(monkeypatch):
    def answers(actor: Actor, method: str, items: Sequence[int]) -> Any:
        return NEVER if method == "ready" and actor.number >= ready else sum(items)

    ready = 0
    crew, ray = crew_of(answers, 2, monkeypatch)
    with pytest.raises(RunError, match=r"not placed within 300 s: wanted are 2 × CPU; the cluster has"):
        crew.do([work([1, 2])])
    ready = 1
    crew, ray = crew_of(answers, 2, monkeypatch)
    assert added(crew.do([work([1, 2])])) == 3
    assert 300 < ray.seconds < 303 and crew.deaths == 0


def test_a_crew_waits_for_other_work_and_not_for_what_never_comes(monkeypatch, caplog):
    """Other work holds the cluster for 1,000 s; then an actor has a place, and does not become ready."""

    def answers(actor: Actor, method: str, items: Sequence[int]) -> Any:
        return NEVER if method == "ready" else sum(items)

    def busy(group: int, actor: Any) -> str | None:
        for seat in crew.seats if ray.seconds > ready_at else ():
            cast(Any, seat.start).answer = 1
        return "one needs 1 × CPU" if ray.seconds < free_at else None

    ready_at = free_at = 1000.0
    crew, ray = crew_of(answers, 2, monkeypatch, busy=busy)
    assert added(crew.do([work([1, 2])])) == 3
    assert 1000 < ray.seconds < 1100 and crew.deaths == 0
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "the client actors have waited 10 s for room: one needs 1 × CPU"
    assert 16 <= len(told) <= 18  # once a minute
    ready_at, free_at = 9999.0, 500.0
    crew, ray = crew_of(answers, 2, monkeypatch, busy=busy)
    with pytest.raises(RunError, match="not placed within 300 s"):
        crew.do([work([1, 2])])
    assert 750 < ray.seconds < 860  # 300 s after it was busy last


def test_a_loss_is_told_without_the_guesses_of_ray():
    crew = Crew.__new__(Crew)
    crew._ray = cast(Any, MadeUp(lambda *call: 1))
    said = "The actor died.\n\tpid: 3\nThe actor is dead because it was killed. Some common causes include: 1"
    error = exceptions.RayActorError(error_msg=said)
    assert crew.loss_of(error) == Loss("died", "The actor is dead because it was killed.")
    assert crew.loss_of(SHORT) == Loss("ran out of memory", "3 GB used")
