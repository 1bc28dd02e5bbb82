"""Which process publishes at a place: one at a time, also from several hosts.

A process puts an object of its own, then lists those of all: a store lists an object as soon as it is put,
so of two processes that begin at once at least one sees the other, and withdraws. It writes its object anew
every `BEAT_S`; one that was not written for `LEASE_S`, by the store's clock, belongs to a dead process.
"""

import json
import logging
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from fedray.errors import RunError
from fedray.publishing.manifest import CLAIMS
from fedray.publishing.objects import Found, Missing, Objects, StoreError
from fedray.storage import heartbeat

logger = logging.getLogger(__name__)

BEAT_S = 10.0
LEASE_S = 40.0

_held: set[str] = set()
"""The claims of this process: one that is not among them was left behind when the store did not answer."""


class Claim:
    """A context in which this process alone publishes at a place.

    Args:
        objects: of the place.
        waits: whether to wait up to `LEASE_S` for a process that may be dead.

    Raises:
        RunError: on entering, if another process publishes there.
        StoreError: if the store does not answer.
    """

    def __init__(self, objects: Objects, *, waits: bool) -> None:
        self.objects, self.waits = objects, waits
        self._me = heartbeat.signature()
        self.name = f"{CLAIMS}/{self._me['id']}.json"
        self._over = threading.Event()
        self._writing = threading.Lock()

    def __enter__(self) -> Self:
        _held.add(self.name)
        try:
            self._beat()
            self._take()
        except BaseException:
            self._withdraw()
            raise
        threading.Thread(target=self._keep, name="fedray-claim", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._withdraw()

    def check(self) -> None:
        """Check that no other process has taken over, since this one could not reach the store for long.

        Raises:
            RunError: if one has.
            StoreError: if the store does not answer.
        """
        if self.objects.find(self.name) is None:
            raise RunError(
                f"{self.objects.place}: another process has taken over, because this one did not reach the "
                f"store for {LEASE_S:g} s"
            )

    def _withdraw(self) -> None:
        _held.discard(self.name)
        with self._writing, suppress(StoreError):
            self.objects.remove(self.name)

    def _take(self) -> None:
        """Wait until no other claim is alive; remove the dead ones."""
        first: dict[str, float] = {}
        said = False
        until = time.monotonic() + (LEASE_S + BEAT_S if self.waits else 0.0)
        while True:
            others, now = self._others()
            alive = [one for one in others if not self._is_dead(one, now)]
            if not alive:
                for one in others:
                    self.objects.remove(f"{CLAIMS}/{one.name}")
                return
            beats = any(one.written_at > first.setdefault(one.name, one.written_at) for one in alive)
            if beats or time.monotonic() >= until:
                raise RunError(
                    f"{self.objects.place}: {self._described(alive[0].name)} publishes there; wait for its "
                    "end, or stop it"
                )
            if not said:
                who, age = self._described(alive[0].name), now - alive[0].written_at
                text = "%s: %s was heard %.0f s ago; waiting up to %.0f s to see whether it is alive"
                logger.warning(text, self.objects.place, who, age, LEASE_S - age)
                said = True
            _pause(1.0)
            self._beat()

    def _others(self) -> tuple[list[Found], float]:
        """Return the claims of other processes, and the time by the store's clock."""
        found = {f"{CLAIMS}/{one.name}": one for one in self.objects.listed(CLAIMS)}
        mine = found.pop(self.name, None)
        if mine is None:
            raise StoreError(f"{self.objects.place}: the store does not list what was put there")
        return list(found.values()), mine.written_at

    def _is_dead(self, claim: Found, now: float) -> bool:
        if now - claim.written_at >= LEASE_S:
            return True
        who = self._read(claim.name)
        if who is None:
            return True
        if all(who.get(key) == self._me[key] for key in ("pid", "host", "machine", "started")):
            return f"{CLAIMS}/{claim.name}" not in _held  # of this process
        return {"pid", "host"} <= who.keys() and heartbeat.has_ended(who)

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            who = json.loads(self.objects.get(f"{CLAIMS}/{name}"))
        except Missing:
            return None
        except ValueError:
            return {}
        return who if isinstance(who, dict) else {}

    def _described(self, name: str) -> str:
        who = self._read(name) or {}
        return f"process {who.get('pid', '?')} on {who.get('host', '?')}, since {who.get('since', '?')},"

    def _beat(self) -> None:
        self.objects.put(self.name, json.dumps(self._me).encode())

    def _keep(self) -> None:
        while not self._over.wait(BEAT_S):
            with self._writing, suppress(StoreError):
                if self._over.is_set() or self.objects.find(self.name) is None:
                    return  # another process has taken over; the next `check` says so
                self._beat()


def _pause(seconds: float) -> None:
    time.sleep(seconds)
