"""The framework's end of the line to the process that measures: one JSON object a line.

    measures                      framework
                              ←   {"ready": {"flwr": "1.42.0", …}}
    {"ask": "round"}          →
                              ←   {"examples": 6000}       when the round is over
    {"ask": "accuracy"}       →
                              ←   {"accuracy": 0.93}
    {"ask": "end"}            →

A framework that fails answers {"error": "…"}. Only the standard library is needed.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version


class Ended(Exception):
    """The measuring process asks for no more rounds. Raised inside frameworks that have their own loop."""


class Line:
    """Questions from stdin, answers to stdout; what the framework itself prints goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        os.dup2(2, 1)

    def answer(self, **values: object) -> None:
        """Send an object."""
        self._out.write(json.dumps(values) + "\n")

    def ready(self, packages: Sequence[str]) -> None:
        """Say that rounds can be asked for, and the installed versions of packages."""
        self.answer(ready={package: version(package) for package in packages})

    def wait_for_round(self, accuracy: Callable[[], float]) -> None:
        """Return when a round is asked for; answer questions for the accuracy until then.

        Raises:
            Ended: if there are no more rounds to make.
        """
        for text in iter(sys.stdin.readline, ""):
            match json.loads(text)["ask"]:
                case "round":
                    return
                case "accuracy":
                    self.answer(accuracy=accuracy())
                case _:
                    break
        raise Ended
