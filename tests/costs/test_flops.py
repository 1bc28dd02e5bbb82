"""FLOPs worked out by hand, against torch's own counter, and as properties."""

import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedray.costs.flops import CACHED_MASKS, FlopModel
from fedray.errors import ConfigError
from fedray.models import build_model
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


# ── layers of every kind ──────────────────────────────────────────────────────────────────────────────────


class Recurrent(nn.Module):
    """Sequences of 5 tokens: embedding 8 → LSTM 4 → linear 3."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = (
            nn.Embedding(10, 8),
            nn.LSTM(8, 4, batch_first=True),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        steps = self.embed(x.flatten(1).long())
        out: Tensor = self.head(self.lstm(steps)[0][:, -1])
        return out


class Attention(nn.Module):
    """5 positions of 8 numbers: multi-head attention, then linear 3 on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))
        return out


class Signal(nn.Module):
    """1 × 16 → conv 3 to 4 channels → linear 56-2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 4, 3), nn.Linear(56, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.conv(x.flatten(2)).flatten(1))
        return out


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised in each forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / weight.std(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class Solved(nn.Module):
    """Logits solve a linear system: an operation whose FLOPs torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.system = nn.Parameter(torch.eye(30))

    def forward(self, x: Tensor) -> Tensor:
        solved: Tensor = torch.linalg.solve(self.system, x.flatten(1).t())
        return solved.t()


def test_a_recurrent_layer_counts_once_for_each_step():
    model = traced(Recurrent(), (1, 1, 5))
    assert dict(model.positions) == {"lstm.weight_ih_l0": 5, "lstm.weight_hh_l0": 5, "head.weight": 1}
    assert model.dense() == 2 * (5 * (16 * 8 + 16 * 4) + 12)
    nothing = Mask(torch.zeros(model.layout.size, dtype=torch.bool), model.layout)
    assert model.forward(nothing) == 0  # the embedding is looked up


def test_attention_counts_projections_by_weight_and_products_of_activations_apart():
    model = traced(Attention(), (1, 5, 8))
    projections = {"attention.in_proj_weight": 5, "attention.out_proj.weight": 5, "head.weight": 1}
    assert dict(model.positions) == projections
    assert model.fixed == 2 * 2 * (5 * 5 * 4) * 2  # scores and values, two heads of four numbers
    assert model.dense() == 2 * (5 * 24 * 8 + 5 * 8 * 8 + 8 * 3) + model.fixed
    nothing = Mask(torch.zeros(model.layout.size, dtype=torch.bool), model.layout)
    assert model.forward(nothing) == model.structured(nothing) == model.fixed


class Rows(nn.Module):
    """The 28 rows of an image as a sequence: attention of width 32, or an LSTM of 64."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.rows, self.attention = nn.Linear(28, 32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.lstm = nn.LSTM(28, 64, batch_first=True)
        self.how, self.head = how, nn.Linear(32 if how == "attention" else 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        if self.how == "attention":
            x = self.rows(x)
            x = self.attention(x, x, x)[0]
        else:
            x = self.lstm(x)[0]
        out: Tensor = self.head(x.mean(dim=1))
        return out


def test_the_models_of_the_issue():
    assert traced(Rows("attention"), (1, 28, 28)).dense() == 380_544  # of which 50,816 were counted
    assert traced(Rows("lstm"), (1, 28, 28)).dense() == 1280 + 2 * 28 * 4 * 64 * (28 + 64)  # 1,280


def test_a_transformer_agrees_with_torch_s_counter():
    from torch.utils.flop_counter import FlopCounterMode

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.encoder(x.flatten(1, 2))
            return out

    module = Encoder()
    counter = FlopCounterMode(display=False)
    with counter:  # with gradients on, torch takes no fused kernel
        module(torch.zeros(1, 1, 5, 8))
    assert traced(module, (1, 5, 8)).dense() == counter.get_total_flops() > 0


def test_a_signal_and_a_standardised_weight_count_as_convolutions():
    assert dict(traced(Signal(), (1, 1, 16)).positions) == {"conv.weight": 14, "head.weight": 1}
    assert dict(traced(Standardised(1, 2, 3), (1, 5, 5)).positions) == {"weight": 9}
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3))
    (positions,) = traced(normed, (1, 5, 5)).positions.values()
    assert positions == 9


class Query(nn.Module):
    """A learnt query attends to 5 positions of 8 numbers; its projection is made for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.to_query = nn.Parameter(torch.randn(1, 7, 8)), nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        query = self.to_query(self.query.expand(len(x), -1, -1))
        out: Tensor = self.head((query @ x.transpose(1, 2) @ x).mean(dim=1))
        return out


class LowRank(nn.Module):
    """A linear layer whose weight is a product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 30))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1), self.left @ self.right)


class Own(nn.Module):
    """A layer by hand: `how` computes with x (n, 30) and a weight (3, 30)."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.randn(3, 30)), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x.flatten(1), self.weight)


BY_HAND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matrix": lambda x, w: x @ w.t(),
    "einsum": lambda x, w: torch.einsum("ni,oi->no", x, w),
    "row by row": lambda x, w: torch.stack([w @ row for row in x]),
    "broadcast": lambda x, w: (x.unsqueeze(1) * w).sum(2),
    "distances": torch.cdist,
    "a copy of the weight": lambda x, w: x @ torch.empty(3, 30).copy_(w).t(),
    "noise on the weight": lambda x, w: x @ (w + torch.randn(3, 30) * torch.tensor(0.1)).t(),
    "in its own buffer": lambda x, w: x.clone().copy_(x) @ w.t(),
    "normalised": lambda x, w: x @ nn.functional.normalize(w).t(),
    "split": lambda x, w: x[:, :10] @ w[:, :10].t() + x[:, 10:] @ w[:, 10:].t(),
    "stacked": lambda x, w: nn.functional.linear(x, torch.cat([w[:1], w[1:]])),
}


@pytest.mark.parametrize("how", BY_HAND)
def test_a_layer_by_hand_counts_as_a_linear_one(how: str):
    assert traced(Own(BY_HAND[how]), (1, 5, 6)).positions == {"weight": 1}


def test_scales_shifts_and_copies_are_free():
    for how in (
        lambda x, w: x.clone().scatter_(1, torch.zeros(len(x), 3).long(), w[:, :1].t().expand(len(x), 3)),
        lambda x, w: x[:, :3] * torch.dist(x[:1], w[:1]),
        lambda x, w: x[:, :3] * w.mean(1),
        lambda x, w: (x + w[:1])[:, :3],
        lambda x, w: x * w[:1],
    ):
        flops = traced(Own(how), (1, 5, 6))
        assert (flops.positions, flops.fixed) == ({}, 0)


def test_a_projection_of_a_learnt_query_counts_for_each_example():
    model = traced(Query(), (1, 5, 8))
    assert dict(model.positions) == {"to_query.weight": 7, "head.weight": 1}
    assert model.fixed == 2 * 2 * (7 * 5 * 8)


def test_a_product_of_weights_is_made_once_for_a_batch_and_left_out():
    model = traced(LowRank(), (1, 5, 6))
    assert (dict(model.positions), model.fixed) == ({}, 2 * 30 * 3)


def test_a_bilinear_layer():
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pairs = nn.Bilinear(5, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.pairs(x[:, 0, :, 0], x[:, 0, 0])
            return out

    assert traced(Pairs(), (1, 5, 6)).positions == {"pairs.weight": 1}


def test_views_of_one_vector_are_told_apart():
    spec = build_model("lenet5", (1, 28, 28), 10)
    bound = FlopModel.trace(spec.bind(spec.init(0).flat), spec.input_shape, spec.layout)
    assert bound == FlopModel.trace(spec.module, spec.input_shape, spec.layout)
    assert len(bound.positions) == 5


def test_what_cannot_be_counted_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"FLOPs of .*solve.* with system cannot be counted"):
        traced(Solved(), (1, 5, 6))


def test_tracing_leaves_torch_s_switches_as_they_were():
    def switches() -> tuple[bool, ...]:
        backends = torch.backends
        return (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.mha.get_fastpath_enabled(),
            backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled(),
        )

    before = switches()
    traced(Attention(), (1, 5, 8))
    with pytest.raises(ConfigError):
        traced(Solved(), (1, 5, 6))
    assert switches() == before
