"""Payloads: what goes in comes out, at the size that was promised, and nothing else is believed."""

import math
import tracemalloc
from struct import pack_into

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.costs import codec as codec_module
from fedray.costs.codec import (
    DIGEST_BYTES,
    HEADER_BYTES,
    Codec,
    Decoded,
    ValueKind,
)
from fedray.errors import ConfigError, WireError
from fedray.types import Layout, Mask, Params
from tests.costs.test_extras import EXTRAS, assert_same_extras

KINDS: tuple[ValueKind, ...] = ("fp32", "fp16", "int8")
DENSE, KNOWN, BITMAP, GAPS_U8, GAPS_U16, RUNS_U8, RUNS_U16 = range(7)
properties = settings(deadline=None, max_examples=50)


def layout_of(*sizes: int) -> Layout:
    flags = (True,) * len(sizes)
    return Layout(tuple(f"t{i}" for i in range(len(sizes))), tuple((size,) for size in sizes), flags, flags)


def mask_of(bits: object, layout: Layout | None = None) -> Mask:
    flat = torch.from_numpy(np.array(bits, dtype=bool))
    return Mask(flat, layout or layout_of(flat.numel()))


def holding(n: int, *held: int) -> Mask:
    bits = np.zeros(n, bool)
    bits[list(held)] = True
    return mask_of(bits)


def params_of(values: object, layout: Layout | None = None) -> Params:
    flat = torch.from_numpy(np.array(values, dtype=np.float32))
    return Params(flat, layout or layout_of(flat.numel()))


def any_bits(layout: Layout, seed: int = 0) -> Params:
    """Every pattern of 32 bits: NaN payloads, signalling NaN, infinities, denormals, −0."""
    bits = np.random.default_rng(seed).integers(0, 2**32, layout.size, dtype=np.uint32)
    return Params(torch.from_numpy(bits.view(np.float32)), layout)


def weights(layout: Layout, seed: int = 0) -> Params:
    values = np.random.default_rng(seed).standard_normal(layout.size, dtype=np.float32)
    return Params(torch.from_numpy(values), layout)


def random_mask(layout: Layout, density: float, seed: int = 0) -> Mask:
    return mask_of(np.random.default_rng(seed).random(layout.size) < density, layout)


def assert_same_bits(found: Params, expected: Params) -> None:
    assert torch.equal(found.flat.view(torch.int32), expected.flat.view(torch.int32))


def position_kind(payload: bytes) -> int:
    return payload[7]


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """Masks of some 1 to 900 entries in 1 to 4 tensors: scattered, in runs, empty or full."""
    layout = layout_of(*draw(st.lists(st.integers(1, 230), min_size=1, max_size=4)))
    bits: list[bool] = []
    if draw(st.booleans()):
        density = draw(st.sampled_from((0.0, 0.004, 0.1, 0.5, 0.99, 1.0)))
        return random_mask(layout, density, seed=draw(st.integers(0, 2**31)))
    held = draw(st.booleans())
    for run in draw(st.lists(st.integers(1, 400), max_size=8)):
        bits += [held] * run
        held = not held
    return mask_of((bits + [held] * layout.size)[: layout.size], layout)


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("density", [0, 1e-4, 0.01, 0.1, 0.5, 1])
@pytest.mark.parametrize("n", [1, 7, 100_000])
def test_fp32_is_exact_bit_for_bit(n: int, density: float) -> None:
    layout = layout_of(n)
    params, mask = any_bits(layout), random_mask(layout, density)
    payload = Codec().encode(params, mask)
    decoded = Codec().decode(payload, layout)
    assert decoded.mask == mask
    assert_same_bits(decoded.params, params.masked(mask))
    assert len(payload) <= HEADER_BYTES + 4 * mask.count + math.ceil(n / 8)  # a bitmap
    assert len(payload) <= HEADER_BYTES + 4 * n  # dense


def test_a_million_entries() -> None:
    layout = layout_of(400_000, 600_000)
    params, mask = any_bits(layout), random_mask(layout, 0.03)
    decoded = Codec().decode(Codec().encode(params, mask), layout)
    assert decoded.mask == mask
    assert_same_bits(decoded.params, params.masked(mask))


@given(masks(), st.sampled_from(KINDS), st.sampled_from(("nothing", "this", "another")), st.booleans())
@properties
def test_size_is_the_length_and_the_smallest(mask: Mask, kind: ValueKind, holds: str, beside: bool) -> None:
    codec, layout = Codec(kind), mask.layout
    known = {"nothing": None, "this": mask.digest, "another": b"8 bytes!"}[holds]
    extras = EXTRAS if beside else {}
    payload = codec.encode(weights(layout), mask, known=known, extras=extras)
    assert len(payload) == codec.size(mask, known=known, extras=extras)
    decoded = codec.decode(payload, layout, known={mask.digest: mask})
    assert decoded.mask == mask
    assert_same_extras(decoded.extras, extras)
    assert not decoded.params.flat[~mask.flat].any()

    header_bytes = codec.size(holding(layout.size), extras=extras)
    affine_bytes = 5 * len(layout.names) if kind == "int8" and mask.count else 0
    values_bytes = {"fp32": 4, "fp16": 2, "int8": 1}[kind] * mask.count + affine_bytes
    position_bytes = len(payload) - header_bytes - values_bytes
    assert 0 <= position_bytes <= math.ceil(layout.size / 8)
    if mask.is_full or mask.count == 0:
        assert position_bytes == 0
    if holds == "this":
        assert position_bytes <= DIGEST_BYTES
    if kind == "fp32":
        assert len(payload) <= codec.size(Mask.full(layout), extras=extras) + HEADER_BYTES


@given(masks(), st.integers(0, 2**31), st.booleans())
@properties
def test_any_mask_comes_back_with_its_values(mask: Mask, seed: int, receiver_holds_it: bool) -> None:
    params = any_bits(mask.layout, seed)
    payload = Codec().encode(params, mask, known=mask.digest if receiver_holds_it else None)
    decoded = Codec().decode(payload, mask.layout, known={mask.digest: mask} if receiver_holds_it else {})
    assert decoded.mask == mask
    assert_same_bits(decoded.params, params.masked(mask))


def test_decoding_owns_its_memory() -> None:
    params = weights(layout_of(9))
    for mask in (Mask.full(params.layout), holding(9, 3, 4)):
        payload = Codec().encode(params, mask)
        Codec().decode(payload, params.layout).params.flat.zero_()
        assert_same_bits(Codec().decode(payload, params.layout).params, params.masked(mask))


def test_any_codec_reads_what_another_wrote() -> None:
    params = params_of([0.5, -2.0])
    payload = Codec("fp16").encode(params, Mask.full(params.layout))
    assert Codec("int8").decode(payload, params.layout).params == params


# -------------------------------------------------------------------------------------------------- positions


def test_a_full_mask_needs_no_positions() -> None:
    params = params_of([1.0, 2.0])
    for known in (None, Mask.full(params.layout).digest):
        payload = Codec().encode(params, Mask.full(params.layout), known=known)
        assert position_kind(payload) == DENSE
        assert payload[HEADER_BYTES:] == np.array([1, 2], "<f4").tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_silent_client_sends_a_header(kind: ValueKind) -> None:
    params = weights(layout_of(1000))
    payload = Codec(kind).encode(params, holding(1000), known=holding(1000).digest)
    assert len(payload) == HEADER_BYTES == 32
    decoded = Codec(kind).decode(payload, params.layout)
    assert decoded.mask.count == 0 and not decoded.params.flat.any()


def test_bitmap_by_hand() -> None:
    mask = mask_of([1, 0, 1, 0, 0, 1, 1, 0, 0, 1])
    payload = Codec().encode(params_of(range(10)), mask)
    assert position_kind(payload) == BITMAP
    assert payload[32:52] == np.array([0, 2, 5, 6, 9], "<f4").tobytes()
    assert payload[52:] == bytes([0b10100110, 0b01000000])


def test_gaps_by_hand() -> None:
    mask = holding(10_000, 2, 2 + 255, 2 + 255 + 256)
    payload = Codec().encode(params_of(range(10_000)), mask)
    assert position_kind(payload) == GAPS_U8
    assert payload[44:] == bytes([3, 255, 0, 1])  # 256 = an advance of 255, and 1


def test_runs_by_hand() -> None:
    bits = np.ones(100_000, bool)
    bits[300:66_000] = False
    payload = Codec().encode(params_of(np.zeros(100_000)), mask_of(bits))
    assert position_kind(payload) == RUNS_U16
    # held from entry 0, not from 300 = 1 + 299 − 0, held again from 66,000 = 65,700 later: an advance and 165
    assert payload[-8:] == np.array([1, 300, 0, 165], "<u2").tobytes()


@pytest.mark.parametrize(
    ("distance", "kind", "position_bytes"),
    [
        (254, GAPS_U8, 2),
        (255, GAPS_U8, 2),
        (256, GAPS_U8, 3),
        (257, GAPS_U8, 3),
        (510, GAPS_U8, 3),
        (511, GAPS_U8, 4),
        (766, GAPS_U16, 4),
        (65_534, GAPS_U16, 4),
        (65_535, GAPS_U16, 4),
        (65_536, GAPS_U16, 6),
        (65_537, GAPS_U16, 6),
    ],
)
def test_long_gaps(distance: int, kind: int, position_bytes: int) -> None:
    mask = holding(300_000, 0, distance)
    params = any_bits(mask.layout)
    payload = Codec().encode(params, mask)
    assert position_kind(payload) == kind
    assert len(payload) == HEADER_BYTES + 2 * 4 + position_bytes
    decoded = Codec().decode(payload, mask.layout)
    assert decoded.mask == mask
    assert_same_bits(decoded.params, params.masked(mask))


@pytest.mark.parametrize("n", [255, 256, 65_535, 65_536, 200_000])
def test_a_gap_of_the_whole_vector(n: int) -> None:
    mask = holding(n, n - 1)
    payload = Codec().encode(any_bits(mask.layout), mask)
    u8, u16 = 1 + (n - 1) // 255, 2 * (1 + (n - 1) // 65_535)
    assert len(payload) == HEADER_BYTES + 4 + min(u8, u16)
    assert Codec().decode(payload, mask.layout).mask == mask


@given(st.lists(st.sampled_from((1, 2, 254, 255, 256, 257, 65_534, 65_535, 65_536, 65_537)), max_size=12))
@properties
def test_gaps_about_the_escapes(distances: list[int]) -> None:
    held = np.cumsum(distances, dtype=int) - 1
    mask = holding(int(sum(distances)) + 40_000, *held)
    decoded = Codec().decode(Codec().encode(weights(mask.layout), mask), mask.layout)
    assert decoded.mask == mask


def test_whole_layers_cost_next_to_nothing() -> None:
    layout = layout_of(40_000, 30_000, 30_000)
    mask = Mask.full(layout).clone()
    mask["t1"][:] = False
    assert Codec().size(mask) <= HEADER_BYTES + 4 * 70_000 + 6  # three changes, two bytes each


def test_nearly_full_is_no_dearer_than_full() -> None:
    bits = np.ones(100_000, bool)
    bits[::1000] = False
    mask = mask_of(bits)
    assert Codec().size(mask) <= Codec().size(Mask.full(mask.layout)) + HEADER_BYTES


@pytest.mark.parametrize(
    ("density", "values_mb", "bitmap_mb", "entropy_mb"), [(0.2, 8.94, 10.34, 9.95), (0.05, 2.23, 3.63, 2.63)]
)
def test_resnet18_table(density: float, values_mb: float, bitmap_mb: float, entropy_mb: float) -> None:
    n = 11_173_962
    rng = np.random.default_rng(0)
    mask = mask_of(rng.integers(0, 1000, n, dtype=np.uint16) < 1000 * density)
    codec = Codec()
    assert codec.size(Mask.full(mask.layout)) == 4 * n + HEADER_BYTES == 44_695_880
    values_only = codec.size(mask, known=mask.digest)
    assert values_only == 4 * mask.count + DIGEST_BYTES + HEADER_BYTES
    assert values_only / 1e6 == pytest.approx(values_mb, abs=0.01)
    bitmap = 4 * mask.count + math.ceil(n / 8) + HEADER_BYTES
    assert bitmap / 1e6 == pytest.approx(bitmap_mb, abs=0.01)
    if density == 0.2:
        assert codec.size(mask) == bitmap
    else:  # a byte for each gap, and few are longer than 255
        assert codec.size(mask) / 1e6 == pytest.approx(2.23 + 0.56, abs=0.01)
    assert codec.size(mask) / 1e6 > entropy_mb - 0.01


# ------------------------------------------------------------------------------------------------ values only


def test_values_only_by_hand() -> None:
    mask = random_mask(layout_of(1000), 0.3)
    params = any_bits(mask.layout)
    payload = Codec().encode(params, mask, known=mask.digest)
    assert position_kind(payload) == KNOWN
    assert payload[HEADER_BYTES:] == params.flat[mask.flat].numpy().tobytes() + mask.digest
    decoded = Codec().decode(payload, mask.layout, known={mask.digest: mask})
    assert decoded.mask is mask


def test_positions_travel_where_the_receiver_holds_another_mask() -> None:
    old, new = (random_mask(layout_of(1000), 0.3, seed) for seed in (0, 1))
    payload = Codec().encode(weights(new.layout), new, known=old.digest)
    assert position_kind(payload) == BITMAP
    assert Codec().decode(payload, new.layout, known={old.digest: old}).mask == new


def test_values_only_for_a_mask_not_held_is_refused() -> None:
    held, named = (random_mask(layout_of(1000), 0.3, seed) for seed in (0, 1))
    payload = Codec().encode(weights(named.layout), named, known=named.digest)
    with pytest.raises(WireError, match=rf"found mask {named.digest.hex()}.*holds: {held.digest.hex()}"):
        Codec().decode(payload, named.layout, known={held.digest: held})
    with pytest.raises(WireError, match="holds: none"):
        Codec().decode(payload, named.layout)
    wrong = random_mask(layout_of(1000), 0.5)
    with pytest.raises(WireError, match="positions"):
        Codec().decode(payload, named.layout, known={named.digest: wrong})


def test_values_only_in_turns_for_several_masks() -> None:
    shorter, longer = holding(100, *range(0, 100, 3)), holding(101, *range(0, 100, 3))
    assert shorter.digest == longer.digest  # the digest is of packed bits, which do not tell the length
    other = random_mask(layout_of(100), 0.3)
    for mask in (shorter, longer, other, shorter, other, longer):
        params = any_bits(mask.layout)
        payload = Codec().encode(params, mask, known=mask.digest)
        assert position_kind(payload) == KNOWN
        decoded = Codec().decode(payload, mask.layout, known={mask.digest: mask})
        assert_same_bits(decoded.params, params.masked(mask))
    with pytest.raises(WireError, match="values only"):
        Codec().decode(payload, longer.layout, known={longer.digest: shorter})
    assert len(codec_module._LAST_INDEX) == 1  # what is remembered does not grow


def test_a_small_bitmap_is_cheaper_than_a_digest() -> None:
    mask = holding(50, *range(0, 50, 3))
    payload = Codec().encode(weights(mask.layout), mask, known=mask.digest)
    assert position_kind(payload) == BITMAP
    assert len(payload) == HEADER_BYTES + 4 * 17 + 7


# ----------------------------------------------------------------------------------------------------- values


def through(kind: ValueKind, values: object, layout: Layout | None = None) -> torch.Tensor:
    params = params_of(values, layout)
    payload = Codec(kind).encode(params, Mask.full(params.layout))
    return Codec(kind).decode(payload, params.layout).params.flat


def test_fp16_saturates_but_keeps_infinities_and_nan() -> None:
    given_values = [1.0, 1 / 3, 65_504.0, 65_519.0, 65_520.0, -1e38, math.inf, -math.inf, 2.0**-24, 1e-9]
    expected = [1.0, 0.333251953125, 65_504, 65_504, 65_504, -65_504, math.inf, -math.inf, 2.0**-24, 0.0]
    assert through("fp16", given_values).tolist() == expected
    assert through("fp16", [math.nan]).isnan().all()
    assert math.copysign(1, through("fp16", [-0.0]).item()) == -1


@given(st.lists(st.floats(2.0**-14, 65_504, width=32), min_size=1, max_size=50))
@properties
def test_fp16_error(values: list[float]) -> None:
    found = through("fp16", values).numpy().astype(np.float64)
    assert (np.abs(found - values) <= 2.0**-11 * np.array(values)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.02, 0.5, 1])
def test_any_bits_travel_without_a_warning(kind: ValueKind, density: float) -> None:
    layout = layout_of(500, 1500)
    params, mask = any_bits(layout), random_mask(layout, density)
    decoded = Codec(kind).decode(Codec(kind).encode(params, mask), layout)
    assert decoded.mask == mask
    if kind != "int8":
        assert torch.equal(decoded.params.flat.isnan(), params.masked(mask).flat.isnan())


def test_int8_by_hand() -> None:
    # range 255, so the scale is 1; −1 is the zero point 1
    assert through("int8", [-1.0, 0.0, 1.4, 254.0]).tolist() == [-1, 0, 1, 254]
    # the zero point 0.5 is cut to 0, so −0.5 cannot be said: half a step of error
    assert through("int8", [-0.5, 254.5]).tolist() == [0, 254]
    # a range without 0 is widened to [0, 510]: scale 2
    assert through("int8", [400.0, 510.0, 400.9]).tolist() == [400, 510, 400]
    assert through("int8", [-400.0, -510.0, -400.9]).tolist() == [-400, -510, -400]


def test_int8_payload_by_hand() -> None:
    layout = layout_of(2, 3, 2)
    params = params_of([0, 7, -1, 254, 9, 0, 0], layout)
    payload = Codec("int8").encode(params, mask_of([0, 0, 1, 1, 0, 1, 1], layout))
    scales, zeros, codes = np.array([0, 1, 0], "<f4").tobytes(), bytes([0, 1, 0]), bytes([0, 255, 0, 0])
    assert payload[HEADER_BYTES:-1] == scales + zeros + codes
    assert payload[-1:] == bytes([0b0011_0110])


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), min_size=1),
    st.integers(0, 2**31),
)
@properties
def test_int8_error_is_within_a_step_of_each_tensor(tensors: list[list[float]], seed: int) -> None:
    layout = layout_of(*map(len, tensors))
    params, mask = params_of(np.concatenate(tensors), layout), random_mask(layout, 0.7, seed)
    decoded = Codec("int8").decode(Codec("int8").encode(params, mask), layout)
    assert decoded.params.is_finite()
    for name in layout.names:
        exact = params[name][mask[name]].double()
        if len(exact):
            step = (exact.max().clamp(min=0) - exact.min().clamp(max=0)) / 255
            # float32 arithmetic adds a little to the step, and the step is no smaller than the least denormal
            bound = step * (1 + 1e-4) + 1.5e-45
            assert ((decoded.params[name][mask[name]].double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("constant", [0.0, 3.7, -3.7, 1e-45, -1e-40, 3.4028235e38, -3.4028235e38])
def test_int8_of_a_constant_tensor(constant: float) -> None:
    found = through("int8", [constant] * 5)
    assert found.numpy() == pytest.approx(np.full(5, constant, np.float32), rel=1e-5)


def test_int8_keeps_the_largest_floats_finite() -> None:
    largest = 3.4028234663852886e38
    # zero point 100.3 cut to 100, and 254.7 rounded to 255: 155 steps, where the largest float is 154.7
    assert through("int8", [largest, -largest * 100.3 / 154.7])[0] == largest


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_int8_shows_what_is_not_finite(bad: float) -> None:
    layout = layout_of(3, 3)
    params, mask = params_of([1, bad, 2, 0, 51, 255], layout), mask_of([0, 1, 1, 1, 1, 1], layout)
    decoded = Codec("int8").decode(Codec("int8").encode(params, mask), layout).params
    assert decoded["t0"][0] == 0 and decoded["t0"][1:].isnan().all()
    assert decoded["t1"].tolist() == [0, 51, 255]
    assert not decoded.is_finite()


def test_kinds_of_values() -> None:
    assert [Codec(kind).lossless for kind in KINDS] == [True, False, False]
    with pytest.raises(ConfigError, match="unknown values of a codec 'int9'; did you mean 'int8'"):
        Codec("int9")  # type: ignore[arg-type]


def test_params_and_mask_must_fit() -> None:
    with pytest.raises(ValueError, match="params have 3 entries, the mask has 4"):
        Codec().encode(weights(layout_of(3)), holding(4, 1))


# -------------------------------------------------------------------------------------- what is not believed


def sparse_payload(**changed: int) -> tuple[bytes, Layout]:
    """A payload of 5 values and the gaps 2, 1, 28, 0 205, 0 254, its header fields changed at will."""
    mask = holding(1000, 1, 2, 30, 490, 999)
    payload = bytearray(Codec().encode(weights(mask.layout), mask))
    offsets = {"version": ("<H", 4), "values": ("<B", 6), "positions": ("<B", 7)}
    offsets |= {"entries": ("<Q", 8), "held": ("<Q", 16), "extras": ("<Q", 24)}
    for name, value in changed.items():
        form, offset = offsets[name]
        pack_into(form, payload, offset, value)
    return bytes(payload), mask.layout


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": 2}, "version: found 2, expected 1"),
        ({"values": 3}, "kind of values: found 3"),
        ({"positions": 7}, "kind of positions: found 7"),
        ({"entries": 999}, "entries of the model: found 999, expected 1000"),
        ({"held": 2**60}, "held entries: found 1152921504606846976"),
        ({"held": 1000}, "truncated"),
        ({"held": 4}, "positions|gaps"),
        ({"held": 6}, "positions|gaps"),
        ({"extras": 2**60}, "truncated"),
        ({"extras": 1}, "gap|positions"),
        ({"values": 1}, "positions|gaps"),
        ({"positions": DENSE}, "bytes of positions: found 7, expected none"),
        ({"positions": KNOWN}, "bytes of a mask's digest: found 7, expected 8"),
        ({"positions": BITMAP}, "bytes of the bitmap: found 7, expected 125"),
        ({"positions": GAPS_U16}, "bytes of gaps: found 7, expected a multiple of 2"),
        ({"positions": RUNS_U8}, "positions: found"),
    ],
)
def test_a_header_that_lies_is_refused(changed: dict[str, int], said: str) -> None:
    payload, layout = sparse_payload(**changed)
    with pytest.raises(WireError, match=said):
        Codec().decode(payload, layout)


def test_damaged_payloads_are_refused() -> None:
    payload, layout = sparse_payload()
    for length in range(len(payload)):
        with pytest.raises(WireError):
            Codec().decode(payload[:length], layout)
    with pytest.raises(WireError, match="magic: found b'PK"):
        Codec().decode(b"PK\x03\x04" + payload[4:], layout)
    early = Codec().encode(weights(layout), holding(1000, 1, 2, 30))
    with pytest.raises(WireError, match="last gap: found an advance"):
        Codec().decode(early + b"\x00", layout)
    with pytest.raises(WireError, match="positions: found 4, expected 3"):
        Codec().decode(early + b"\x01", layout)
    with pytest.raises(WireError, match=r"end of the gaps: found 1001, expected at most 1000"):
        Codec().decode(payload[:-1] + bytes([payload[-1] + 1]), layout)
    dense = Codec().encode(weights(layout), Mask.full(layout))
    with pytest.raises(WireError, match="bytes of positions: found 1"):
        Codec().decode(dense + b"\x00", layout)
    fewer = dense[:16] + (999).to_bytes(8, "little") + dense[24:-4]
    with pytest.raises(WireError, match="held entries: found 999, expected 1000, since it is dense"):
        Codec().decode(fewer, layout)


def test_a_lie_allocates_nothing() -> None:
    lies = [sparse_payload(held=2**60), sparse_payload(extras=2**60), sparse_payload(entries=2**60)]
    tracemalloc.start()
    for payload, layout in lies:
        with pytest.raises(WireError):
            Codec().decode(payload, layout)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1_000_000


FUZZ_LAYOUT = layout_of(60, 140)
FUZZ_KNOWN = random_mask(FUZZ_LAYOUT, 0.4, seed=7)
PAYLOADS = [
    Codec(kind).encode(weights(FUZZ_LAYOUT), mask, known=FUZZ_KNOWN.digest, extras=extras)
    for kind in KINDS
    for mask in (
        Mask.full(FUZZ_LAYOUT),
        FUZZ_KNOWN,
        random_mask(FUZZ_LAYOUT, 0.5),
        random_mask(FUZZ_LAYOUT, 0.03),
        mask_of(np.arange(200) // 50 % 2 == 0, FUZZ_LAYOUT),
    )
    for extras in ({}, EXTRAS)
]


def test_the_fuzzed_payloads_are_of_every_kind() -> None:
    assert {position_kind(payload) for payload in PAYLOADS} == {DENSE, KNOWN, BITMAP, GAPS_U8, RUNS_U8}


@given(st.data())
@settings(deadline=None, max_examples=400)
def test_a_mutated_payload_decodes_or_raises_wire_error(data: st.DataObject) -> None:
    payload = bytearray(data.draw(st.sampled_from(PAYLOADS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(payload)) | st.integers(0, min(HEADER_BYTES, len(payload))))
        how = data.draw(st.sampled_from(("overwrite", "cut", "insert", "remove")))
        some = data.draw(st.binary(min_size=1, max_size=9))
        if how == "overwrite":
            payload[at : at + len(some)] = some[: len(payload) - at]
        elif how == "cut":
            del payload[at:]
        elif how == "insert":
            payload[at:at] = some
        else:
            del payload[at : at + len(some)]
    try:
        decoded = Codec().decode(bytes(payload), FUZZ_LAYOUT, known={FUZZ_KNOWN.digest: FUZZ_KNOWN})
    except WireError:
        return
    assert isinstance(decoded, Decoded)
    assert decoded.params.layout == decoded.mask.layout == FUZZ_LAYOUT
    assert not decoded.params.flat[~decoded.mask.flat].any()


@given(st.binary(max_size=300))
@properties
def test_junk_is_refused(junk: bytes) -> None:
    with pytest.raises(WireError):
        Codec().decode(junk, FUZZ_LAYOUT)
