"""The two-convolution network of federated averaging, and PruneFL's Conv-2, which is wider.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017:
5×5 convolutions with 32 and 64 channels, each followed by 2×2 max-pooling, a hidden layer of 512 and a
softmax layer; 1,663,370 parameters on MNIST.

Conv-2 of Jiang et al. (PruneFL), TNNLS 2022, has a hidden layer of 2,048, and linear weights that start
uniform over the fan-out (He et al., ICCV 2015); 6,601,504 weights on 28×28 images of 62 classes (FEMNIST).
"""

from collections import OrderedDict
from functools import partial

from torch import nn

from fedray.models.spec import Architecture, InputShape, not_images

SMALLEST = 4  # two poolings leave 1×1


def _build(hidden: int, input_shape: InputShape, num_classes: int) -> nn.Module:
    channels, height, width = input_shape
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 32, 5, padding=2),
            # ReLU is monotone, so it may be taken after the maximum: the same function with a quarter of
            # the ReLUs, and a training step that is a fifth faster in channels_last
            pool1=nn.MaxPool2d(2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, 5, padding=2),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(64 * (height // 4) * (width // 4), hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(hidden, num_classes),
        )
    )


def _build_conv2(input_shape: InputShape, num_classes: int) -> nn.Module:
    module = _build(2048, input_shape, num_classes)
    for layer in module.children():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, mode="fan_out", nonlinearity="relu")
    return module


def _accepts(name: str, input_shape: InputShape) -> str | None:
    if reason := not_images(name, input_shape):
        return reason
    _, height, width = input_shape
    if min(height, width) >= SMALLEST:
        return None
    return f"{name} halves the image twice and needs at least {SMALLEST}×{SMALLEST}; got {height}×{width}"


CNN = Architecture(
    build=partial(_build, 512),
    accepts=partial(_accepts, "cnn"),
    source="McMahan et al., AISTATS 2017",
    summary="conv 5×5-32, pool, conv 5×5-64, pool, fc 512, fc classes; ReLU",
)
CONV2 = Architecture(
    build=_build_conv2,
    accepts=partial(_accepts, "conv2"),
    source="Jiang et al. (PruneFL), TNNLS 2022",
    summary="conv 5×5-32, pool, conv 5×5-64, pool, fc 2048, fc classes; ReLU",
)
