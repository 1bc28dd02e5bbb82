"""Codecs of differences: what arrives, its bytes, and what is refused."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedray.costs.codec import Codec, decode_mask, encode_mask, mask_size
from fedray.costs.differences import DeltaCodec, TopK, decode_update, encode_update, update_size
from fedray.errors import MethodError, WireError
from fedray.types import Layout, Mask, Params

LAYOUT = Layout(("w", "b"), ((3, 2), (4,)), (True, False), (True, True))
FULL = Mask.full(LAYOUT)
DIFFERENCE = Params(torch.tensor([1.0, -5.0, 0.0, 2.0, 2.0, 2.0, -0.5, 0.25, 3.0, 0.0]), LAYOUT)
HALF = Mask(torch.tensor([True, False] * 5), LAYOUT)


def through(codec: DeltaCodec, difference: Params, mask: Mask, known: Mask = FULL, **extras: Any) -> Params:
    payload = encode_update(codec, difference.masked(mask), mask, known.digest, extras)
    arrived, under = decode_update(codec, payload, LAYOUT, known)
    assert under == mask
    return arrived


@pytest.mark.parametrize(
    ("share", "mask", "arrived"),
    [
        (0.1, FULL, {1: -5.0}),
        (0.2, FULL, {1: -5.0, 8: 3.0}),
        (0.35, FULL, {1: -5.0, 8: 3.0, 3: 2.0, 4: 2.0}),  # rounded up; the first of three equal ones
        (0.2, HALF, {8: 3.0}),
        (0.21, HALF, {8: 3.0, 4: 2.0}),
        (1.0, HALF, {0: 1.0, 2: 0.0, 4: 2.0, 6: -0.5, 8: 3.0}),
        (1e-9, FULL, {1: -5.0}),
    ],
)
def test_the_largest_entries_of_the_mask_arrive(share: float, mask: Mask, arrived: dict[int, float]):
    expected = torch.zeros(10)
    for index, value in arrived.items():
        expected[index] = value
    assert torch.equal(through(TopK(share=share), DIFFERENCE, mask).flat, expected)


def test_nan_and_infinity_arrive_before_all_others():
    flat = DIFFERENCE.flat.clone()
    flat[7], flat[2] = float("nan"), -torch.inf
    sent = through(TopK(share=0.2), Params(flat, LAYOUT), FULL).flat
    assert sent[7].isnan() and sent[2] == -torch.inf and sent.count_nonzero() == 2


@pytest.mark.parametrize("values", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("known", [FULL, HALF], ids=["full", "half"])
@pytest.mark.parametrize("mask", [FULL, HALF], ids=["full", "half"])
def test_bytes_are_those_of_indices_values_mask_and_extras(values: Any, known: Mask, mask: Mask):
    codec, extras = TopK(share=0.3, values=values), {"metrics.loss": 0.5}
    payload = encode_update(codec, DIFFERENCE.masked(mask), mask, known.digest, extras)
    chosen = Mask(through(codec, DIFFERENCE, mask, known).flat != 0, LAYOUT)
    beside = Codec().size(chosen, extras=extras) - Codec().size(chosen)
    assert len(payload) == 8 + mask_size(mask, known.digest) + beside + Codec(values).size(chosen)


def test_a_small_share_of_a_large_model_takes_few_bytes():
    layout = Layout(("w",), ((1000, 1000),), (True,), (True,))
    mask = Mask.full(layout)
    flat = torch.zeros(layout.size)
    flat[::1000] = torch.arange(1.0, 1001.0)
    payload = encode_update(TopK(share=0.001), Params(flat, layout), mask, mask.digest, {})
    assert 1000 * (4 + 2) < len(payload) < 1000 * (4 + 2) + 100
    assert len(payload) == pytest.approx(update_size(TopK(share=0.001), mask, mask.digest), rel=0.01)


@pytest.mark.parametrize("known", [None, FULL.digest, HALF.digest])
@pytest.mark.parametrize("mask", [FULL, HALF, Mask.none(LAYOUT)])
def test_a_mask_travels_alone(mask: Mask, known: bytes | None):
    data = encode_mask(mask, known)
    assert len(data) == mask_size(mask, known)
    assert decode_mask(data, LAYOUT, {FULL.digest: FULL, HALF.digest: HALF}) == mask


@pytest.mark.parametrize("cut", [0, 5, 9, 20, -1])
def test_what_is_not_whole_is_a_wire_error(cut: int):
    payload = encode_update(TopK(), DIFFERENCE, HALF, FULL.digest, {})
    with pytest.raises(WireError):
        decode_update(TopK(), payload[:cut], LAYOUT, FULL)


@dataclass(frozen=True, kw_only=True)
class Wrong(DeltaCodec):
    """A codec that returns what a test says."""

    written: Any = b""
    read: Any = None

    def encode(self, difference: Params, mask: Mask) -> Any:
        """Return it."""
        return self.written

    def decode(self, payload: bytes, mask: Mask) -> Any:
        """Return it."""
        return self.read


def test_a_codec_that_writes_no_bytes_or_reads_no_params_is_named():
    with pytest.raises(MethodError, match=r"clients\.uplink: Wrong\.encode returned Tensor, not bytes"):
        through(Wrong(written=torch.zeros(3)), DIFFERENCE, FULL)
    for read in (None, torch.zeros(10), Params(torch.zeros(1), Layout(("w",), ((1,),), (True,), (True,)))):
        with pytest.raises(MethodError, match=r"clients\.uplink: Wrong\.decode must return Params of"):
            through(Wrong(read=read), DIFFERENCE, FULL)


def test_a_codec_without_its_methods_says_so():
    with pytest.raises(NotImplementedError):
        through(DeltaCodec(), DIFFERENCE, FULL)
