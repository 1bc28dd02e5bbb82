"""How a client actor is lost, in words."""

from dataclasses import dataclass
from typing import Literal

from fedray.federation.patience import Size


@dataclass(frozen=True)
class Loss:
    """How an actor was lost, and what Ray says about it."""

    how: Literal["died", "hung", "ran out of memory"]
    said: str


def too_little_memory(times: int, size: Size, loss: Loss) -> str:
    """Return why work of a size, to which the only actor was lost, cannot be done, and what to change."""
    return (
        f"Ray's memory monitor killed the only client actor {times} times with {size.clients} "
        f"client(s) of {size.examples} examples ({loss.said}). Lower method.batch_size, clients.chunk "
        "or clients.stack, take clients.actors=1, or give the node more memory"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def cause_of(error: Exception) -> str:
    """Return the line of Ray's error that says why an actor died, without Ray's guesses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [
        line for line in lines if line.startswith(("The actor is dead because", "The actor died because"))
    ]
    return (causes or lines or [type(error).__name__])[0].split(" Some common causes")[0]
