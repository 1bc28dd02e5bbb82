"""Among equal scores the lower index wins, whatever kernel ranks them: on any processor, on any threads."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from fedray.costs.layer_times import LayerTimes
from fedray.pruning import masks
from fedray.pruning.channels import best_channels
from fedray.pruning.greedy import rebuild
from fedray.pruning.votes import cast
from fedray.types import Layout, Mask, Params

ROOT = Path(__file__).parents[2]
SIZE = 120_000
"""Enough for torch to share the work among threads."""


def digests() -> list[str]:
    """Return the masks of all ways to choose entries, for scores with few different values."""
    layout = Layout(("a", "b"), ((SIZE // 200, 100), (SIZE // 200, 100)), (True, True), (True, True))
    scores = torch.from_numpy(np.random.default_rng(0).integers(0, 5, SIZE).astype(np.float32))
    held = masks.top_k(scores, 0.37, layout)
    times = LayerTimes(1.0, {"a": 1e-6, "b": 2e-6})
    found = [
        held,
        masks.top_k_per_layer(scores, {"a": 0.2, "b": 0.5}, layout),
        masks.grow(scores, 12_345, layout, within=held),
        masks.grow_per_layer(scores, {"a": 321, "b": 4_567}, layout, within=held),
        masks.at_least(scores, 4.0, layout, within=Mask.full(layout), min_density=0.3),
        rebuild(Params(scores, layout), held, scores.square(), times, 0.3, 0.4),
    ]
    positions = cast(scores, 3_210, held)["positions"]
    channels = best_channels(scores, 0.3)
    return [
        *(mask.digest.hex() for mask in found),
        *(str(hash(tuple(t.tolist()))) for t in (positions, channels)),
    ]


@pytest.fixture
def on_two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@cache
def on_one_thread() -> tuple[str, ...]:
    return tuple(digests())


def test_on_two_threads(on_two_threads: None) -> None:
    assert torch.get_num_threads() == 2
    found = digests()
    torch.set_num_threads(1)
    assert tuple(found) == on_one_thread()


def test_on_a_processor_without_vectors() -> None:
    """The kernels that torch takes without AVX; the processor of the tests takes others."""
    code = "from tests.pruning.test_ties import digests; print(*digests())"
    env = os.environ | {"ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert tuple(done.stdout.split()) == on_one_thread()


def test_the_lower_index_wins() -> None:
    layout = Layout(("a",), ((1, SIZE),), (True,), (True,))
    kept = masks.top_k(torch.ones(SIZE), 0.25, layout).flat
    assert bool(kept[: SIZE // 4].all())
    assert not bool(kept[SIZE // 4 :].any())
