"""LeNet-5 as it is built today: ReLU and max-pooling, every map of C3 connected to all maps before it.

LeCun, Bottou, Bengio and Haffner, "Gradient-Based Learning Applied to Document Recognition", Proceedings of
the IEEE 86(11), 1998. 61,706 parameters on MNIST; the original has about 60,000, since its C3 is connected in
part.

Images under 32×32 are padded by 2 in the first convolution, as the original does with MNIST; those under
16×16 in the second one too, which would otherwise find less than its 5×5 window.
"""

from collections import OrderedDict

from torch import nn

from fedray.models.spec import Architecture, InputShape, not_images

SMALLEST = 4  # two poolings leave 1×1


def _build(input_shape: InputShape, num_classes: int) -> nn.Module:
    channels, height, width = input_shape
    first = 2 if min(height, width) < 32 else 0
    second = 2 if min(height, width) < 16 else 0

    def pooled_twice(side: int) -> int:
        once = (side + 2 * first - 4) // 2
        return (once + 2 * second - 4) // 2

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, 6, 5, padding=first),
            pool1=nn.MaxPool2d(2),  # before ReLU: see cnn.py
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(6, 16, 5, padding=second),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * pooled_twice(height) * pooled_twice(width), 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, num_classes),
        )
    )


def _accepts(input_shape: InputShape) -> str | None:
    if reason := not_images("lenet5", input_shape):
        return reason
    _, height, width = input_shape
    if min(height, width) >= SMALLEST:
        return None
    return f"lenet5 halves the image twice and needs at least {SMALLEST}×{SMALLEST}; got {height}×{width}"


LENET5 = Architecture(
    build=_build,
    accepts=_accepts,
    source="LeCun et al., Proc. IEEE 86(11), 1998",
    summary="conv 5×5-6, pool, conv 5×5-16, pool, fc 120, fc 84, fc classes; ReLU",
)
