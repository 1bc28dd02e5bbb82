"""The four-convolution network of HeteroFL for MNIST, whose layers are cut to a share of their channels.

Diao, Ding and Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous
Clients", ICLR 2021; facts from the authors' code: 3×3 convolutions with 64, 128, 256 and 512 channels, each
followed by BatchNorm and ReLU, max-pooling after the first three, the mean over positions, and one linear
layer, whose bias starts from zero; other initial values are PyTorch's. 1,556,874 parameters on MNIST at the
full width, 1.6 million in the paper; 98,922 at a quarter of it.
"""

from collections import OrderedDict

from torch import nn

from fedray.models.spec import Architecture, InputShape, not_images

WIDTHS = (64, 128, 256, 512)
SMALLEST = 16  # three poolings leave 2×2: BatchNorm needs more than one value, also of a single image


def _build(input_shape: InputShape, num_classes: int) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = input_shape[0]
    for number, width in enumerate(WIDTHS, start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, width, 3, padding=1)
        layers[f"bn{number}"] = nn.BatchNorm2d(width)
        if number < len(WIDTHS):
            layers[f"pool{number}"] = nn.MaxPool2d(2)  # before ReLU: see cnn.py
        layers[f"relu{number}"] = nn.ReLU()
        inputs = width
    layers["mean"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs, num_classes)
    nn.init.zeros_(layers["fc"].bias)  # type: ignore[arg-type]
    return nn.Sequential(layers)


def _accepts(input_shape: InputShape) -> str | None:
    if reason := not_images("heterofl_cnn", input_shape):
        return reason
    _, height, width = input_shape
    if min(height, width) >= SMALLEST:
        return None
    return (
        f"heterofl_cnn halves the image three times and needs at least {SMALLEST}×{SMALLEST}; "
        f"got {height}×{width}"
    )


HETEROFL_CNN = Architecture(
    build=_build,
    accepts=_accepts,
    source="Diao et al. (HeteroFL), ICLR 2021",
    summary="4 conv 3×3 (64 to 512) with BatchNorm and ReLU, 3 pools, mean over positions, fc classes",
)
