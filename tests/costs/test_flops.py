"""FLOPs worked out by hand, against torch's own counter, and as properties."""

import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedray.costs.flops import CACHED_MASKS, FlopModel
from fedray.types import Exploits, Layout, Mask

EXPLOITS: tuple[Exploits, ...] = ("nothing", "structured", "unstructured")


def layout_of(module: nn.Module) -> Layout:
    named = [(n, tuple(p.shape)) for n, p in module.named_parameters()]
    prunable = tuple(len(shape) > 1 for _, shape in named)
    return Layout(tuple(n for n, _ in named), tuple(s for _, s in named), prunable, (True,) * len(named))


def traced(module: nn.Module, input_shape: tuple[int, int, int]) -> FlopModel:
    return FlopModel.trace(module, input_shape, layout_of(module))


def tiny() -> FlopModel:
    """2×5×5 → conv 3×3 to 3 channels (3×3 positions) → ReLU → linear 27-2."""
    return traced(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)), (2, 5, 5))


TINY = tiny()


def mask_of(**held: Tensor) -> Mask:
    """Return a mask of TINY that is full but for `conv` (3, 2, 3, 3) and `linear` (2, 27)."""
    mask = Mask.full(TINY.layout)
    for layer, part in held.items():
        mask[{"conv": "0.weight", "linear": "3.weight"}[layer]].copy_(part)
    return mask


def test_dense_by_hand():
    assert TINY.positions == {"0.weight": 9, "3.weight": 1}
    dense = 2 * (9 * 3 * 2 * 9 + 2 * 27)
    assert TINY.dense() == dense == 1080
    full = Mask.full(TINY.layout)
    assert TINY.forward(full) == TINY.structured(full) == dense
    assert TINY.train(full) == 3 * dense
    assert all(TINY.executed(full, exploits) == 3 * dense for exploits in EXPLOITS)


def test_a_mask_by_hand():
    conv = torch.zeros(3, 2, 3, 3, dtype=torch.bool)
    conv[0, 1, 1, 1] = conv[2, 1, 0, :2] = (
        True  # rows 0 and 2, input channel 1: 3 weights of a 2 × 1 × 9 block
    )
    linear = torch.zeros(2, 27, dtype=torch.bool)
    linear[1, 3:13] = True  # 1 row, 10 columns
    mask = mask_of(conv=conv, linear=linear)
    theoretical, structured = 2 * (9 * 3 + 10), 2 * (9 * 2 * 1 * 9 + 1 * 10)
    assert TINY.forward(mask) == theoretical == 74
    assert TINY.structured(mask) == structured == 344

    assert TINY.train(mask) == 3 * 74
    assert TINY.train(mask, dense_gradient=True) == 74 + 2 * 1080
    assert TINY.executed(mask, "nothing") == 3 * 1080
    assert TINY.executed(mask, "structured") == 3 * 344
    assert TINY.executed(mask, "unstructured") == 3 * 74
    assert TINY.executed(mask, "structured", dense_gradient=True) == 344 + 2 * 1080
    assert TINY.executed_forward(mask, "nothing") == 1080
    assert TINY.executed_forward(mask, "structured") == 344
    assert TINY.executed_forward(mask, "unstructured") == 74


def test_scattered_zeros_save_a_structured_device_nothing():
    checkered = (torch.arange(54) % 2 == 0).view(3, 2, 3, 3)
    mask = mask_of(conv=checkered)
    assert TINY.structured(mask) == TINY.dense()
    assert TINY.forward(mask) == 2 * (9 * 27 + 54)


def test_an_empty_layer_costs_nothing_and_biases_never_count():
    mask = Mask(torch.zeros(TINY.layout.size, dtype=torch.bool), TINY.layout)
    assert TINY.forward(mask) == TINY.structured(mask) == 0
    biases = Mask.full(TINY.layout)
    biases["0.bias"].zero_()
    assert TINY.forward(biases) == TINY.structured(biases) == TINY.dense()


def test_stride_padding_groups_and_a_layer_used_twice():
    strided = traced(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 5))
    assert strided.positions == {"weight": 4 * 3}
    assert strided.dense() == 2 * 12 * (6 * 2 * 9)

    shared = nn.Conv2d(1, 1, 3, padding=1)
    assert traced(nn.Sequential(shared, nn.MaxPool2d(2), shared), (1, 4, 4)).positions == {"0.weight": 16 + 4}

    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert traced(tied, (1, 3, 4)).positions == {"0.weight": 3 + 3}  # a linear layer over 3 positions, twice


class Exits(nn.Module):
    """4 → linear 3 → linear 2, and a head of 5 behind the first layer."""

    exits = (("one", "early"), ("one", "last"))

    def __init__(self) -> None:
        super().__init__()
        self.one, self.early, self.last = nn.Linear(4, 3), nn.Linear(3, 5), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.one(x))
        return out


def test_an_exits_head_costs_where_nothing_of_the_classifier_is_held():
    flops = traced(Exits(), (1, 1, 4))
    assert flops.positions == {"one.weight": 1, "last.weight": 1}
    assert flops.exits == {"early.weight": 1}
    mask = Mask.full(flops.layout)
    whole, early = 2 * (12 + 6), 2 * (12 + 15)
    assert flops.dense() == flops.forward(mask) == whole
    mask["one.weight"][0, 0] = False
    mask = Mask(mask.flat, flops.layout)
    assert flops.forward(mask) == whole - 2  # the head is held, and not run
    left = Mask(mask.flat.clone(), flops.layout)
    left["last.weight"].zero_()
    assert flops.forward(left) == early - 2
    assert flops.structured(left) == flops.executed_forward(left, "nothing") == early
    assert flops.train(left, dense_gradient=True) == early - 2 + 2 * early
    left = Mask(left.flat.clone(), flops.layout)
    left["early.weight"].zero_()
    assert flops.executed_forward(left, "nothing") == 2 * 12  # no device runs a layer that is not there


def test_tracing_leaves_the_module_alone():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    module.train()
    traced(module, (1, 5, 5))
    assert module.training
    assert not module.get_buffer("1.running_mean").any()
    assert not module[0]._forward_hooks


def test_tracing_does_not_load_sympy():
    code = (
        "import sys\n"
        "from fedray.costs.flops import FlopModel\n"
        "from fedray.models import build_model\n"
        "spec = build_model('cnn', (1, 28, 28), 10)\n"
        "assert all(p.is_meta for p in spec.module.parameters())\n"
        "FlopModel.trace(spec.module, spec.input_shape, spec.layout)\n"
        "sys.exit('sympy' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_foreign_layout_is_refused():
    with pytest.raises(ValueError, match=r"0\.weight is in the module, not in the layout"):
        FlopModel.trace(nn.Sequential(nn.Linear(4, 2)), (1, 1, 4), layout_of(nn.Linear(4, 2)))


def test_dense_agrees_with_torchs_own_counter():
    from torch.utils.flop_counter import FlopCounterMode

    from fedray.models import build_model

    for name in ("mlp", "lenet5", "cnn", "resnet18"):
        spec = build_model(name, (3, 32, 32), 10)
        flops = FlopModel.trace(spec.module, spec.input_shape, spec.layout)
        module = spec.bind(torch.zeros(spec.layout.size)).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.zeros(1, 3, 32, 32))
        assert flops.dense() == counter.get_total_flops(), name


masks = st.lists(st.booleans(), min_size=TINY.layout.size, max_size=TINY.layout.size)
blocks = st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2), st.integers(0, 27))


@settings(deadline=None, max_examples=50)
@given(held=masks, rows=blocks)
def test_unstructured_is_at_most_structured_is_at_most_dense(
    held: list[bool], rows: tuple[int, int, int, int]
):
    mask = Mask(torch.tensor(held), TINY.layout)
    mask["0.weight"][rows[0] :] = False
    mask["0.weight"][:, rows[1] :] = False
    mask["3.weight"][rows[2] :] = False
    mask["3.weight"][:, rows[3] :] = False
    assert 0 <= TINY.forward(mask) <= TINY.structured(mask) <= TINY.dense()
    assert TINY.train(mask) <= TINY.train(mask, dense_gradient=True) <= 3 * TINY.dense()
    dense, structured, unstructured = (TINY.executed(mask, exploits) for exploits in EXPLOITS)
    assert unstructured == TINY.train(mask) <= structured <= dense == 3 * TINY.dense()


@settings(deadline=None, max_examples=50)
@given(held=masks, dropped=masks, dense_gradient=st.booleans())
def test_a_smaller_mask_never_costs_more(held: list[bool], dropped: list[bool], dense_gradient: bool):
    large = Mask(torch.tensor(held), TINY.layout)
    small = Mask(large.flat & ~torch.tensor(dropped), TINY.layout)
    assert TINY.forward(small) <= TINY.forward(large)
    assert TINY.structured(small) <= TINY.structured(large)
    for exploits in EXPLOITS:
        cheap = TINY.executed(small, exploits, dense_gradient=dense_gradient)
        assert cheap <= TINY.executed(large, exploits, dense_gradient=dense_gradient)


@settings(deadline=None, max_examples=50)
@given(rows=st.sets(st.integers(0, 2)), channels=st.sets(st.integers(0, 1)))
def test_a_mask_of_whole_rows_and_channels_is_exploited_in_full(rows: set[int], channels: set[int]):
    conv = torch.zeros(3, 2, 3, 3, dtype=torch.bool)
    for row in rows:
        conv[row, list(channels)] = True
    mask = mask_of(conv=conv)
    assert TINY.structured(mask) == TINY.forward(mask) == 2 * (9 * 9 * len(rows) * len(channels) + 54)


def test_counts_are_remembered_by_mask_within_a_bound():
    flops = tiny()
    for i in range(CACHED_MASKS + 10):
        bits = torch.tensor([int(b) for b in f"{i:013b}"], dtype=torch.bool)
        mask = Mask.full(flops.layout)
        mask["3.weight"][0, :13] = bits
        assert flops.forward(mask) == 2 * (9 * 54 + 54 - 13 + int(bits.sum()))
    assert len(flops._counted) == CACHED_MASKS
    assert flops.forward(Mask(mask.flat.clone(), flops.layout)) == flops.forward(mask)


def test_pickles():
    arrived = pickle.loads(pickle.dumps(TINY))
    assert arrived == TINY
    mask = mask_of(linear=torch.zeros(2, 27, dtype=torch.bool))
    assert arrived.train(mask) == TINY.train(mask)
