"""One root seed, and a separate generator for every purpose.

A generator depends on (seed, purpose, keys) alone, e.g. on the round and the client, never on the process or
on earlier draws: that is why a run has the same bits on any number of workers, and after any retry.

The package never draws from the global generators of Python, numpy and torch, but a user's code may:
`nn.Dropout`, a random augmentation, a method's `np.random.rand`. The caller of such code borrows the global
generators, seeds them for this call, and restores them.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from struct import unpack
from threading import RLock
from typing import Literal, get_args

import numpy as np
import torch

Purpose = Literal[
    "init",
    "split",
    "partition",
    "devices",
    "sample",
    "client",
    "fate",
    "server",
    "method",
    "evaluate",
    "wait",
    "client_test",
    "uplink",
]
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


def seed_sequence(seed: int, purpose: Purpose, *keys: int) -> np.random.SeedSequence:
    """Return the seed sequence of a purpose.

    Args:
        seed: the run's root seed, ≥ 0.
        purpose: one of PURPOSES; append new ones at the end, since the position is the key.
        keys: further keys of the stream, e.g. round and client, each ≥ 0.
    """
    return np.random.SeedSequence([seed, PURPOSES.index(purpose), *keys])


def generator(seed: int, purpose: Purpose, *keys: int) -> np.random.Generator:
    """Return the generator of a purpose; arguments as for `seed_sequence`."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, *keys)))


# ── the global generators ────────────────────────────────────────────────────────────────────────────────

_BORROWED = RLock()
"""Held while the global generators are borrowed: two runs in threads of one process take turns."""


@contextmanager
def borrowed(seed: int, *keys: int) -> Iterator[None]:
    """Lend the global generators of Python, numpy and torch to the code inside; they are restored after it.

    Args:
        seed: the run's root seed.
        keys: keys of the call, e.g. the round and the hook, each ≥ 0.
    """
    with _BORROWED:
        python, numpy, cpu = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
        accelerators = torch.cuda.get_rng_state_all() if _cuda() else []
        seed_globals(seed, *keys)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.default_generator.set_state(cpu)
            if accelerators:
                torch.cuda.set_rng_state_all(accelerators)


def seed_globals(seed: int, *keys: int) -> None:
    """Seed the global generators of Python, numpy and torch; arguments as for `borrowed`."""
    seed_torch(seed, *keys)
    seed_others(seed, *keys)


def seed_torch(seed: int, *keys: int) -> None:
    """Seed torch's global generators, those of accelerators where they are in use."""
    word = _words(seed, keys)[0]
    # torch.manual_seed takes a hundred times as long: it looks for accelerators of every kind
    torch.default_generator.manual_seed(word)
    if _cuda():
        torch.cuda.manual_seed_all(word)


def _cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def seed_others(seed: int, *keys: int) -> None:
    """Seed the global generators of Python and numpy."""
    _, word, other = _words(seed, keys)
    np.random.seed(word)
    random.seed(other)


def _words(seed: int, keys: tuple[int, ...]) -> tuple[int, int, int]:
    """Return a number in [0, 2³²) for each library."""
    # a hash in place of a SeedSequence, which takes longer than the rest of a client's preparation
    name = " ".join(f"{key:d}" for key in (seed, *keys))
    digest = blake2b(name.encode(), digest_size=12).digest()
    first, second, third = unpack("<3I", digest)
    return first, second, third


class Watch:
    """Tells whether code drew from the global generators of Python or numpy.

    Seeding these two for each client would take longer than many a client's step, and few methods need it.
    The numbers that follow a known state are known: if they follow, nothing drew in between.
    """

    def __init__(self) -> None:
        """Make a copy of each; the global ones are left alone until `start`."""
        self._numpy, self._python = np.random.RandomState(0), random.Random(0)
        self.started = False

    def start(self) -> None:
        """Put both into the known state."""
        self.started = True
        for numpy, python in ((np.random, random), (self._numpy, self._python)):
            numpy.seed(0)
            python.seed(0)

    def drawn(self) -> bool:
        """Tell whether code drew numbers since the last call, or since the start."""
        numpy = np.random.random_sample() != self._numpy.random_sample()
        python = random.random() != self._python.random()
        return numpy or python
