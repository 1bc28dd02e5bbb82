"""Values as JSON and bytes: the same bits after a round trip, and what cannot be written is named."""

import json
import math
import struct
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.storage.values import Reader, Unreadable, Unwritable, Writer
from fedray.types import Layout, Mask, Params

LAYOUT = Layout(names=("w", "b"), shapes=((2, 2), (2,)), prunable=(True, False), trainable=(True, True))


def written(value: Any) -> tuple[Any, list[bytes]]:
    """Return the JSON, as text and back, and the buffers."""
    writer = Writer()
    node = json.loads(json.dumps(writer.encode(value, "memory")))
    return node, [bytes(data) for data in writer.buffers]


def returned(value: Any) -> Any:
    node, buffers = written(value)
    return Reader(lambda number: bytearray(buffers[number])).decode(node)


def bits(value: Any) -> Any:
    """Return what must be equal of two values, NaN included, with types."""
    match value:
        case float():
            content: Any = struct.pack("<d", value)
        case torch.Tensor():
            raw = torch.view_as_real(value) if value.is_complex() else value
            strides = value.stride() if value.numel() else ()
            content = (value.dtype, value.shape, strides, raw.reshape(-1).tolist().__repr__())
        case np.ndarray() | np.generic():
            content = (value.dtype.str, value.shape, value.tobytes())
        case Params() | Mask():
            content = (value.layout, bits(value.flat))
        case dict():
            content = [(bits(k), bits(v)) for k, v in value.items()]
        case list() | tuple() | deque():
            content = [bits(v) for v in value]
        case set() | frozenset():
            content = sorted(repr(bits(v)) for v in value)
        case _:
            content = repr(value)
    return type(value), content


plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(max_size=600),
    st.complex_numbers(),
)
keys = st.recursive(
    plain, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4
)
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32]
tensors = st.builds(
    lambda dtype, shape, seed: torch.from_numpy(np.random.default_rng(seed).integers(0, 255, shape)).to(
        dtype
    ),
    st.sampled_from([*DTYPES, torch.float64, torch.complex64]),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 5),
)
arrays = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 255, shape).astype(dtype),
    st.sampled_from(["<f4", ">f8", "<i2", "?", "<U5", "c8"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 5),
)
values = st.recursive(
    plain | tensors | arrays | arrays.map(lambda a: a.reshape(-1)[0] if a.size else np.float32("nan")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(deque),
        st.dictionaries(st.text(), inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4),
        st.sets(keys, max_size=4),
    ),
    max_leaves=12,
)


@given(values)
@settings(max_examples=200, deadline=None)
def test_a_round_trip_keeps_every_bit(value):
    assert bits(returned(value)) == bits(value)


@pytest.mark.parametrize(
    "payload", ["7ff8000000000000", "fff0000000000000", "7ff8dead00000001", "8000000000000000"]
)
def test_odd_numbers_keep_their_bits(payload):
    (value,) = struct.unpack(">d", bytes.fromhex(payload))
    assert struct.pack(">d", returned([value])[0]).hex() == payload


@dataclass(frozen=True)
class Memory:
    """What a method might keep."""

    events: range
    losses: tuple[float, ...]
    shares: dict[int, float] = field(default_factory=dict)
    teacher: torch.Tensor | None = None
    root: Path = Path("x")

    def __post_init__(self) -> None:
        """Fail where a reader calls the constructor."""
        assert self.events, "called"


class Pair(NamedTuple):
    """A named tuple."""

    a: int
    b: Any


class Phase(Enum):
    """An enum."""

    EARLY = 1


def test_classes_are_written_by_name_and_no_constructor_is_called():
    memory = Memory(range(2, 9, 3), (0.5, math.nan), {3: 0.25}, torch.ones(2, 3).T)
    object.__setattr__(memory, "events", range(0))
    again = returned({"m": memory, "p": Pair(1, [2]), "e": Phase.EARLY, "o": OrderedDict(b=1, a=2)})
    kept = again["m"]
    assert type(kept) is Memory
    assert (kept.events, kept.shares, kept.root) == (range(0), {3: 0.25}, Path("x"))
    assert kept.losses[0] == 0.5
    assert math.isnan(kept.losses[1])
    assert kept.teacher is not None
    assert kept.teacher.stride() == (1, 3)
    assert again["p"] == Pair(1, [2])
    assert type(again["p"]) is Pair
    assert again["e"] is Phase.EARLY
    assert list(again["o"]) == ["b", "a"]


def test_params_and_masks_keep_their_layout():
    params, mask = Params(torch.arange(6.0), LAYOUT), Mask.none(LAYOUT)
    again = returned((params, mask))
    assert again == (params, mask)
    assert again[0].layout is again[1].layout


def test_what_was_one_object_is_one_object_again():
    mask, row = Mask.full(LAYOUT), torch.zeros(3)
    again = returned({"a": mask, "b": [mask, row], "c": row})
    assert again["a"] is again["b"][0]
    assert again["c"] is again["b"][1]


def test_equal_contents_stand_once_in_the_file_and_are_apart_again():
    value = {client: torch.full((1000,), 0.5) for client in range(50)}
    _, buffers = written(value)
    assert sum(map(len, buffers)) == 4000
    again = returned(value)
    again[0][0] = 7.0
    assert again[1][0] == 0.5


def test_a_memory_that_is_read_can_be_written_into():
    again = returned({"t": torch.zeros(2), "a": np.zeros(2), "l": []})
    again["t"][0] = again["a"][0] = 1.0
    assert (again["t"].tolist(), again["a"].tolist()) == ([1.0, 0.0], [1.0, 0.0])


def _local() -> Any:
    @dataclass(frozen=True)
    class Hidden:
        x: int

    return Hidden(1)


def _circle() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: 1, r"memory\['k'\]\[1\] is function"),
        (threading.Lock(), r"memory\['k'\]\[1\] is _thread\.lock"),
        (np.random.default_rng(0), r"is numpy\.random\._generator\.Generator; kept can be None, bool"),
        (_local(), r"is of the class tests\.\S*Hidden, which is not found by that name"),
        (np.array([object()]), r"is an array of Python objects"),
        (torch.zeros(2).to_sparse(), r"is a tensor of torch\.sparse_coo; keep it dense and on the CPU"),
        (_circle(), r"memory\['k'\]\[1\]\[0\] holds itself"),
        (Memory(range(1), (), {1: _circle}), r"memory\['k'\]\[1\]\.shares\[1\] is function"),  # type: ignore[dict-item]
    ],
)
def test_what_cannot_be_written_is_named_with_its_place(value, message):
    with pytest.raises(Unwritable, match=message):
        written({"k": (0, value)})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (":Memory", ":Memoir", r"the class Memoir of the module tests\.\S+ is not there"),
        ("tests.storage.test_values", "tests.gone", r"of the module tests\.gone is not there"),
        (":Memory", ":LAYOUT", r"LAYOUT of the module \S+ is not a class"),
        (":Memory", ":Phase", r"the class \S+:Phase has the fields none; written were events, losses"),
        ('"losses"', '"loss"', r"has the fields events, losses, .*; written were events, loss,"),
    ],
)
def test_a_class_that_is_gone_or_changed_is_named(old, new, message):
    text = json.dumps(written(Memory(range(1), ()))[0]).replace(old, new)
    with pytest.raises(Unreadable, match=message):
        Reader(lambda number: bytearray()).decode(json.loads(text))
