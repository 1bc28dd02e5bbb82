"""Inputs in pieces, each in a child process: a reader that crashes or hangs ends its piece alone.

An input is made from (seed, target, number), so that a fault is repeated by its number. Finished pieces
stand in a file; a second start with the same seed leaves them out.
"""

import json
import mmap
import multiprocessing
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from struct import pack_into, unpack_from
from typing import Any

import fedray
from benchmarks.fuzz.target import Target, workplace
from benchmarks.fuzz.targets import TARGETS

PACKAGE = Path(fedray.__file__).parent

INPUT_S = 5.0
"""CPU seconds that an input may take; a hundred times the mean of the slowest target."""

INPUT_BYTES = 256 * 2**20
"""Memory by which an input may raise the peak of the process."""

MOST_FAULTS = 20
"""Faults of a piece that are kept."""


@dataclass(frozen=True)
class Piece:
    """Some inputs of a target.

    Args:
        target: its name.
        first: number of the first input.
        count: how many.
    """

    target: str
    first: int
    count: int

    @property
    def end(self) -> int:
        """Number after the last input."""
        return self.first + self.count


@dataclass(frozen=True)
class Outcome:
    """What became of a piece.

    Args:
        piece: the piece.
        read: inputs that were read; all others raised a declared error, or are faults.
        faults: number of the input and the error, with the last line of ours.
        seconds: wall time.
        slowest_s: CPU seconds of the slowest input.
    """

    piece: Piece
    read: int
    faults: tuple[tuple[int, str], ...]
    seconds: float
    slowest_s: float


class TooSlow(BaseException):
    """An input took longer than INPUT_S."""


def pieces(inputs: int, each: int, only: str | None = None) -> list[Piece]:
    """Cut inputs into pieces by the shares of the targets; a share of 10 % has `each` inputs in a piece."""
    names = [name for name in TARGETS if only is None or name == only]
    whole = sum(TARGETS[name].share for name in names)
    found = []
    for name in names:
        wanted = -(-inputs * TARGETS[name].share // whole)
        # a piece of a slow target is as long as one of a fast one
        most = max(1, each * TARGETS[name].share // 100)
        found += [Piece(name, first, min(most, wanted - first)) for first in range(0, wanted, most)]
    return sorted(found, key=lambda piece: piece.first / TARGETS[piece.target].share)


def run_piece(piece: Piece, seed: int, target: Target | None = None, at: Any = None) -> Outcome:
    """Read the inputs of a piece in this process.

    Args:
        piece: which.
        seed: of all inputs.
        target: of the piece; None: that of TARGETS.
        at: a buffer for the number of the input in progress.
    """
    target = target or TARGETS[piece.target]
    faults: list[tuple[int, str]] = []
    read, slowest, started = 0, 0.0, time.perf_counter()
    before = signal.signal(signal.SIGPROF, _too_slow)
    try:
        with workplace() as folder:
            one = target.make(folder)
            for number in range(piece.first, piece.end):
                if at is not None:
                    pack_into("<q", at, 0, number)
                begun, peak = time.process_time(), _peak_bytes()
                signal.setitimer(signal.ITIMER_PROF, INPUT_S)
                fault = None
                try:
                    one(Random(f"{seed} {piece.target} {number}"))
                    read += 1
                except target.declared:
                    pass
                except (Exception, TooSlow) as error:
                    fault = _described(error)
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
                slowest = max(slowest, time.process_time() - begun)
                if _peak_bytes() - peak > INPUT_BYTES:
                    fault = fault or f"took {(_peak_bytes() - peak) / 2**20:.0f} MiB of memory"
                if fault is not None and len(faults) < MOST_FAULTS:
                    faults.append((number, fault))
    finally:
        signal.signal(signal.SIGPROF, before)
    return Outcome(piece, read, tuple(faults), time.perf_counter() - started, slowest)


def _too_slow(number: int, frame: Any) -> None:
    raise TooSlow(f"took more than {INPUT_S:g} s of CPU time")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _described(error: BaseException) -> str:
    """Return an error with the last place in fedray that it passed."""
    passed = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in passed if Path(frame.filename).is_relative_to(PACKAGE)]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}{place}"


def in_child(piece: Piece, seed: int) -> Outcome:
    """Read the inputs of a piece in a child process; one that dies is a fault of the input in progress."""
    context = multiprocessing.get_context("fork")
    at = mmap.mmap(-1, 8)
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(piece, seed, at, sender))
    started = time.perf_counter()
    child.start()
    sender.close()
    # a reader that sleeps, or in C, does not hear the alarm; a child that stands still is ended
    number, since = -1, time.monotonic()
    while not receiver.poll(0.05) and child.is_alive():
        (now,) = unpack_from("<q", at, 0)
        if now != number:
            number, since = now, time.monotonic()
        elif time.monotonic() - since > 120 * INPUT_S:
            child.kill()
    try:
        outcome: Outcome = receiver.recv()
    except EOFError:
        child.join()
        (number,) = unpack_from("<q", at, 0)
        died = f"the process ended with status {child.exitcode}"
        outcome = Outcome(piece, 0, ((number, died),), time.perf_counter() - started, 0.0)
    child.join()
    return outcome


def _child(piece: Piece, seed: int, at: Any, sender: Any) -> None:
    sender.send(run_piece(piece, seed, at=at))
    sender.close()


def done_before(file: Path, seed: int) -> dict[Piece, Outcome]:
    """Return the finished pieces that a file has of a seed."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # the process was killed as it wrote
            continue
        if entry["seed"] == seed:
            piece = Piece(**entry["piece"])
            faults = tuple((number, text) for number, text in entry["faults"])
            found[piece] = Outcome(piece, entry["read"], faults, entry["seconds"], entry["slowest_s"])
    return found


def note(file: Path, seed: int, outcome: Outcome) -> None:
    """Add a finished piece to the file."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"seed": seed, **asdict(outcome)}) + "\n")


def outcomes(inputs: int, seed: int, each: int, file: Path | None, only: str | None) -> Iterator[Outcome]:
    """Yield the outcome of every piece, those of an earlier start first."""
    known = done_before(file, seed) if file is not None else {}
    for piece in pieces(inputs, each, only):
        outcome = known.get(piece)
        if outcome is None:
            outcome = in_child(piece, seed)
            if file is not None:
                note(file, seed, outcome)
        yield outcome
