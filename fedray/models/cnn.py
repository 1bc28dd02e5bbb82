"""The two-convolution network of federated averaging.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017:
5×5 convolutions with 32 and 64 channels, each followed by 2×2 max-pooling, a hidden layer of 512 and a
softmax layer; 1,663,370 parameters on MNIST.
"""

from collections import OrderedDict

from torch import nn

from fedray.models.spec import Architecture, InputShape

SMALLEST = 4  # two poolings leave 1×1


def _build(input_shape: InputShape, num_classes: int) -> nn.Module:
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
            fc1=nn.Linear(64 * (height // 4) * (width // 4), 512),
            relu3=nn.ReLU(),
            fc2=nn.Linear(512, num_classes),
        )
    )


def _accepts(input_shape: InputShape) -> str | None:
    _, height, width = input_shape
    if min(height, width) >= SMALLEST:
        return None
    return f"cnn halves the image twice and needs at least {SMALLEST}×{SMALLEST}; got {height}×{width}"


CNN = Architecture(
    build=_build,
    accepts=_accepts,
    source="McMahan et al., AISTATS 2017",
    summary="conv 5×5-32, pool, conv 5×5-64, pool, fc 512, fc classes; ReLU",
)
