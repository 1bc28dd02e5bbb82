"""Which channels of a network can be taken out, and all that goes with each: read from its structure.

A convolution or linear layer makes channels; normalisation, activations and pooling keep them apart; the next
convolution or linear layer takes them in. A channel is then one row of the first, one entry of each vector on
the way, and one block of columns of the second. Where anything else lies between (a sum of branches, a
GroupNorm, which mixes channels), there is no group.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from torch import nn

from fedray.types import ChannelGroup

Chain = Sequence[tuple[str, nn.Module]]
"""Modules that are called one after the other, with their dotted names."""

Chains = Callable[[nn.Module], Sequence[Chain]]
"""Finds the chains of a module."""

KEEPS_CHANNELS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.ReLU,
    nn.Identity,
    nn.Dropout,
    nn.Flatten,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)


def sequential(module: nn.Module) -> list[Chain]:
    """Return the one chain that nested `nn.Sequential` are; none for any other module."""
    return [list(_leaves(module))] if isinstance(module, nn.Sequential) else []


def channel_groups(chains: Sequence[Chain]) -> tuple[ChannelGroup, ...]:
    """Return the groups of channels along chains, in order.

    Args:
        chains: of the same module; their names are those of `named_modules`.
    """
    return tuple(group for chain in chains for group in _along(chain))


def _leaves(module: nn.Module, above: str = "") -> Iterator[tuple[str, nn.Module]]:
    # named_children would list a module that is called twice only once
    for name, child in module._modules.items():
        if isinstance(child, nn.Sequential):
            yield from _leaves(child, f"{above}{name}.")
        elif child is not None:
            yield f"{above}{name}", child


def _along(chain: Chain) -> Iterator[ChannelGroup]:
    """Yield a group for each pair of neighbouring layers with nothing between them that mixes channels."""
    producer: tuple[str, nn.Conv2d | nn.Linear] | None = None
    rows: list[str] = []
    calls = Counter(id(module) for _, module in chain)
    for name, module in chain:
        if calls[id(module)] > 1 and any(True for _ in module.parameters()):
            producer = None  # its channels are those of several places
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if producer is not None and (spread := _spread(producer[1], module)):
                yield ChannelGroup(producer[0], _outputs(producer[1]), tuple(rows), f"{name}.weight", spread)
            producer, rows = (name, module), [f"{name}.weight"]
            rows += [f"{name}.bias"] * (module.bias is not None)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            rows += [f"{name}.{n}" for n, _ in module.named_parameters()]
            rows += [f"{name}.{n}" for n, buffer in module.named_buffers() if buffer.is_floating_point()]
        elif not isinstance(module, KEEPS_CHANNELS):
            producer = None


def _outputs(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def _spread(producer: nn.Conv2d | nn.Linear, consumer: nn.Conv2d | nn.Linear) -> int:
    """Return how many columns of the consumer a channel enters; 0 if that cannot be told."""
    if isinstance(producer, nn.Conv2d) and producer.groups != 1:
        return 0
    if isinstance(consumer, nn.Conv2d):
        return int(consumer.groups == 1 and consumer.in_channels == _outputs(producer))
    spread, rest = divmod(consumer.in_features, _outputs(producer))
    return spread if not rest else 0
