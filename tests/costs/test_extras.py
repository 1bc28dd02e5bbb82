"""What travels beside a model comes back as it was, and nothing else is believed."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.costs.extras import decode_extras, encode_extras, extras_size
from fedray.errors import MethodError, WireError
from fedray.types import Extra

EXTRAS: Mapping[str, Extra] = {
    "importance": torch.tensor([1.5, -0.0, math.inf]),
    "half": torch.tensor([[0.5], [2.0]], dtype=torch.float16),
    "votes": torch.tensor([2**62, -1]),
    "classes": torch.tensor(7, dtype=torch.int32),
    "levels": torch.arange(5, dtype=torch.uint8),
    "kept": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 3),
    "upload": True,
    "step": 1,
    "rate": 1.0,
    "tiny": 5e-324,
    "name": 'größer "than" \n \ud800',
}
properties = settings(deadline=None, max_examples=50)


def assert_same_extras(found: Mapping[str, Extra], expected: Mapping[str, Extra]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        assert type(other) is type(value)
        if isinstance(value, torch.Tensor):
            assert isinstance(other, torch.Tensor)
            assert other.dtype == value.dtype and torch.equal(other, value)
        else:
            assert other == value


def test_extras_come_back_with_their_types() -> None:
    assert_same_extras(decode_extras(encode_extras(EXTRAS)), EXTRAS)


def test_no_extras_cost_nothing() -> None:
    assert encode_extras({}) == b"" and decode_extras(b"") == {}


def test_extras_do_not_depend_on_the_order() -> None:
    backwards = {name: EXTRAS[name] for name in reversed(list(EXTRAS))}
    assert list(backwards) != list(EXTRAS)
    assert encode_extras(backwards) == encode_extras(EXTRAS)


scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(st.text(), scalars))
@properties
def test_any_scalars_come_back(extras: dict[str, Extra]) -> None:
    encoded = encode_extras(extras)
    assert len(encoded) == extras_size(extras)
    assert_same_extras(decode_extras(encoded), extras)


def test_scalars_that_are_not_finite_come_back() -> None:
    found = decode_extras(encode_extras({"nan": math.nan, "inf": -math.inf, "zero": -0.0}))
    assert repr(found) == "{'inf': -inf, 'nan': nan, 'zero': -0.0}"


def test_a_tensor_is_written_as_it_reads() -> None:
    """Strided views, views that overlap, and tensors with a gradient."""
    grid = torch.arange(6.0, requires_grad=True).view(2, 3)
    extras: dict[str, Extra] = {"columns": grid.T, "row": grid[1], "every_other": grid.view(-1)[::2]}
    found = decode_extras(encode_extras(extras))
    assert {name: torch.as_tensor(value).tolist() for name, value in found.items()} == {
        "columns": [[0, 3], [1, 4], [2, 5]],
        "row": [3, 4, 5],
        "every_other": [0, 2, 4],
    }


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("x", torch.zeros(1, dtype=torch.float64), "'x' is a tensor of torch.float64"),
        ("x", [1, 2], "'x' is list"),
        ("x", None, "'x' is NoneType"),
        ("x", np.float32(1), "'x' is float32"),
        ("__metadata__", torch.zeros(1), "under the name '__metadata__'"),
    ],
)
def test_what_cannot_travel_is_refused(name: str, value: Extra, said: str) -> None:
    with pytest.raises(MethodError, match=said):
        encode_extras({name: value})


def safetensors_of(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not safetensors at all",
        safetensors_of(b'{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}', bytes(8)),
        safetensors_of(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
        safetensors_of(b'{"__metadata__":{"scalars":"[1]"}}'),
        safetensors_of(b'{"__metadata__":{"scalars":"{\\"a\\":[1]}"}}'),
        safetensors_of(b'{"__metadata__":{"scalars":"{\\"a\\":null}"}}'),
        safetensors_of(b'{"__metadata__":{"scalars":"' + b"[" * 100_000 + b'"}}'),
        safetensors_of(b'{"__metadata__":{"scalars":"' + b"1" * 10_000 + b'"}}'),
    ],
)
def test_other_extras_are_refused(data: bytes) -> None:
    if not data:
        data = encode_extras(EXTRAS)[:-1]
    with pytest.raises(WireError, match="extras: found"):
        decode_extras(data)


@given(st.binary(min_size=1, max_size=300))
@properties
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(WireError):
        decode_extras(junk)
