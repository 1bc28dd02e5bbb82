"""One root seed, and a generator of its own for every purpose.

A generator depends on (seed, purpose, keys) alone, e.g. on the round and the client, never on who draws from
it or on what was drawn before: that is why a run has the same bits on any number of workers, and after any
retry. Nothing in the package touches the global generators of Python, numpy or torch.
"""

from typing import Literal

import numpy as np

PURPOSES = (
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
)
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
]


def seed_sequence(seed: int, purpose: Purpose, *keys: int) -> np.random.SeedSequence:
    """Return the seed sequence of a purpose.

    Args:
        seed: the run's root seed, ≥ 0.
        purpose: one of PURPOSES; append new ones at the end, since the position is the key.
        keys: what the stream is for beyond that, e.g. round and client, each ≥ 0.
    """
    return np.random.SeedSequence([seed, PURPOSES.index(purpose), *keys])


def generator(seed: int, purpose: Purpose, *keys: int) -> np.random.Generator:
    """Return the generator of a purpose; arguments as for `seed_sequence`."""
    return np.random.Generator(np.random.PCG64(seed_sequence(seed, purpose, *keys)))
