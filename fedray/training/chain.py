"""Plain SGD on a chain of linear layers without autograd.

For `Flatten`, `Linear` and `ReLU` layers under cross-entropy, the backward pass is a few matrix products.
`addmm_` adds each product to the weights directly, so no gradient is written to memory. A small network
trains about twice as fast on a CPU, where writing gradients costs as much as the arithmetic. Results equal
those of autograd to rounding. The choice depends only on the model and the options of the call, so a run
keeps its bits.
"""

from typing import Self

import torch
from torch import Tensor, nn

from fedray.models.channels import is_sequence

relu_backward = torch.ops.aten.threshold_backward


def _is_flattening(layer: nn.Module) -> bool:
    return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


class LinearChain:
    """The linear layers of a network; their weights are views of a working vector.

    Args:
        layers: each but the last is followed by a ReLU.
    """

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.layers = [(layer.weight.detach(), layer.bias.detach()) for layer in layers]
        self._known: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """Return the chain of a module, or None if the module is not one."""
        if not is_sequence(module) or any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
            return None
        assert isinstance(module, nn.Sequential)
        layers = [layer for layer in module if not _is_flattening(layer)]
        if len(layers) < len(module) and not _is_flattening(module[0]):
            return None  # layers before the flattening treat each row of an example alone
        linear, between = layers[::2], layers[1::2]
        is_chain = len(layers) % 2 == 1 and all(type(layer) is nn.ReLU for layer in between)
        found = [layer for layer in linear if type(layer) is nn.Linear and layer.bias is not None]
        # parameters() lists a tied weight once; a step would write it before its last read
        parameters = list(module.parameters())
        plain = all(p.requires_grad for p in parameters) and len(parameters) == 2 * len(found)
        return cls(found) if is_chain and plain and len(found) == len(linear) else None

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, lr: float, weight_decay: float) -> Tensor:
        """Make one SGD step on a batch, in place; return the mean loss before it.

        Args:
            x: (batch, …) float32, flattened here.
            y: (batch,) int64.
            lr: learning rate.
            weight_decay: L2 penalty, as in torch.optim.SGD.
        """
        inputs = [x.flatten(1)]
        for weight, bias in self.layers[:-1]:
            inputs.append(torch.addmm(bias, inputs[-1], weight.t()).relu_())
        weight, bias = self.layers[-1]
        log_p, column = torch.addmm(bias, inputs[-1], weight.t()).log_softmax(1), y.unsqueeze(1)
        loss = log_p.gather(1, column).mean().neg_()
        ones, minus_share = self._constants(len(y))
        delta = log_p.exp_().div_(len(y)).scatter_add_(1, column, minus_share)
        keep = 1 - lr * weight_decay
        for index in range(len(self.layers) - 1, -1, -1):
            (weight, bias), below = self.layers[index], inputs[index]
            delta_below = relu_backward(delta.mm(weight), below, 0) if index else delta
            weight.addmm_(delta.t(), below, beta=keep, alpha=-lr)
            bias.addmv_(delta.t(), ones, beta=keep, alpha=-lr)
            delta = delta_below
        return loss

    def _constants(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return a vector of ones (batch,), and −1/batch as a column (batch, 1)."""
        if batch not in self._known:
            ones = torch.ones(batch, device=self.layers[0][0].device)
            self._known[batch] = (ones, (ones / -batch).unsqueeze(1))
        return self._known[batch]
