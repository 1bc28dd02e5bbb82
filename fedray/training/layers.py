"""Layers that compute their own backward pass, for `chain.py`.

Maps between convolutions lie in memory with the batch innermost, (channels, height, width, batch). Then a
patch of a convolution is one block of memory, and pooling works on whole vectors, however few channels there
are: with six channels, torch's own pooling takes three to five times as long. Vectors are (batch, features).
"""

from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from fedray.models.sparse_layers import RELU_GAIN, SMALLEST_SQUARES

relu_backward = torch.ops.aten.threshold_backward.default
pool_forward = torch.ops.aten.max_pool2d_with_indices.default
pool_backward = torch.ops.aten.max_pool2d_with_indices_backward.default


MANY = 8
"""Channels from which on a product is faster if its operand is turned first."""


class Layer(Protocol):
    """A layer that remembers its last input, so that it can go backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for an input."""

    def backward(self, delta: Tensor, lr: float, keep: float) -> Tensor:
        """Make the SGD step of this layer's weights; return the gradient of the loss by its input.

        Args:
            delta: gradient of the mean loss by its output.
            lr: learning rate.
            keep: factor of the weights before the step, 1 − lr · weight decay.
        """


class Linear:
    """A linear layer: (batch, in) → (batch, out). Its weights are views of the working vector."""

    def __init__(self, layer: nn.Linear, *, first: bool) -> None:
        self.weight, self.bias, self.first = layer.weight.detach(), layer.bias.detach(), first
        self._turned, self._ones = self.weight.t(), torch.ones(0)

    def forward(self, x: Tensor) -> Tensor:
        """Return x · Wᵀ + b."""
        self._x = x
        return torch.addmm(self.bias, x, self._turned)

    def backward(self, delta: Tensor, lr: float, keep: float) -> Tensor:
        """Step, and return delta · W; `addmm_` adds the gradient to the weights without writing it first."""
        if self._ones.shape[0] != delta.shape[0]:
            self._ones = delta.new_ones(delta.shape[0])
        below = delta if self.first else delta.mm(self.weight)
        turned = delta.t()
        self.weight.addmm_(turned, self._x, beta=keep, alpha=-lr)
        self.bias.addmv_(turned, self._ones, beta=keep, alpha=-lr)
        return below


class ReLU:
    """max(x, 0), in place: its input is always the fresh output of another layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, changed."""
        self._out = x.relu_()
        return self._out

    def backward(self, delta: Tensor, lr: float, keep: float) -> Tensor:
        """Return the gradient where the input was positive, 0 elsewhere."""
        below: Tensor = relu_backward(delta, self._out, 0)
        return below


class Flatten:
    """(channels, height, width, batch) → (batch, channels · height · width)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the entries of each example as a row."""
        self._shape = x.shape
        return x.reshape(-1, x.shape[-1]).t()

    def backward(self, delta: Tensor, lr: float, keep: float) -> Tensor:
        """Return the gradient in the order of the maps."""
        return delta.t().reshape(self._shape)


class MaxPool:
    """Max-pooling of maps; of equal entries the first has the gradient, as in torch."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        self._options = [
            list(_pair(given)) for given in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
        ]
        self._ceil = pool.ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        """Return the maxima of the windows."""
        self._x = x.permute(0, 3, 1, 2)  # the batch stands for torch's channels, which lie last in memory
        out, self._where = pool_forward(self._x, *self._options, self._ceil)
        maps: Tensor = out.permute(0, 2, 3, 1)
        return maps

    def backward(self, delta: Tensor, lr: float, keep: float) -> Tensor:
        """Return the gradient at the maxima, 0 elsewhere."""
        turned = delta.permute(0, 3, 1, 2)
        below: Tensor = pool_backward(turned, self._x, *self._options, self._ceil, self._where)
        return below.permute(0, 2, 3, 1)


class Standardised:
    """Standardises the rows of a weight as `sparse_layers.standardised` does, with the gradient by hand.

    Args:
        held: bool (out, …), the entries that the mask holds; the weight is 0 elsewhere.
    """

    def __init__(self, held: Tensor) -> None:
        rows = held.flatten(1)
        self._held = None if bool(rows.all()) else rows.float()
        self._count = rows.sum(1, keepdim=True).clamp(min=1).float()
        few = rows.sum(1, keepdim=True) < 2
        self._few = few if bool(few.any()) else None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight (out, n) of the forward pass."""
        self._centred = self._without_mean(weight)
        squares = self._centred.square().sum(1, keepdim=True)
        self._scale = squares.clamp(min=SMALLEST_SQUARES).rsqrt_().mul_(RELU_GAIN)
        # where the scale is held, the gradient does not pass through it
        self._over_squares = squares.reciprocal().masked_fill_(squares < SMALLEST_SQUARES, 0.0)
        used = self._centred * self._scale
        return used if self._few is None else torch.where(self._few, weight, used)

    def backward(self, gradient: Tensor) -> Tensor:
        """Return the gradient (out, n) by the weight, of that by the weight of the forward pass."""
        own = gradient if self._held is None else gradient * self._held
        along = (self._centred * own).sum(1, keepdim=True).mul_(self._over_squares)
        below = self._without_mean((own - self._centred * along).mul_(self._scale))
        return below if self._few is None else torch.where(self._few, own, below)

    def _without_mean(self, rows: Tensor) -> Tensor:
        """Return rows minus their means over the entries held; zeros elsewhere."""
        centred = rows - rows.sum(1, keepdim=True).div_(self._count)
        return centred if self._held is None else centred.mul_(self._held)


class Convolution:
    """A convolution of stride 1 as a product of matrices: (in, h, w, batch) → (out, h', w', batch).

    Its patches are a matrix (in · kh · kw, h' · w' · batch), the weight is (out, in · kh · kw).
    `standardised` makes the weight of the forward pass; None uses the weight itself.
    """

    def __init__(self, conv: nn.Conv2d, *, first: bool) -> None:
        assert conv.bias is not None and not isinstance(conv.padding, str)
        self.weight, self.bias, self.first = conv.weight.detach().flatten(1), conv.bias.detach(), first
        self._window, self._padding = _pair(conv.kernel_size), _pair(conv.padding)
        self.standardised: Standardised | None = None
        self._used = self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return the product of the weight with the patches, plus the bias."""
        padded = self._padded(x)
        channels, height, width, batch = self._shape = padded.shape
        (kh, kw), row = self._window, width * batch
        rows, columns = height - kh + 1, width - kw + 1
        sizes = (channels, kh, kw, rows, columns * batch)
        patches = padded.as_strided(sizes, (height * row, row, batch, row, 1))
        self._patches = patches.reshape(channels * kh * kw, rows * columns * batch)
        self._used = self.weight if self.standardised is None else self.standardised.forward(self.weight)
        out = torch.addmm(self.bias.unsqueeze(1), self._used, self._patches)
        return out.view(-1, rows, columns, batch)

    def backward(self, delta: Tensor, lr: float, keep: float) -> Tensor:
        """Step, and return the gradient by the input."""
        flat = delta.flatten(1)
        below = delta if self.first else self._below(flat)
        if flat.shape[0] < MANY:
            gradient = flat.mm(self._patches.t())
        else:  # turned first: a product of two plain matrices is three times as fast
            gradient = self._patches.mm(flat.t().contiguous()).t()
        if self.standardised is not None:
            gradient = self.standardised.backward(gradient)
        self.weight.mul_(keep).add_(gradient, alpha=-lr)
        self.bias.mul_(keep).add_(flat.sum(1), alpha=-lr)
        return below

    def _padded(self, x: Tensor) -> Tensor:
        top, left = self._padding
        if not (top or left):
            return x.contiguous()
        channels, height, width, batch = x.shape
        padded = x.new_zeros(channels, height + 2 * top, width + 2 * left, batch)
        padded[:, top : top + height, left : left + width] = x
        return padded

    def _below(self, delta: Tensor) -> Tensor:
        """Return the gradient by the input (in, h, w, batch): each row of the window, then each column."""
        channels, height, width, batch = self._shape
        (kh, kw), (top, left) = self._window, self._padding
        rows, block = height - kh + 1, (width - kw + 1) * batch
        of_row = self._used.view(-1, channels, kh, kw).permute(2, 1, 3, 0).reshape(kh, channels * kw, -1)
        wide = delta.new_zeros(channels * kw, height, block)
        for i in range(kh):
            wide[:, i : i + rows].flatten(1).addmm_(of_row[i], delta)
        wide = wide.view(channels, kw, height, block)
        maps = delta.new_zeros(channels, height, width * batch)
        for j in range(kw):
            maps[..., j * batch : j * batch + block].add_(wide[:, j])
        return maps.view(self._shape)[:, top : height - top, left : width - left]


def patches_of(conv: nn.Conv2d, height: int, width: int) -> int:
    """Return how many numbers the patches of one example have, for outputs of a height and width."""
    return conv.in_channels * prod(_pair(conv.kernel_size)) * height * width


def _pair(given: int | tuple[int, ...]) -> tuple[int, int]:
    return (given, given) if isinstance(given, int) else (given[0], given[1])
