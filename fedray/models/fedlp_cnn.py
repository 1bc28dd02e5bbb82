"""The five-block CNN of FedLP, and the same network with an exit after each block.

Zhu et al., "FedLP: Layer-wise Pruning Mechanism for Communication-Computation Efficient Federated Learning",
ICC 2023; facts from the authors' code, Zhuzzq/FedLP. 551,466 parameters on CIFAR-10. Blocks are 3×3
convolutions, each followed by ReLU and *then* BatchNorm; the classifier is two linear layers without an
activation between them. Three poolings need 8×8; odd sides lose their last row.

`fedlp_cnn` is the network itself. `fedlp_cnn_exits` adds a head like the classifier after each of the first
four blocks. With the same seed its own layers start alike. The heads are larger than the network (they add
2,364,968 parameters on CIFAR-10), and methods that ignore exits send them in vain: use it only with
methods that leave early.

A network declares its exits so: its class has an attribute `exits`, and `build` of its Architecture is that
class. For each exit, shallowest first, it holds the dotted names of the modules that are called in sequence.
The last exit is the whole network; a shallower exit also calls its head.
The classifier must be the last linear layer among the class's modules, after the heads. `exits_of` and
`along` read this.
"""

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from fedray.models.spec import Architecture, InputShape, not_images

SMALLEST = 8  # three poolings leave 1×1
HIDDEN = 128

Path = tuple[str, ...]
"""Dotted names of modules that are called in sequence."""


def exits_of(network: object) -> tuple[Path, ...]:
    """Return the exits of a module, or of the class that builds it; none if it declares none."""
    exits: tuple[Path, ...] = getattr(network, "exits", ())
    return exits


def along(module: nn.Module, path: Path, x: Tensor) -> Tensor:
    """Return the output of the modules of a path for images (n, channels, height, width)."""
    for name in path:
        x = module.get_submodule(name)(x)
    return x


def _block(first: int, *channels: int, pool: bool) -> nn.Sequential:
    """Return convolutions numbered from `first`, from each number of channels to the next."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(pairwise(channels), start=first):
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3, padding=1)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"bn{number}"] = nn.BatchNorm2d(outputs)
    if pool:
        layers["pool"] = nn.MaxPool2d(2)
    return nn.Sequential(layers)


def _classifier(channels: int, side: tuple[int, int], num_classes: int, *, pool: bool) -> nn.Sequential:
    """Return two linear layers on maps of `side`, as they are after a pooling that may be part of it."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(pool=nn.MaxPool2d(2)) if pool else OrderedDict()
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(channels * side[0] * side[1], HIDDEN)
    layers["fc2"] = nn.Linear(HIDDEN, num_classes)
    return nn.Sequential(layers)


def _network(input_shape: InputShape, num_classes: int) -> OrderedDict[str, nn.Module]:
    channels, height, width = input_shape
    return OrderedDict(
        block1=_block(1, channels, 32, 32, pool=True),
        block2=_block(3, 32, 64, pool=False),
        block3=_block(4, 64, 64, pool=True),
        block4=_block(5, 64, 128, pool=False),
        block5=_block(6, 128, 128, pool=True),
        classifier=_classifier(128, (height // 8, width // 8), num_classes, pool=False),
    )


def _build(input_shape: InputShape, num_classes: int) -> nn.Module:
    return nn.Sequential(_network(input_shape, num_classes))


class FedLPCNNExits(nn.Module):
    """The network with a head after each block but the last, whose head is the classifier."""

    exits: ClassVar[tuple[Path, ...]] = (
        ("block1", "exit1"),
        ("block1", "block2", "exit2"),
        ("block1", "block2", "block3", "exit3"),
        ("block1", "block2", "block3", "block4", "exit4"),
        ("block1", "block2", "block3", "block4", "block5", "classifier"),
    )

    def __init__(self, input_shape: InputShape, num_classes: int) -> None:
        """Build the network first, so that it draws the same initial weights as without exits."""
        super().__init__()
        _, height, width = input_shape
        half, quarter, eighth = ((height // n, width // n) for n in (2, 4, 8))
        layers = _network(input_shape, num_classes)
        classifier = layers.pop("classifier")
        layers["exit1"] = _classifier(32, half, num_classes, pool=False)
        layers["exit2"] = _classifier(64, quarter, num_classes, pool=True)
        layers["exit3"] = _classifier(64, quarter, num_classes, pool=False)
        layers["exit4"] = _classifier(128, eighth, num_classes, pool=True)
        layers["classifier"] = classifier
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of the whole network."""
        return along(self, self.exits[-1], x)


def _accepts(name: str, input_shape: InputShape) -> str | None:
    if reason := not_images(name, input_shape):
        return reason
    _, height, width = input_shape
    if min(height, width) >= SMALLEST:
        return None
    return (
        f"{name} halves the image three times and needs at least {SMALLEST}×{SMALLEST}; got {height}×{width}"
    )


FEDLP_CNN = Architecture(
    build=_build,
    accepts=partial(_accepts, "fedlp_cnn"),
    source="Zhu et al. (FedLP), ICC 2023",
    summary="6 conv 3×3 (32 to 128) with ReLU and BatchNorm, 3 pools, fc 128, fc classes",
)
FEDLP_CNN_EXITS = Architecture(
    build=FedLPCNNExits,
    accepts=partial(_accepts, "fedlp_cnn_exits"),
    source="Zhu et al. (FedLP), ICC 2023",
    summary="fedlp_cnn, with a head (fc 128, fc classes) after each of its blocks",
)
