"""A reader of inputs from elsewhere; a place for its files, and a small model for them."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

Read = Callable[[Random], object]
"""Makes an input and reads it."""


@dataclass(frozen=True)
class Target:
    """A reader of inputs.

    Args:
        share: of all inputs, in thousandths.
        make: returns the function that makes and reads an input; given a folder in which it may write.
        declared: errors that the reader may raise.
    """

    share: int
    make: Callable[[Path], Read]
    declared: tuple[type[Exception], ...]


@contextmanager
def workplace() -> Iterator[Path]:
    """Yield a folder, in memory where there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="fedray-fuzz-", dir=memory if memory.is_dir() else None
    ) as folder:
        yield Path(folder)


def small_layout() -> Any:
    """Return the layout of a model of 200 weights."""
    from fedray.types import Layout

    return Layout(("a", "b"), ((10, 14), (60,)), (True, True), (True, True))


def small_masks(layout: Any) -> list[Any]:
    """Return masks of it: full, of some densities, and of runs of 50."""
    import torch

    from fedray.types import Mask

    generator = torch.Generator().manual_seed(0)
    flats = [torch.rand(layout.size, generator=generator) < share for share in (0.4, 0.5, 0.03)]
    flats.append(torch.arange(layout.size) // 50 % 2 == 0)
    return [Mask.full(layout), *(Mask(flat, layout) for flat in flats)]


def small_weights(layout: Any) -> Any:
    """Return weights of it."""
    import torch

    from fedray.types import Params

    return Params(torch.randn(layout.size, generator=torch.Generator().manual_seed(1)), layout)
