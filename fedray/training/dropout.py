"""Dropout of stacked clients: each client's numbers come from its own stream, as when it trains alone.

torch draws them from one global generator. In a stack the layer is called for one client after the other, and
the generator stands where it stood for this client.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LAYERS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)

Call = Callable[[int, Tensor], Tensor]
"""(position of a client, its inputs) → its outputs."""


def dropouts(module: nn.Module) -> list[nn.Module]:
    """Return the layers of torch that drop values."""
    return [layer for layer in module.modules() if isinstance(layer, LAYERS)]


def generator_on(device: torch.device) -> torch.Generator:
    """Return the global generator of which layers on a device draw."""
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


class Streams:
    """Where the generator stands for each client of a stack.

    Args:
        states: of each client.
        device: where the clients train.
    """

    def __init__(self, states: Sequence[Tensor], device: torch.device) -> None:
        self.states, self._generator = list(states), generator_on(device)

    @contextmanager
    def drawing(self, layers: Sequence[nn.Module], clients: Sequence[int]) -> Iterator[None]:
        """Let layers draw from the streams of clients: one, or several that `torch.func.vmap` maps over."""
        before = self._generator.get_state()
        for layer in layers:
            call = partial(self._call, layer, clients)
            layer.__dict__["forward"] = partial(call, 0) if len(clients) == 1 else partial(_each, call)
        try:
            yield
        finally:
            for layer in layers:
                del layer.__dict__["forward"]
            self._generator.set_state(before)

    def _call(self, layer: nn.Module, clients: Sequence[int], position: int, x: Tensor) -> Tensor:
        """Return the output of a layer for one client."""
        client = clients[position]
        self._generator.set_state(self.states[client])
        out: Tensor = type(layer).forward(layer, x)
        self.states[client] = self._generator.get_state()
        return out


def _each(call: Call, x: Tensor) -> Tensor:
    """Return the outputs of a layer for the clients that `vmap` maps over."""
    out: Tensor = _Each.apply(x, call)  # type: ignore[no-untyped-call]
    return out


class _Each(torch.autograd.Function):
    """Calls a layer for each client; its gradient is that of the calls."""

    @staticmethod
    def forward(x: Tensor, call: Call) -> Tensor:
        """Never called: only inputs that are mapped over come here."""
        raise RuntimeError("dropout of inputs that are the same for all clients")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, call: Call) -> tuple[Tensor, int]:
        """Return the stacked outputs; `x` has the clients along the dimension `in_dims[0]`."""
        dim = in_dims[0]
        assert dim is not None
        return torch.stack([call(k, part) for k, part in enumerate(torch.unbind(x, dim))]), 0
