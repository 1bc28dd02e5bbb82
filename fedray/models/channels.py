"""The channels of a network that can be removed, and the entries of each, read from its structure.

A convolution or linear layer computes channels; normalisation, activations and pooling do not mix them; the
next convolution or linear layer takes them as inputs. A channel is one row of the first layer, one entry of
each vector in between, and one block of columns of the second. If anything else is in between (a sum of
branches, a GroupNorm, which mixes channels, a layer of another kind or with its own `forward`), no channel
can be removed.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import nn

from fedray.types import ChannelGroup

Chain = Sequence[tuple[str, nn.Module]]
"""Modules that are called one after the other, with their dotted names."""

Chains = Callable[[nn.Module], Sequence[Chain]]
"""Finds the chains of a module."""

KEEPS_CHANNELS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
"""Layers that compute each channel from itself alone."""
FOLLOWED = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.Flatten, *KEEPS_CHANNELS)


def sequential(module: nn.Module) -> list[Chain]:
    """Return the one chain that nested `nn.Sequential` are; none for any other module."""
    return [list(_leaves(module))] if is_sequence(module) else []


def is_sequence(module: nn.Module) -> bool:
    """Tell whether a module calls its children one after the other, and does nothing else."""
    return isinstance(module, nn.Sequential) and _as_known(module, (nn.Sequential,))


def not_followed(module: nn.Module, chains: Sequence[Chain]) -> str:
    """Return why a module has no channels that can be removed."""
    if not chains:
        return (
            f"{type(module).__name__} is a class with its own `forward`, and its Architecture does not "
            "say in `chains` which of its modules follow each other"
        )
    strange = {type(m).__name__ for chain in chains for _, m in chain if not _as_known(m, FOLLOWED)}
    if strange:
        return f"channels are not followed through {', '.join(sorted(strange))}"
    return "none go from one layer to the next without a sum or a GroupNorm between them"


def channel_groups(
    chains: Sequence[Chain], shared: Collection[int] = (), *, vectors: bool = True
) -> tuple[ChannelGroup, ...]:
    """Return the groups of channels along chains, in order.

    Args:
        chains: of the same module; their names are those of `named_modules`.
        shared: ids of parameters that several of its modules hold.
        vectors: whether an example has one dimension. A BatchNorm1d behind a linear layer normalises the
            layer's channels only if it has, or is flattened first.
    """
    return tuple(group for chain in chains for group in _along(chain, shared, vectors))


def shared_parameters(module: nn.Module) -> set[int]:
    """Return the ids of the parameters that several modules hold."""
    held = Counter(id(p) for m in module.modules() for p in m._parameters.values() if p is not None)
    return {key for key, holders in held.items() if holders > 1}


def _as_known(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Tell whether a module is of one of some kinds and computes what that kind does."""
    hooked = module._forward_hooks or module._forward_pre_hooks
    return not hooked and any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds
    )


def _leaves(module: nn.Module, above: str = "") -> Iterator[tuple[str, nn.Module]]:
    # named_children would list a module that is called twice only once
    for name, child in module._modules.items():
        if child is not None and is_sequence(child):
            yield from _leaves(child, f"{above}{name}.")
        elif child is not None:
            yield f"{above}{name}", child


def _along(chain: Chain, shared: Collection[int], vectors: bool) -> Iterator[ChannelGroup]:
    """Yield a group for each pair of neighbouring layers with nothing between them that mixes channels."""
    producer: tuple[str, nn.Conv2d | nn.Linear] | None = None
    rows: list[str] = []
    flat = False  # whether examples are flattened after the producer
    calls = Counter(id(module) for _, module in chain)
    for name, module in chain:
        if _in_several_places(module, calls, shared) or not _as_known(module, FOLLOWED):
            producer = None
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if producer is not None and (spread := _spread(producer[1], module, flat)):
                yield ChannelGroup(producer[0], _outputs(producer[1]), tuple(rows), f"{name}.weight", spread)
            producer, rows, flat = (name, module), [f"{name}.weight"], False
            rows += [f"{name}.bias"] * (module.bias is not None)
        elif isinstance(module, nn.BatchNorm1d) and not vectors:
            producer = None
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            rows += [f"{name}.{n}" for n, _ in module.named_parameters()]
            rows += [f"{name}.{n}" for n, buffer in module.named_buffers() if buffer.is_floating_point()]
        elif isinstance(module, nn.Flatten):
            whole = (module.start_dim, module.end_dim) == (1, -1)
            producer = producer if whole else None
            flat, vectors = True, vectors or whole


def _in_several_places(module: nn.Module, calls: Mapping[int, int], shared: Collection[int]) -> bool:
    """Tell whether a layer's weights, and so its channels, are those of several places in the network."""
    own = list(module.parameters())
    return bool(own) and (calls[id(module)] > 1 or any(id(parameter) in shared for parameter in own))


def _outputs(layer: nn.Conv2d | nn.Linear) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def _spread(producer: nn.Conv2d | nn.Linear, consumer: nn.Conv2d | nn.Linear, flat: bool) -> int:
    """Return the number of columns of the consumer that take a channel; 0 if unknown.

    Args:
        producer: layer that computes the channels.
        consumer: layer that takes them as inputs.
        flat: whether examples are flattened in between.
    """
    if isinstance(producer, nn.Conv2d) and producer.groups != 1:
        return 0
    if isinstance(consumer, nn.Conv2d):
        return int(consumer.groups == 1 and consumer.in_channels == _outputs(producer) and not flat)
    spread, rest = divmod(consumer.in_features, _outputs(producer))
    # without flattening, a linear layer takes the last dimension of images, which is no channel; and vectors
    # that a linear layer computes for each row do not begin with channels
    one_by_one = isinstance(producer, nn.Linear) and spread == 1
    return spread if not rest and (one_by_one or (flat and isinstance(producer, nn.Conv2d))) else 0
