"""Compressed differences: bytes by hand, expected values, and what comes back of any tensor."""

from struct import pack, unpack_from
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.costs.codec import Codec
from fedray.costs.differences import CODECS, STC, DeltaCodec, FedPAQ, Int8, TopK
from fedray.costs.topk import expected_bits, golomb, read_golomb, width_of
from fedray.errors import WireError
from fedray.types import Layout, Mask, Params
from tests.costs.test_differences import DIFFERENCE, FULL, HALF, LAYOUT

PROPERTY = settings(deadline=None, max_examples=60)
MADE = [kind() for kind in CODECS.values()]
ALL = [codec for codec in MADE if isinstance(codec, DeltaCodec)]


def drawn(seed: int, size: int, density: float, tensors: int = 3) -> tuple[Params, Mask]:
    """Return a random difference, zero outside a random mask of at least one entry."""
    rng = torch.Generator().manual_seed(seed)
    sizes = [1 + size // tensors] * tensors
    layout = Layout(
        tuple(f"t{i}" for i in range(tensors)),
        tuple((n,) for n in sizes),
        (True,) * tensors,
        (True,) * tensors,
    )
    flat = torch.randn(layout.size, generator=rng) * 10 ** (4 * torch.rand(1, generator=rng) - 2)
    held = torch.rand(layout.size, generator=rng) < density
    held[int(torch.randint(layout.size, (1,), generator=rng))] = True
    mask = Mask(held, layout)
    return Params(flat, layout).masked(mask), mask


# ── ternary


def test_a_ternary_payload_by_hand():
    payload = STC(share=0.3).encode(DIFFERENCE, FULL)
    # −5, 2 and 3 at 1, 3 and 8: their mean size, and gaps 1, 1 and 4. With b = 1: 0 0 110, 1 1 0, signs 1 0 0
    assert width_of(3, 10) == 1
    assert payload == pack("<If", 3, 10 / 3) + bytes([0b00110110, 0b10000000])
    expected = torch.zeros(10)
    expected[[1, 3, 8]] = torch.tensor([-10 / 3, 10 / 3, 10 / 3])
    assert torch.equal(STC().decode(payload, FULL).flat, expected)


def test_positions_count_among_the_entries_of_the_mask():
    payload = STC(share=0.4).encode(DIFFERENCE.masked(HALF), HALF)
    # of 1, 0, 2, −0.5, 3 the third and the fifth; with b = 0 gaps 2 and 1: 110 10, and two signs
    assert width_of(2, 5) == 0
    assert payload == pack("<If", 2, 2.5) + bytes([0b11010000])
    found = STC().decode(payload, HALF).flat
    assert found.tolist() == [0, 0, 0, 0, 2.5, 0, 0, 0, 2.5, 0]


def test_no_entry_is_sent_of_what_did_not_move():
    payload = STC(share=1.0).encode(Params(torch.zeros(10), LAYOUT), FULL)
    assert payload == pack("<If", 0, 0.0)
    assert not STC().decode(payload, FULL).flat.any()
    # 8 entries are not zero: 8 bits, one more for the gap of one, and 8 signs
    assert len(STC(share=1.0).encode(DIFFERENCE, FULL)) == 8 + 3


@pytest.mark.parametrize(
    ("count", "of", "width"), [(1, 400, 8), (10, 1000, 6), (1, 10, 3), (1, 2, 0), (5, 5, 0)]
)
def test_the_width_of_a_remainder(count: int, of: int, width: int):
    """As in Sattler et al., section V: b* = 1 + ⌊log₂(ln(φ − 1) / ln(1 − p))⌋."""
    assert width_of(count, of) == width


def test_no_other_width_takes_fewer_bits():
    rng = np.random.default_rng(0)
    for share in (0.3, 0.05, 0.01, 0.0025):
        chosen = np.flatnonzero(rng.random(200_000) < share)
        gaps, best = np.diff(chosen, prepend=-1) - 1, width_of(len(chosen), 200_000)
        bits = {width: len(golomb(gaps, width)) for width in range(max(0, best - 2), best + 3)}
        assert bits[best] <= 1.01 * min(bits.values())
        assert bits[best] / len(gaps) == pytest.approx(expected_bits(len(chosen), 200_000), rel=0.02)


@PROPERTY
@given(st.lists(st.integers(0, 3000), max_size=50), st.integers(0, 12))
def test_gaps_come_back(gaps: list[int], width: int):
    bits = golomb(np.array(gaps, dtype=np.int64), width)
    assert len(bits) == sum((gap >> width) + 1 + width for gap in gaps)
    found, used = read_golomb(bits, len(gaps), width, 10**6)
    assert found.tolist() == gaps and used == len(bits)


def test_the_predicted_length_is_near_the_real_one():
    generator = torch.Generator().manual_seed(0)
    layout = Layout(("w",), ((50_000,),), (True,), (True,))
    flat, mask = torch.randn(layout.size, generator=generator), Mask.full(layout)
    for share in (0.1, 0.01, 0.0025):
        payload = STC(share=share).encode(Params(flat, layout), mask)
        assert len(payload) == pytest.approx(STC(share=share).size(mask), rel=0.03)


def test_not_a_number_reaches_the_server():
    flat = DIFFERENCE.flat.clone()
    flat[7] = torch.nan
    for codec in ALL:
        sent = codec.decode(codec.encode(Params(flat, LAYOUT), FULL), FULL).flat
        assert not bool(sent.isfinite().all()), codec


# ── rounding at random


def test_a_payload_of_levels_by_hand():
    difference = Params(torch.tensor([3.0, -3, 0, 0, 3, 0, 0, 0, -1, 0]), LAYOUT)
    payload = FedPAQ(bits=2).encode(difference, FULL)
    # −1, 0 and 1 are the codes 0, 1 and 2; w has the largest magnitude 3, b has 1
    codes = [0b10_00_01_01, 0b10_01_01_01, 0b00_01_0000]
    assert payload == pack("<ff", 3, 1) + bytes(codes)
    assert torch.equal(FedPAQ(bits=2).decode(payload, FULL).flat, difference.flat)
    assert len(payload) == FedPAQ(bits=2).size(FULL) == 4 + 4 + 3


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_of_levels(bits: int):
    codec = FedPAQ(bits=bits)
    held = Mask(torch.tensor([False] * 6 + [True] * 3 + [False]), LAYOUT)  # nothing of w: no size of it
    assert len(codec.encode(DIFFERENCE, FULL)) == 4 * 2 - (-10 * bits // 8)
    assert len(codec.encode(DIFFERENCE.masked(held), held)) == 4 - (-3 * bits // 8)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_expected_value_is_exact(bits: int):
    codec, draws = FedPAQ(bits=bits), 4000
    rng = np.random.default_rng(1)
    total, squares = np.zeros(10), np.zeros(10)
    for _ in range(draws):
        found = codec.decode(codec.encode_drawing(DIFFERENCE, FULL, rng), FULL).flat.numpy().astype(float)
        total, squares = total + found, squares + (found - DIFFERENCE.flat.numpy()) ** 2
    step = np.repeat([5.0, 3.0], [6, 4]) / codec.steps
    assert np.all(np.abs(total / draws - DIFFERENCE.flat.numpy()) <= 5 * step / 2 / draws**0.5)
    assert np.all(squares / draws <= step**2 / 4 * 1.1)  # at most that of two levels with probability ½
    exact = np.abs(DIFFERENCE.flat.numpy() / step - np.rint(DIFFERENCE.flat.numpy() / step)) < 1e-9
    assert np.all(squares[exact] == 0)


def test_nearest_rounding_would_be_biased():
    difference = Params(torch.tensor([5.0, 1, 1, 1, 1, 1, 3, 1, 1, 1]), LAYOUT)
    rng = np.random.default_rng(0)
    sent = [FedPAQ(bits=2).encode_drawing(difference, FULL, rng) for _ in range(400)]
    mean = torch.stack([FedPAQ(bits=2).decode(payload, FULL).flat for payload in sent]).mean(0)
    assert mean[1:6].mean() == pytest.approx(1.0, abs=0.2)  # nearest: 0
    assert len(set(sent)) > 100


# ── bytes of tensors


def test_bytes_of_int8():
    assert len(Int8().encode(DIFFERENCE, FULL)) == 32 + 2 * 5 + 10  # header, ranges, a byte each
    assert (
        len(Int8().encode(DIFFERENCE.masked(HALF), HALF)) == 32 + 2 * 5 + 5 + 2
    )  # ⌈10/8⌉ bytes of positions
    assert Int8().size(HALF) == 49


@PROPERTY
@given(st.integers(0, 2**31), st.integers(1, 400), st.floats(0.05, 1), st.floats(0.01, 1), st.integers(2, 8))
def test_what_any_tensor_comes_back_as(seed: int, size: int, density: float, share: float, bits: int):
    difference, mask = drawn(seed, size, density)
    held = mask.flat
    for codec in (TopK(share=share), STC(share=share), FedPAQ(bits=bits), Int8()):
        payload = codec.encode(difference, mask)
        found = codec.decode(payload, mask).flat
        assert not bool(found[~held].any()), codec
        assert torch.equal(found.sign() * difference.flat.sign(), found.abs().sign()), "no sign is turned"
        if isinstance(codec, FedPAQ | Int8):
            assert len(payload) == codec.size(mask)
            steps = 255 if isinstance(codec, Int8) else codec.steps
            for name in mask.layout.names:
                given, got = difference[name], mask.layout.views(found)[name]
                span = (
                    float(given.max().clamp(min=0) - given.min().clamp(max=0))
                    if steps == 255
                    else float(given.abs().max())
                )
                assert bool(((got - given).abs() <= span / steps * 1.001).all())
        else:
            best = difference.flat.abs().topk(int((found != 0).sum())).values
            chosen = difference.flat.abs()[found != 0].sort(descending=True).values
            assert torch.equal(chosen, best)
    ternary = STC(share=share).decode(STC(share=share).encode(difference, mask), mask).flat
    sent = ternary != 0
    assert len(ternary[sent].abs().unique()) <= 1
    assert float(ternary.abs().sum()) == pytest.approx(float(difference.flat[sent].abs().sum()), rel=1e-4)


# ── what is not whole


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize("mask", [FULL, HALF], ids=["full", "half"])
def test_a_payload_that_is_cut_or_longer_is_a_wire_error(codec: DeltaCodec, mask: Mask):
    payload = codec.encode(DIFFERENCE.masked(mask), mask)
    for wrong in [*(payload[:n] for n in range(len(payload))), payload + b"\0"]:
        with pytest.raises(WireError):
            codec.decode(wrong, mask)


@PROPERTY
@given(st.binary(max_size=60), st.sampled_from(ALL))
def test_any_bytes_are_read_or_refused(data: bytes, codec: DeltaCodec):
    try:
        found = codec.decode(data, HALF)
    except WireError:
        return
    assert found.layout == LAYOUT


def test_a_count_of_entries_is_not_believed():
    payload = STC(share=0.3).encode(DIFFERENCE, FULL)
    for count in (9, 11, 2**32 - 1):
        with pytest.raises(WireError):
            STC().decode(pack("<I", count) + payload[4:], FULL)
    assert unpack_from("<I", payload)[0] == 3
    with pytest.raises(WireError, match="beyond the 10 entries"):
        STC().decode(pack("<If", 3, 1.0) + bytes([0b11111111, 0b00000000]), FULL)


def test_a_ternary_update_of_a_pruned_model_is_a_fraction_of_the_plain_one():
    difference, mask = drawn(3, 60_000, 0.1)
    plain = Codec().size(mask, known=mask.digest)
    lengths: dict[str, Any] = {type(c).__name__: plain / len(c.encode(difference, mask)) for c in ALL}
    assert lengths["STC"] > 150 and lengths["FedPAQ"] > 7.9 and lengths["Int8"] > 3.9
