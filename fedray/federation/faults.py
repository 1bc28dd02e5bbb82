"""Clients that fail: their code raises, or their update is malformed or not finite.

A failed client is left out, counted, and named with the cause; the share of the asked clients that may fail
is `clients.max_failed`. A fault of a method's code is met by every client, so the run ends as soon as the
share is exceeded. What breaks a rule of fedray, or lacks memory, is no fault of a client and ends the run
at once.
"""

import errno
import signal
import traceback
from collections.abc import Iterator, Sequence

import torch

from fedray.errors import ClientError, RunError, without_secrets
from fedray.federation.aggregate import Bounds
from fedray.types import FAULTS, ClientRecord, ClientUpdate, Fate, Fault, Task, within

MAX_FAILED, MAX_CHANGE = "clients.max_failed", "clients.max_change"
"""Keys of the share of clients that may fail, and of the largest change that counts, for messages."""
STATISTICS = 1e12
"""`max_change` of running statistics, at least: those of raw data reach 10⁹."""
FRAMES = 12
"""Frames of a traceback that are kept: the innermost."""
LONGEST_CAUSE, LONGEST_TRACEBACK = 200, 20_000
NAMED = 10
"""Clients, and causes, that a message names."""

REASONS: dict[Fate, str] = {
    "non-finite": " (NaN, infinite, or too large to be averaged)",
    "too-large": f" (a larger change than {MAX_CHANGE} allows)",
}
"""Fate → what a note says of it."""
HINTS: dict[Fate, str] = {
    "failed": "mend what the clients raise",
    "malformed": "let `client_update` return a ClientUpdate of the model's size",
    "non-finite": "lower method.lr, or check data and model",
    "too-large": f"raise {MAX_CHANGE} if such updates are meant",
}
"""Fate → what to change."""


class ClientRaised(ClientError):
    """A client's own code raised.

    Args:
        record: of the client, with the cost of what it did.
        fault: with the traceback.
        round: round in which it happened.
    """

    def __init__(self, record: ClientRecord, fault: Fault, round: int) -> None:
        super().__init__(fault.client, round, fault.traceback)
        self.record, self.fault = record, fault

    def __reduce__(self) -> tuple[type[ClientError], tuple[int, int, str]]:
        """Rebuild as a ClientError."""
        return ClientError, (self.client, self.round, self.cause)


def of_machine(error: BaseException) -> bool:
    """Tell whether an error is the machine's: another one, or the same one later, would not have it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EMFILE, errno.ENFILE)
    no_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return no_memory or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def of_signal(error: BaseException | None) -> bool:
    """Tell whether an error, or one that it came from, was raised by a handler of signals.

    The handlers of fedray and Ray raise SystemExit in whatever code runs: that code is not at fault.
    """
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = [getattr(getattr(h, "__func__", h), "__code__", None) for h in handlers if callable(h)]
    while error is not None:
        frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        if isinstance(error, KeyboardInterrupt) or any(frame.f_code in codes for frame in frames):
            return True
        error = error.__cause__ or error.__context__
    return False


def traceback_of(error: BaseException) -> str:
    """Return the innermost frames of an error and its message, as text that can be written anywhere."""
    text = without_secrets("".join(traceback.format_exception(error, limit=-FRAMES)))
    if len(text) > LONGEST_TRACEBACK:
        half = LONGEST_TRACEBACK // 2
        text = f"{text[:half]}\n[…]\n{text[-half:]}"
    return _writable(text)


def fault_of(client: int, error: BaseException) -> Fault:
    """Return the fault of a client whose code raised an error."""
    told = without_secrets("".join(traceback.format_exception_only(error))).strip().splitlines()
    cause = _writable(told[0] if told else type(error).__name__)
    if len(cause) > LONGEST_CAUSE:
        cause = f"{cause[:LONGEST_CAUSE]}…"
    return Fault(client, "failed", cause, traceback_of(error))


def not_finite(update: ClientUpdate, bounds: Bounds) -> str | None:
    """Return why an update cannot be averaged, in one line; None if it can.

    One so large that the mean over all clients could overflow cannot. What lies behind the mask is not read.
    """
    params, most = update.params, bounds.weight
    if not (params.within(most) or params.masked(update.mask).within(most)):
        return f"its weights are NaN, infinite or beyond {most:.1e}"
    for name, value in update.sums.items():
        limit = bounds.number if value.is_floating_point() else bounds.count
        if not within(value, limit):
            return f"its sum {name!r} is NaN, infinite or beyond {limit:.1e}"
    for name, value in update.each.items():
        if not bool(torch.isfinite(value).all()):
            return f"its {name!r} is NaN or infinite"
    return None


def too_far(update: ClientUpdate, task: Task, most: float) -> str | None:
    """Return why an update of finite weights is too far from its task's, in one line; None if it is not.

    Only entries under the update's mask are read: weights and running statistics, each for themselves.

    Args:
        update: as it arrived.
        task: as the client held it.
        most: the L2 norm of the change, at most, in multiples of the norm that the task's entries have, or
            would have if each were 1.
    """
    squares = sum(float(torch.dot(flat, flat)) for flat in (update.params.flat, task.params.flat))
    if 8 * squares < most * most * update.mask.count:  # the usual case: |a − b|² ≤ 2·|a|² + 2·|b|²
        return None
    trainable = update.mask.layout.trainable_flat
    for what, part, limit in (
        ("weights", update.mask.flat & trainable, most),
        ("running statistics", update.mask.flat & ~trainable, max(most, STATISTICS)),
    ):
        if bool(part.any()):
            before, after = task.params.flat[part].double(), update.params.flat[part].double()
            change, size = float((after - before).norm()), max(float(before.norm()), len(before) ** 0.5)
            if change > limit * size:
                return f"its {what} moved by {change:.1e} (L2 norm), beyond {limit:g} × {size:.3g}"
    return None


def _writable(text: str) -> str:
    """Return a text without lone surrogates, which no file takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def check_raised(round: int, faults: Sequence[Fault], may_fail: int, before: int = 0) -> None:
    """Refuse more clients whose code raised than may fail; the others are counted once all are known.

    Args:
        round: of the exchange.
        faults: of clients so far.
        may_fail: clients, at most, that may fail.
        before: clients that failed before, of those that are asked in turn.

    Raises:
        ClientError: of the first of them.
    """
    raised = sorted((f for f in faults if f.fate == "failed"), key=lambda fault: fault.client)
    if raised and before + len(raised) > may_fail:
        first = raised[0]
        over = f"{before + len(raised)} client(s) failed so far, and {_allowed(may_fail)}"
        raise ClientError(first.client, round, f"{first.traceback.rstrip()}\n{over}")


def check_faults(round: int, faults: Sequence[Fault], asked: int, may_fail: int) -> None:
    """Refuse an exchange in which more clients failed than may.

    Raises:
        ClientError: of the first client whose code raised, if these alone are too many.
        RunError: with the clients by fate, their causes, and what to change.
    """
    check_raised(round, faults, may_fail)
    if len(faults) <= may_fail:
        return
    parts = [_part(fate, [f for f in faults if f.fate == fate]) for fate in FAULTS]
    hints = [hint for fate, hint in HINTS.items() if any(f.fate == fate for f in faults)]
    raise RunError(
        f"round {round}: {len(faults)} of {asked} clients sent no update that counts, and "
        f"{_allowed(may_fail)}: {'; '.join(filter(None, parts))}. To change: {', or '.join(hints)}, or raise "
        f"{MAX_FAILED} to continue without these clients"
    )


def _part(fate: Fate, faults: Sequence[Fault]) -> str:
    """Return the clients of one fate and the first cause."""
    return f"{fate}: {_named([f.client for f in faults])} ({faults[0].cause})" if faults else ""


def _allowed(may_fail: int) -> str:
    return f"{MAX_FAILED} lets {may_fail or 'none'} fail"


def notes_of(faults: Sequence[Fault]) -> Iterator[str]:
    """Yield a note for each cause by which clients failed, and for each other fate."""
    causes: dict[str, list[int]] = {}
    for fault in faults:
        if fault.fate == "failed":
            causes.setdefault(fault.cause, []).append(fault.client)
    for cause, clients in list(causes.items())[:NAMED]:
        yield f"{len(clients)} client(s) failed and were left out: {_named(clients)}: {cause}"
    rest = list(causes.values())[NAMED:]
    if rest:
        clients = [client for group in rest for client in group]
        yield f"{len(clients)} more client(s) failed and were left out, by {len(rest)} more causes"
    for fate in FAULTS[1:]:
        clients = sorted(fault.client for fault in faults if fault.fate == fate)
        if clients:
            reason = REASONS.get(fate, "")
            yield f"{len(clients)} update(s) left out as {fate}: {_named(clients)}{reason}"


def _named(clients: Sequence[int]) -> str:
    return f"clients {list(clients[:NAMED])}"
