"""A small network of strided convolutions for CIFAR-10, made for many rounds on a CPU.

Four convolutions of 32, 32, 64 and 64 channels, three of which halve the image instead of pooling; GroupNorm
behind each; mean over the image; a softmax layer. On 32×32 images of three channels and ten classes it has
67,552 weights, 384 numbers of GroupNorm and 10 biases, and trains at 12.5 MFLOP an example. Its classifier is
small (640 weights), so that a low density makes small updates.
"""

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial

from torch import nn

from fedray.models.spec import Architecture, InputShape, not_images

LAYERS = ((32, 5, 2), (32, 3, 2), (64, 3, 2), (64, 3, 1))
"""Channels, window and stride of each convolution."""
GROUPS = 8


def _layers(channels: int) -> Iterator[tuple[str, nn.Module]]:
    for number, (width, window, stride) in enumerate(LAYERS, start=1):
        # GroupNorm takes the mean out, so a bias would have no effect
        conv = nn.Conv2d(channels, width, window, stride=stride, padding=window // 2, bias=False)
        yield f"conv{number}", conv
        yield f"norm{number}", nn.GroupNorm(GROUPS, width)
        yield f"relu{number}", nn.ReLU()
        channels = width


def _build(input_shape: InputShape, num_classes: int) -> nn.Module:
    layers = OrderedDict(_layers(input_shape[0]))
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(LAYERS[-1][0], num_classes)
    return nn.Sequential(layers)


STRIDED_CNN = Architecture(
    build=_build,
    accepts=partial(not_images, "strided_cnn"),
    source="of fedray",
    summary="conv 5×5-32, 3×3-32, 3×3-64, each of stride 2, 3×3-64, mean, fc classes; GroupNorm, ReLU",
)
