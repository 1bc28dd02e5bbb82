"""Multi-layer perceptrons: 784-200-10 on 28×28 images, and a wide one, 784-512-512-10.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, use
two hidden layers of 200 (their 2NN); `mlp` is the same network with one, 159,010 parameters on MNIST.
`mlp_wide` has 669,706 there, many more than such data need.
"""

from collections import OrderedDict
from functools import partial
from math import prod

from torch import nn

from fedray.models.spec import Architecture, InputShape

HIDDEN = (200,)
WIDE = (512, 512)


def _build(input_shape: InputShape, num_classes: int, *, hidden: tuple[int, ...]) -> nn.Module:
    layers = OrderedDict[str, nn.Module](flatten=nn.Flatten())
    width = prod(input_shape)
    for number, following in enumerate(hidden, start=1):
        layers[f"fc{number}"] = nn.Linear(width, following)
        layers[f"relu{number}"] = nn.ReLU()
        width = following
    layers[f"fc{len(hidden) + 1}"] = nn.Linear(width, num_classes)
    return nn.Sequential(layers)


def _accepts(input_shape: InputShape) -> str | None:
    return None


MLP = Architecture(
    build=partial(_build, hidden=HIDDEN),
    accepts=_accepts,
    source="2NN of McMahan et al., AISTATS 2017, with one hidden layer",
    summary="fc 200, fc classes; ReLU",
)

MLP_WIDE = Architecture(
    build=partial(_build, hidden=WIDE),
    accepts=_accepts,
    source="2NN of McMahan et al., AISTATS 2017, with 512 units in place of 200",
    summary="fc 512, fc 512, fc classes; ReLU",
)
