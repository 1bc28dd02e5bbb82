"""A multi-layer perceptron with one hidden layer: 784-200-10 on 28×28 images.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017, use
two hidden layers of 200 (their 2NN); this is the same network with one, 159,010 parameters on MNIST.
"""

from collections import OrderedDict
from math import prod

from torch import nn

from fedray.models.spec import Architecture, InputShape

HIDDEN = 200


def _build(input_shape: InputShape, num_classes: int) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(prod(input_shape), HIDDEN),
            relu1=nn.ReLU(),
            fc2=nn.Linear(HIDDEN, num_classes),
        )
    )


def _accepts(input_shape: InputShape) -> str | None:
    return None


MLP = Architecture(
    build=_build,
    accepts=_accepts,
    source="2NN of McMahan et al., AISTATS 2017, with one hidden layer",
    summary="fc 200, fc classes; ReLU",
)
