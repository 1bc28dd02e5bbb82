"""Architectures against published counts, and the promise that a bound module lives in its flat vector."""

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fedray.errors import ConfigError
from fedray.models import MODELS, Architecture, InputShape, ModelSpec, build_model, layout_of, outline

DIGITS, MNIST, CIFAR10 = (1, 8, 8), (1, 28, 28), (3, 32, 32)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads wait for each other on a busy machine: twenty times slower
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def same_images_every_time() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def build_toy(network: Callable[[], nn.Module], input_shape: InputShape, num_classes: int) -> nn.Module:
    return network()


def accept_all(input_shape: InputShape) -> str | None:
    return None


def toy(network: Callable[[], nn.Module]) -> ModelSpec:
    architecture = Architecture(partial(build_toy, network), accept_all, "this test", "a toy")
    return build_model("toy", (1, 4, 4), 2, {"toy": architecture})


def small_cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))


def trainable_count(spec: ModelSpec) -> int:
    return int(spec.layout.trainable_flat.count_nonzero())


@pytest.mark.parametrize(
    ("name", "input_shape", "count"),
    [
        ("mlp", MNIST, 784 * 200 + 200 + 200 * 10 + 10),
        ("mlp_wide", MNIST, 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10),
        ("lenet5", MNIST, 61_706),
        ("lenet5", CIFAR10, 62_006),
        ("cnn", MNIST, 1_663_370),  # McMahan et al. 2017
        ("vgg11", CIFAR10, 9_750_922),
        ("vgg19_bn", CIFAR10, 20_565_834),
        ("resnet18", CIFAR10, 11_173_962),
        (
            "strided_cnn",
            CIFAR10,
            75 * 32 + 288 * 32 + 288 * 64 + 576 * 64 + 640 + 10 + 2 * (32 + 32 + 64 + 64),
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, input_shape: InputShape, count: int):
    assert trainable_count(build_model(name, input_shape, 10)) == count


def test_vgg11_has_the_weights_that_prunefl_counts():
    layout = build_model("vgg11", CIFAR10, 10, prune_last=True).layout
    assert layout.prunable_count == 9_747_136


def test_vgg_convolutions_are_torchvisions():
    from torchvision.models import VGG11_Weights, VGG19_BN_Weights

    head = 25_088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    ours = 2 * (512 * 512 + 512) + 512 * 1000 + 1000
    for name, weights in (("vgg11", VGG11_Weights), ("vgg19_bn", VGG19_BN_Weights)):
        published = weights.IMAGENET1K_V1.meta["num_params"]
        assert trainable_count(build_model(name, CIFAR10, 1000)) - ours == published - head


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("input_shape", [DIGITS, MNIST, CIFAR10])
def test_every_model_trains_on_every_data_set_or_says_why_not(name: str, input_shape: InputShape):
    if name.startswith("vgg") and input_shape == DIGITS:
        reason = rf"model: {name} halves .* 32×32, .* got 8×8\. .*: mlp, mlp_wide, lenet5, cnn, resnet18"
        with pytest.raises(ConfigError, match=reason):
            build_model(name, input_shape, 10)
        return
    if name == "heterofl_cnn" and input_shape == DIGITS:
        with pytest.raises(ConfigError, match=r"needs at least 16×16; got 8×8\. Models that take 1×8×8: mlp"):
            build_model(name, input_shape, 10)
        return
    if name == "char_transformer":
        with pytest.raises(ConfigError, match=r"takes sequences of tokens, not images of .*: mlp, mlp_wide"):
            build_model(name, input_shape, 10)
        return
    spec = build_model(name, input_shape, 7)
    flat = spec.init(0).flat
    module = spec.bind(flat)
    for n in (3, 1):  # a client's last batch may hold one example
        logits = module(torch.randn(n, *input_shape))
        assert logits.shape == (n, 7)
        nn.functional.cross_entropy(logits, torch.arange(n)).backward()
    # the whole network, without the layers that only an early exit would run
    run = [p for n, p in module.named_parameters() if not n.startswith("exit")]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in run)
    assert flat.isfinite().all()


@pytest.mark.parametrize(("height", "width"), [(28, 33), (31, 29), (64, 32)])
def test_vgg_takes_any_image_from_28_pixels_on(height: int, width: int):
    spec = build_model("vgg11", (1, height, width), 3)
    assert spec.layout.shape_of["classifier.0.weight"] == (512, 512)
    module = spec.bind(torch.zeros(spec.layout.size))
    assert module(torch.zeros(1, 1, height, width)).shape == (1, 3)


def test_a_wider_border_is_padding():
    spec = build_model("vgg11", MNIST, 10)
    first = spec.bind(spec.init(0).flat).get_submodule("features.0")
    assert isinstance(first, nn.Conv2d)
    image = torch.randn(2, 1, 28, 28)
    padded = nn.functional.conv2d(nn.functional.pad(image, (2, 2, 2, 2)), first.weight, first.bias, padding=1)
    torch.testing.assert_close(first(image), padded)


@pytest.mark.parametrize("name", ["lenet5", "cnn"])
def test_pooling_before_relu_is_the_same_function(name: str):
    spec = build_model(name, MNIST, 10)
    usual = spec.bind(spec.init(0).flat)
    assert isinstance(usual, nn.Sequential)
    layers = dict(usual.named_children())
    order = list(layers)
    for i in ("1", "2"):
        order.remove(f"relu{i}")
        order.insert(order.index(f"pool{i}"), f"relu{i}")
    images = torch.randn(2, *MNIST)
    assert torch.equal(nn.Sequential(*(layers[n] for n in order))(images), usual(images))


@pytest.mark.parametrize("name", ["lenet5", "cnn", "resnet18"])
def test_too_small_an_image_is_refused(name: str):
    with pytest.raises(ConfigError, match=rf"model: {name} halves .* at least (4×4|8×8); got 3×5"):
        build_model(name, (1, 3, 5), 10)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(ConfigError, match=r"model: unknown model 'lenet'; did you mean 'lenet5'\?.*resnet18"):
        build_model("lenet", MNIST, 10)


def test_what_is_prunable():
    layout = build_model("resnet18", CIFAR10, 10).layout
    prunable = set(layout.prunable_names)
    assert "conv1.weight" in prunable
    assert "fc.weight" not in prunable
    assert all(len(layout.shape_of[n]) == 4 for n in prunable)  # never a bias, a norm or a statistic
    assert len(prunable) == 20  # 17 convolutions and 3 projections

    flagged = build_model("cnn", MNIST, 10, prune_first=False, prune_last=True).layout
    assert flagged.prunable_names == ("conv2.weight", "fc1.weight", "fc2.weight")


class Sentences(nn.Module):
    """Embedding, positions, attention, normalisation over two dimensions, recurrence, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.start, self.place = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.norm, self.scale = nn.LayerNorm([5, 8]), RootNorm(5, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.steps = nn.GRU(8, 4, batch_first=True)
        self.head = nn.Linear(4, 3)


class RootNorm(nn.Module):
    """A normalisation of a user's own, with a scale for each entry."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


class NormedLinear(nn.Linear):
    """A linear layer, in spite of its name."""


WEIGHTS: list[tuple[Callable[[], nn.Module], list[str], str, str]] = [
    (
        Sentences,
        [
            *("place", "embedding.weight", "attention.in_proj_weight", "attention.out_proj.weight"),
            *("steps.weight_ih_l0", "steps.weight_hh_l0"),
        ],
        "embedding.weight",
        "head.weight",
    ),
    (
        lambda: nn.Sequential(nn.Conv1d(1, 4, 3), nn.ConvTranspose1d(4, 4, 3), nn.Conv1d(4, 3, 1)),
        ["0.weight", "1.weight"],
        "0.weight",
        "2.weight",
    ),
    (
        lambda: nn.Sequential(NormedLinear(4, 4), nn.PReLU(4), nn.Linear(4, 1), nn.Linear(1, 3)),
        ["0.weight", "2.weight"],
        "0.weight",
        "3.weight",
    ),
    (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.Linear(4, 3)
        ),
        ["0.parametrizations.weight.original1"],
        "0.parametrizations.weight.original1",
        "2.weight",
    ),
]


@pytest.mark.parametrize(("network", "prunable", "first", "last"), WEIGHTS)
def test_every_matrix_is_prunable_but_norms_and_the_classifier(
    network: Callable[[], nn.Module], prunable: list[str], first: str, last: str
):
    assert sorted(layout_of(network()).prunable_names) == sorted(prunable)
    without = set(layout_of(network(), prune_first=False).prunable_names)
    assert without == set(prunable) - {first}
    assert set(layout_of(network(), prune_last=True).prunable_names) == {*prunable, last}


def test_layout_is_parameters_then_running_statistics_in_the_order_of_state_dict_names():
    spec = toy(small_cnn)
    layout = spec.layout
    assert layout.names == (
        *("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"),
        *("1.running_mean", "1.running_var"),
    )
    assert layout.trainable == (True,) * 6 + (False,) * 2
    assert layout.prunable_names == ("0.weight",)
    assert layout.shape_of["0.weight"] == (2, 1, 3, 3)


def test_a_bound_module_is_views_into_the_vector():
    spec = toy(small_cnn)
    params = spec.init(0)
    flat = params.flat
    module = spec.bind(flat)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if not name.endswith("num_batches_tracked"):
            assert tensor.data_ptr() == params[name].data_ptr()

    images = torch.randn(4, 1, 4, 4)
    before = params.clone()
    nn.functional.cross_entropy(module(images), torch.tensor([0, 1, 0, 1])).backward()
    # BatchNorm's update is in the vector, by its own formula …
    features = nn.functional.conv2d(images, before["0.weight"], before["0.bias"])
    torch.testing.assert_close(params["1.running_mean"], 0.1 * features.mean((0, 2, 3)))
    torch.testing.assert_close(params["1.running_var"], 0.9 + 0.1 * features.var((0, 2, 3)))
    # … and so is an optimiser's step
    torch.optim.SGD(module.parameters(), lr=0.5).step()
    gradient = module.get_parameter("3.weight").grad
    assert gradient is not None
    torch.testing.assert_close(params["3.weight"], before["3.weight"] - 0.5 * gradient)

    flat.zero_()
    assert not module.eval()(images).any()
    assert module.get_buffer("1.num_batches_tracked") == 1


def test_two_bound_modules_share_nothing():
    spec = build_model("mlp", DIGITS, 10)
    one, other = spec.init(0), spec.init(0)
    first, second = spec.bind(one.flat), spec.bind(other.flat)
    one.flat.zero_()
    assert not any(p.any() for p in first.parameters())
    assert all(p.any() for p in second.parameters())


class Averaging(nn.Module):
    """Updates its statistics in Python, during the forward pass, and uses one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4, bias=False)
        self.two = nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight
        self.out = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)
        self.register_buffer("order", torch.tensor([3, 1, 2, 0]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x.flatten(2).mean(2).expand(-1, 4)))
        self.get_buffer("seen").mul_(0.5).add_(x.detach().mean(0))
        logits: Tensor = self.out(x * self.get_buffer("scale")[self.get_buffer("order")])
        return logits


def test_tied_weights_stay_tied_and_constants_stay_with_the_module():
    spec = toy(Averaging)
    assert spec.layout.names == ("one.weight", "out.weight", "out.bias", "seen")
    params = spec.init(0)
    module = pickle.loads(pickle.dumps(spec)).bind(params.flat)
    assert module.one.weight is module.two.weight
    module(torch.ones(3, 1, 4, 4)).sum().backward()
    assert params["seen"].any()
    torch.testing.assert_close(module.scale, torch.full((4,), 2.0))


def test_writing_between_forward_and_backward_is_noticed():
    spec = build_model("mlp", DIGITS, 10)
    flat = spec.init(0).flat
    loss = spec.bind(flat)(torch.ones(2, *DIGITS)).sum()
    flat.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bind_refuses_a_vector_that_does_not_fit():
    spec = build_model("mlp", DIGITS, 10)
    for flat in (torch.zeros(spec.layout.size - 1), torch.zeros(spec.layout.size, dtype=torch.float64)):
        with pytest.raises(ValueError, match="the layout needs"):
            spec.bind(flat)


def test_a_model_that_is_not_float32_is_refused():
    with pytest.raises(ConfigError, match=r"model: 1\.weight is torch\.float64"):
        toy(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2, dtype=torch.float64)))


@pytest.mark.parametrize("name", ["mlp", "resnet18"])
def test_init_is_reproducible_and_leaves_the_global_generator(name: str):
    before = torch.get_rng_state()
    spec = build_model(name, MNIST, 10)
    one, same, other = spec.init(3), spec.init(3), spec.init(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert one == same
    assert one.sha256 != other.sha256
    torch.manual_seed(99)
    assert spec.init(3) == one


def test_init_is_the_architectures_own():
    cnn = build_model("cnn", MNIST, 10).init(0)
    assert cnn["fc1.weight"].abs().max() <= 3136**-0.5  # PyTorch's default: uniform within 1/√fan_in
    resnet = build_model("resnet18", CIFAR10, 10).init(0)
    for name in ("conv1.weight", "layer4.1.conv2.weight"):  # He normal over the fan-out
        out, _, height, width = resnet[name].shape
        assert resnet[name].std().item() == pytest.approx((2 / (out * height * width)) ** 0.5, rel=0.05)
    assert resnet["layer1.0.bn1.running_var"].eq(1).all()
    vgg = build_model("vgg11", CIFAR10, 10).init(0)
    assert vgg["classifier.0.weight"].std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert not vgg["features.0.bias"].any()


def test_a_specification_pickles_small_and_binds_elsewhere():
    spec = build_model("resnet18", CIFAR10, 10)
    payload = pickle.dumps(spec)
    assert len(payload) < 100_000  # no weights: those are 44 MB
    arrived = pickle.loads(payload)
    assert arrived == spec
    assert arrived.init(1) == spec.init(1)
    flat = spec.init(1).flat
    images = torch.randn(2, *CIFAR10)
    here, there = spec.bind(flat.clone()).eval(), arrived.bind(flat.clone()).eval()
    assert torch.equal(here(images), there(images))


def test_the_specifications_module_has_no_values_and_is_not_changed_by_binding():
    spec = build_model("cnn", MNIST, 10)
    spec.bind(spec.init(0).flat)
    assert all(p.is_meta for p in spec.module.parameters())
    assert layout_of(copy.deepcopy(spec.module)) == spec.layout


# ── outlines
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["average", "group"])
def test_an_outline_is_the_structure_of_the_model(name, norm):
    shape = next(shape for shape in (MNIST, CIFAR10, (80,)) if MODELS[name].accepts(shape) is None)
    whole = build_model(name, shape, 10, norm=norm, prune_first=False, prune_last=True)
    sketched = outline(name, shape, 10, norm=norm, prune_first=False, prune_last=True)
    assert sketched.layout == whole.layout
    assert sketched.norms == whole.norms
    assert sketched.channel_groups == whole.channel_groups
    assert sketched.head == whole.head
    assert {p.device.type for p in sketched.module.parameters()} == {"meta"}


def test_an_outline_is_built_once_and_initialises_nothing(monkeypatch):
    built: list[str] = []

    class Counted(nn.Sequential):
        def __init__(self) -> None:
            layer = nn.Linear(16, 2)
            built.append(layer.weight.device.type)
            super().__init__(nn.Flatten(), layer)

    def counted(input_shape: InputShape, num_classes: int) -> nn.Module:
        return Counted()

    monkeypatch.setitem(MODELS, "counted", Architecture(counted, accept_all, "", ""))
    first, again = (outline("counted", (1, 4, 4), 2) for _ in range(2))
    assert built == ["meta"] and first is again
    outline("counted", (1, 4, 4), 2, prune_first=False)
    assert len(built) == 2
    monkeypatch.setitem(MODELS, "counted", Architecture(counted, accept_all, "another", ""))
    outline("counted", (1, 4, 4), 2)  # a name that was given to another architecture
    assert len(built) == 3


def test_an_architecture_that_looks_at_values_has_an_outline_too(monkeypatch):
    def curious(input_shape: InputShape, num_classes: int) -> nn.Module:
        rates = [float(x) for x in torch.linspace(0, 0.5, 3)]
        return nn.Sequential(nn.Flatten(), nn.Dropout(rates[1]), nn.Linear(16, 2))

    monkeypatch.setitem(MODELS, "curious", Architecture(curious, accept_all, "", ""))
    assert outline("curious", (1, 4, 4), 2).layout.size == 34


def test_what_is_wrong_with_an_architecture_is_raised_as_it_is(monkeypatch):
    def broken(input_shape: InputShape, num_classes: int) -> nn.Module:
        raise KeyError("layers")

    monkeypatch.setitem(MODELS, "broken", Architecture(broken, accept_all, "", ""))
    with pytest.raises(ConfigError, match=r"broken cannot be built for images of 1×4×4 .*KeyError: 'layers'"):
        outline("broken", (1, 4, 4), 2)
