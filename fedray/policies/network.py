"""The network of a trained policy: a perceptron with ReLU, as a safetensors file. It needs no RLlib.

encoder.0.weight, encoder.0.bias, encoder.1.weight, …    hidden layers, each with a ReLU
head.0.weight, …                                         a value or a logit for each action
value.0.weight, …                                        a dueling network's value of the state
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("encoder", "head", "value")
Layer = tuple["Tensor", "Tensor"]
"""Weight (out, in) and bias (out,), float32."""


class Network:
    """A network that values the actions of an observation.

    Args:
        parts: the layers of each part; `value` only for a dueling network.

    Raises:
        ValueError: if the layers do not fit one another.
    """

    def __init__(self, parts: Mapping[str, Sequence[Layer]]) -> None:
        self.parts = {name: tuple(layers) for name, layers in parts.items() if layers}
        unknown = set(self.parts) - set(PARTS)
        if unknown or not {"encoder", "head"} <= set(self.parts):
            raise ValueError(f"its parts are {', '.join(self.parts) or 'none'}, not encoder and head")
        width = _width("encoder", self.parts["encoder"], None)
        self.actions = _width("head", self.parts["head"], width)
        if "value" in self.parts and _width("value", self.parts["value"], width) != 1:
            raise ValueError("its value has more than one output")
        self.features = int(self.parts["encoder"][0][0].shape[1])

    def __call__(self, observations: "Tensor") -> "Tensor":
        """Return values or logits of shape (n, actions) for observations of shape (n, features)."""
        import torch

        with torch.no_grad():
            hidden = _through(self.parts["encoder"], observations, ends_linear=False)
            found = _through(self.parts["head"], hidden)
            if "value" in self.parts:
                found = found - found.nanmean(dim=1, keepdim=True) + _through(self.parts["value"], hidden)
            return found

    def save(self) -> bytes:
        """Return the content of a safetensors file."""
        from safetensors.torch import save

        tensors = {
            f"{part}.{number}.{kind}": tensor.detach().contiguous().clone()
            for part, layers in self.parts.items()
            for number, layer in enumerate(layers)
            for kind, tensor in zip(("weight", "bias"), layer, strict=True)
        }
        return bytes(save(tensors))

    @classmethod
    def load(cls, data: bytes) -> "Network":
        """Read what `save` wrote.

        Raises:
            ValueError: if it is not the network of a policy.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"not a safetensors file: {error}") from None
        parts: dict[str, list[Layer]] = {}
        for part in PARTS:
            layers = parts[part] = []
            while (name := f"{part}.{len(layers)}") + ".weight" in tensors and f"{name}.bias" in tensors:
                layers.append((tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.bias")))
        if tensors:
            raise ValueError(f"it has tensors of no layer: {', '.join(sorted(tensors))}")
        return cls(parts)


def _width(part: str, layers: Sequence[Layer], inputs: int | None) -> int:
    """Check the layers of a part; return how many numbers leave it."""
    import torch

    for number, (weight, bias) in enumerate(layers):
        is_layer = weight.dim() == 2 and tuple(bias.shape) == (weight.shape[0],) and 0 not in weight.shape
        fits = is_layer and (inputs is None or weight.shape[1] == inputs)
        if not fits or weight.dtype != torch.float32 or bias.dtype != torch.float32:
            raise ValueError(f"{part}.{number} is no layer after the one before it")
        inputs = int(weight.shape[0])
    assert inputs is not None
    return inputs


def _through(layers: Sequence[Layer], values: "Tensor", ends_linear: bool = True) -> "Tensor":
    from torch.nn.functional import linear, relu

    for number, (weight, bias) in enumerate(layers, start=1):
        values = linear(values, weight, bias)
        if not ends_linear or number < len(layers):
            values = relu(values)
    return values
