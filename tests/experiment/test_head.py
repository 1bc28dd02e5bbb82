"""The head of a cluster is asked with a deadline, and counts as lost when it does not answer for long."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private import worker

from fedray.errors import RunError
from fedray.experiment import head, reaching
from tests.experiment.test_reaching_ray import gcs, listening


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit statuses with which Ray was left; a second is long."""
    found: list[int] = []
    monkeypatch.setattr(head, "leave_ray", found.append)
    monkeypatch.setattr(head, "LOST_S", 1.0)
    monkeypatch.setattr(head, "ASK_EVERY_S", 0.0)
    monkeypatch.setattr(reaching, "LOOK_S", 0.5)
    return found


def connected(address: str | None, monkeypatch: pytest.MonkeyPatch, **options: Any) -> head.ClusterHead:
    node = None if address is None else SimpleNamespace(gcs_address=address)
    monkeypatch.setattr(worker, "_global_node", node)
    return head.ClusterHead(**options)


def test_a_head_that_answers(monkeypatch: pytest.MonkeyPatch, left: list[int]) -> None:
    with gcs() as address:
        alive = connected(address, monkeypatch)
        alive.check()
        assert alive.answers()
    with gcs(refuses=True) as address:  # it lives, whatever it says
        assert connected(address, monkeypatch).answers()
    through_client = connected(None, monkeypatch)
    through_client.check(now=True)
    assert through_client.answers() and left == []


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_head_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, left: list[int], is_dead: bool) -> None:
    with listening() as silent:
        address = "127.0.0.1:1" if is_dead else silent
        lost = connected(address, monkeypatch)
        began = time.monotonic()
        with pytest.raises(RunError, match=rf"head of the Ray cluster at '{address}' did not answer for 1 s"):
            lost.check()
        assert 1 < time.monotonic() - began < 10
        assert left == [1]
        began = time.monotonic()
        with pytest.raises(RunError):
            lost.check()  # at once
        assert not lost.answers() and time.monotonic() - began < 0.5


def test_a_head_is_asked_now_and_then_and_not_waited_for_after_a_signal(
    monkeypatch: pytest.MonkeyPatch, left: list[int]
) -> None:
    monkeypatch.setattr(head, "ASK_EVERY_S", 100.0)
    monkeypatch.setattr(head, "LOST_S", 100.0)
    seldom = connected("127.0.0.1:1", monkeypatch, is_over=lambda: True)
    seldom.check()  # it was asked a moment ago
    seldom.check(now=True)
    assert not seldom.answers() and left == []
