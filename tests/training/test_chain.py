"""The chain: which networks are one, and its steps beside those of autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedray.models.cnn import CNN
from fedray.models.lenet import LENET5
from fedray.models.sparse_layers import kernels_of, standardised
from fedray.training.chain import MOST_PATCHES, Chain

CPU = torch.device("cpu")
IMAGE = (2, 9, 7)


def _flat(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), *layers)


def _maps(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: _flat(nn.Linear(126, 3)),
    "two linear": lambda: _flat(nn.Linear(126, 5), nn.Linear(5, 3)),
    "three with relu": lambda: _flat(
        nn.Linear(126, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)
    ),
    "convolution": lambda: _maps(nn.Conv2d(2, 4, 3), features=4 * 7 * 5),
    "padded": lambda: _maps(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), features=4 * 9 * 7),
    "oblong": lambda: _maps(nn.Conv2d(2, 9, (3, 2), padding=(0, 1)), nn.ReLU(), features=9 * 7 * 8),
    "two": lambda: _maps(
        nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 3, 2), nn.ReLU(), features=3 * 8 * 6
    ),
    "pooled": lambda: _maps(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(4, 9, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, ceil_mode=True),
        features=9 * 2 * 2,
    ),
    "overlapping pools": lambda: _maps(
        nn.Conv2d(2, 4, 3), nn.MaxPool2d((3, 2), stride=1, padding=1), features=4 * 7 * 6
    ),
    "one channel, one number left": lambda: _maps(nn.Conv2d(2, 1, (9, 7)), nn.ReLU(), features=1),
}


def _one_relu_twice() -> nn.Module:
    relu = nn.ReLU()
    return _flat(nn.Linear(126, 8), relu, nn.Linear(8, 5), relu, nn.Linear(5, 3))


NETWORKS["one relu called twice"] = _one_relu_twice


def _pair(build: Callable[[], nn.Module]) -> tuple[Chain, nn.Module, nn.Module]:
    """Return a chain, the module whose weights it writes, and an equal module for autograd."""
    torch.manual_seed(0)
    ours, theirs = build(), build()
    theirs.load_state_dict(ours.state_dict())
    chain = Chain.of(ours, IMAGE, CPU)
    assert chain is not None
    return chain, ours, theirs


def _autograd_step(module: nn.Module, x: Tensor, y: Tensor, lr: float, weight_decay: float) -> Tensor:
    loss = cross_entropy(module(x), y)
    optimiser = torch.optim.SGD(module.parameters(), lr, weight_decay=weight_decay)
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    optimiser.step()
    return loss.detach()


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
def test_its_steps_are_those_of_autograd(build: Callable[[], nn.Module], weight_decay: float, batch: int):
    chain, ours, theirs = _pair(build)
    for _ in range(3):
        x, y = torch.randn(batch, *IMAGE), torch.randint(3, (batch,))
        with torch.no_grad():
            before = x.clone()
            loss = chain.step(x, y, 0.1, weight_decay)
            assert torch.equal(x, before)
        torch.testing.assert_close(loss, _autograd_step(theirs, x, y, 0.1, weight_decay))
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_its_logits_are_those_of_the_module(build: Callable[[], nn.Module]):
    chain, module, _ = _pair(build)
    x = torch.randn(5, *IMAGE)
    torch.testing.assert_close(chain.logits(x), module(x))


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["padded", "oblong", "two", "pooled", "one channel, one number left"])
def test_with_standardised_weights_too(name: str, weight_decay: float, density: float):
    chain, ours, theirs = _pair(NETWORKS[name])
    kernels = kernels_of(ours)
    held = {n: torch.rand(ours.get_parameter(n).shape) < density for n in kernels}
    for module in (ours, theirs):
        for n in kernels:
            module.get_parameter(n).data.mul_(held[n])
    flat = ours.get_parameter(kernels[0]).data.flatten(1)
    flat[0] = 1e-4 * flat[0]  # a channel whose scale is held
    theirs.load_state_dict(ours.state_dict())
    chain.standardise(held)
    for _ in range(3):
        x, y = torch.randn(4, *IMAGE), torch.randint(3, (4,))
        leaves = dict(theirs.named_parameters())
        used = standardised(leaves, held, names=kernels)
        loss = cross_entropy(functional_call(theirs, used, (x,)), y)
        grads = torch.autograd.grad(loss, tuple(leaves.values()))
        with torch.no_grad():
            torch.testing.assert_close(chain.step(x, y, 0.1, weight_decay), loss)
            for leaf, grad in zip(leaves.values(), grads, strict=True):
                leaf.sub_(grad + weight_decay * leaf, alpha=0.1)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)
    chain.standardise({})
    torch.testing.assert_close(chain.logits(x), ours(x))


def test_of_equal_maxima_the_first_has_the_gradient_as_in_torch():
    chain, ours, theirs = _pair(NETWORKS["pooled"])
    x, y = torch.zeros(4, *IMAGE), torch.tensor([0, 1, 2, 0])  # every window holds equal numbers
    x[1, :, ::2] = x[2, :, :, ::3] = 1
    for _ in range(2):
        with torch.no_grad():
            chain.step(x, y, 0.5, 0)
        _autograd_step(theirs, x, y, 0.5, 0)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5)


def _hooked() -> nn.Module:
    module = NETWORKS["linear"]()
    module[1].register_forward_hook(lambda *_: None)  # type: ignore[index]
    return module


def _tied() -> nn.Module:
    layer = nn.Linear(126, 126)
    return _flat(layer, nn.ReLU(), layer, nn.Linear(126, 3))


def _frozen() -> nn.Module:
    module = NETWORKS["two linear"]()
    next(module.parameters()).requires_grad = False
    return module


class Ours(nn.ReLU):
    """A subclass may compute anything."""


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a hook": _hooked,
    "tied weights": _tied,
    "a frozen weight": _frozen,
    "a subclass": lambda: _flat(nn.Linear(126, 4), Ours(), nn.Linear(4, 3)),
    "no bias": lambda: _flat(nn.Linear(126, 3, bias=False)),
    "another activation": lambda: _flat(nn.Linear(126, 4), nn.Tanh(), nn.Linear(4, 3)),
    "relu first": lambda: _flat(nn.ReLU(), nn.Linear(126, 3)),
    "relu last": lambda: _flat(nn.Linear(126, 3), nn.ReLU()),
    "rows before the flattening": lambda: nn.Sequential(nn.Linear(7, 4), nn.Flatten(), nn.Linear(72, 3)),
    "dropout": lambda: _flat(nn.Linear(126, 4), nn.Dropout(), nn.Linear(4, 3)),
    "stride": lambda: _maps(nn.Conv2d(2, 4, 3, stride=2), features=4 * 4 * 3),
    "dilation": lambda: _maps(nn.Conv2d(2, 4, 3, dilation=2), features=4 * 5 * 3),
    "groups": lambda: _maps(nn.Conv2d(2, 4, 3, groups=2), features=4 * 7 * 5),
    "reflecting": lambda: _maps(nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), features=252),
    "padding by name": lambda: _maps(nn.Conv2d(2, 4, 3, padding="same"), features=252),
    "normalisation": lambda: _maps(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), features=4 * 7 * 5),
    "mean pooling": lambda: _maps(nn.Conv2d(2, 4, 3), nn.AvgPool2d(2), features=4 * 3 * 2),
    "pooling first": lambda: _maps(nn.MaxPool2d(2), nn.Conv2d(2, 4, 2), features=4 * 3 * 2),
    "another flattening": lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(), nn.Linear(126, 3)),
}


@pytest.mark.parametrize("build", OTHERS.values(), ids=OTHERS)
def test_no_other_network_is_a_chain(build: Callable[[], nn.Module]):
    assert Chain.of(build(), IMAGE, CPU) is None


def test_convolutions_with_many_patches_are_left_to_torch():
    assert Chain.of(CNN.build((1, 28, 28), 10), (1, 28, 28), CPU) is None
    lenet = Chain.of(LENET5.build((1, 28, 28), 10), (1, 28, 28), CPU)
    assert lenet is not None
    assert lenet.at_once == MOST_PATCHES // (5 * 5 * 28 * 28)  # the first convolution has the most
    assert lenet.takes(lenet.at_once)
    assert not lenet.takes(lenet.at_once + 1)


def test_on_a_gpu_only_linear_layers_make_a_chain():
    assert Chain.of(LENET5.build((1, 28, 28), 10), (1, 28, 28), torch.device("cuda")) is None
