"""ResNet-18 for small images: torchvision's, with a 3×3 first convolution of stride 1 and no max-pooling.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. 11,173,962 parameters for CIFAR-10.

8×8 images get a border of one pixel more, so that the last stage is 2×2: at 1×1, BatchNorm cannot train on a
batch of one example.
"""

from torch import nn

from fedray.models.channels import Chain
from fedray.models.spec import Architecture, InputShape, not_images

SMALLEST = 8


def _build(input_shape: InputShape, num_classes: int) -> nn.Module:
    from torchvision.models import resnet18

    channels, height, width = input_shape
    padding = 2 if min(height, width) == SMALLEST else 1
    stem = nn.Conv2d(channels, 64, 3, padding=padding, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    module: nn.Module = resnet18(num_classes=num_classes)
    module.conv1 = stem
    module.maxpool = nn.Identity()
    return module


def _chains(module: nn.Module) -> list[Chain]:
    """Return the inside of each residual block; what blocks add to each other must keep its width."""
    return [
        [(f"{name}.{part}", getattr(block, part)) for part in ("conv1", "bn1", "relu", "conv2")]
        for name, block in module.named_modules()
        if hasattr(block, "conv2")
    ]


def _accepts(input_shape: InputShape) -> str | None:
    if reason := not_images("resnet18", input_shape):
        return reason
    _, height, width = input_shape
    if min(height, width) >= SMALLEST:
        return None
    return (
        f"resnet18 halves the image three times and needs at least {SMALLEST}×{SMALLEST}; "
        f"got {height}×{width}"
    )


RESNET18 = Architecture(
    build=_build,
    accepts=_accepts,
    source="He et al., CVPR 2016; torchvision, with the stem for small images",
    summary="conv 3×3-64, 8 residual blocks (64 to 512) with BatchNorm, mean, fc classes; ReLU",
    chains=_chains,
)
