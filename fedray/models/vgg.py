"""VGG for small images: torchvision's convolutions with the head 512-512-classes, without dropout.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015. vgg11
(no normalisation) is the network of PruneFL (Jiang et al., TNNLS 2022): 9,747,136 weights and 3,786 biases on
CIFAR-10. vgg19_bn has 20,565,834 parameters there.

Five poolings need 32×32. Smaller images get a wider zero border in the first convolution (28×28 is padded by
2 on each side, as by `F.pad`), under 28×28 they are refused; larger ones are averaged to 1×1 before the head.

Weights start as in He et al., ICCV 2015, over the fan-out, as torchvision's convolutions do. The hidden
layers of the head follow them, since torchvision's normal(0, 0.01) is meant for layers of 4,096: in layers of
512 it shrinks the signal about six times each. The last layer keeps PyTorch's default.
"""

from collections import OrderedDict
from functools import partial

from torch import nn

from fedray.models.spec import Architecture, InputShape, not_images

SMALLEST = 28


def _build(config: str, batch_norm: bool, input_shape: InputShape, num_classes: int) -> nn.Module:
    from torchvision.models.vgg import cfgs, make_layers

    channels, height, width = input_shape
    features = make_layers(cfgs[config], batch_norm)
    features[0] = nn.Conv2d(channels, 64, 3, padding=(1 + _border(height), 1 + _border(width)))
    hidden = [nn.Linear(512, 512), nn.Linear(512, 512)]
    for layer in [*features, *hidden]:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(
        OrderedDict(
            features=features,
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classifier=nn.Sequential(hidden[0], nn.ReLU(), hidden[1], nn.ReLU(), nn.Linear(512, num_classes)),
        )
    )


def _border(side: int) -> int:
    """Pixels to add on each side so that `side` becomes 32 or more."""
    return max(0, (33 - side) // 2)


def _accepts(name: str, input_shape: InputShape) -> str | None:
    if reason := not_images(name, input_shape):
        return reason
    _, height, width = input_shape
    if min(height, width) >= SMALLEST:
        return None
    return (
        f"{name} halves the image five times and needs at least 32×32, or {SMALLEST}×{SMALLEST}, "
        f"which it pads; got {height}×{width}"
    )


VGG11 = Architecture(
    build=partial(_build, "A", False),
    accepts=partial(_accepts, "vgg11"),
    source="Simonyan and Zisserman, ICLR 2015; head of Jiang et al. (PruneFL), TNNLS 2022",
    summary="8 conv 3×3 (64 to 512), 5 pools, fc 512, fc 512, fc classes; ReLU",
)
VGG19_BN = Architecture(
    build=partial(_build, "E", True),
    accepts=partial(_accepts, "vgg19_bn"),
    source="Simonyan and Zisserman, ICLR 2015, with BatchNorm; head of Jiang et al. (PruneFL), TNNLS 2022",
    summary="16 conv 3×3 (64 to 512) with BatchNorm, 5 pools, fc 512, fc 512, fc classes; ReLU",
)
