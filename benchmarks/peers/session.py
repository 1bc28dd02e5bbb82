"""A framework in its own process, and the measuring end of the line to it (see `line`)."""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks.processes import tree, tree_cpu_s, tree_memory_bytes

ROOT = Path(__file__).parents[2]
START_S, ROUND_S, END_S = 300.0, 900.0, 20.0
"""Seconds that a start, a round and an end may take."""


class FrameworkError(Exception):
    """A framework ended, hung or reported an error; the message is the reason, in one line."""


class Round(NamedTuple):
    """A round: wall seconds, CPU seconds of the process tree, examples that clients trained on."""

    seconds: float
    cpu_s: float
    examples: int


class Session:
    """A process that makes rounds when it is asked; wall seconds are taken here, from question to answer.

    Args:
        command: starts it; it speaks as `line` says.
        log: gets its stderr.
        environ: what its environment has beside or in place of ours.

    Raises:
        FrameworkError: if it does not become ready.
    """

    def __init__(self, command: Sequence[str], log: Path, environ: Mapping[str, str]) -> None:
        self.log = log
        self._ray = tempfile.TemporaryDirectory(prefix="peer", ignore_cleanup_errors=True)
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                env={**os.environ, "RAY_TMPDIR": self._ray.name, **environ},
                start_new_session=True,
            )
        try:
            self.versions: dict[str, str] = self._answer(START_S)["ready"]
        except FrameworkError:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Return the session, which ends with the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        self.close()

    def round(self) -> Round:
        """Let it make a round."""
        cpu_s, started = tree_cpu_s(self.process.pid), time.perf_counter()
        answer = self._ask("round")
        seconds = time.perf_counter() - started
        return Round(seconds, tree_cpu_s(self.process.pid) - cpu_s, int(answer["examples"]))

    def accuracy(self) -> float:
        """Return the accuracy of its global model on the test examples."""
        return float(self._ask("accuracy")["accuracy"])

    def memory_bytes(self) -> int:
        """Return the proportional set size of its process tree."""
        return tree_memory_bytes(self.process.pid)

    def close(self) -> None:
        """Ask it to end; kill what is left of its process tree."""
        everything = tree(self.process.pid)
        with contextlib.suppress(OSError):
            self._tell("end")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        for pid in everything:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._ray.cleanup()

    def _tell(self, question: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"ask": question}).encode() + b"\n")
        self.process.stdin.flush()

    def _ask(self, question: str) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # the answer tells why
            self._tell(question)
        return self._answer(ROUND_S)

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout_s)[0]:
            raise FrameworkError(f"no answer in {timeout_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise FrameworkError(f"ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise FrameworkError(str(answer["error"]).splitlines()[0])
        return answer

    def _last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
