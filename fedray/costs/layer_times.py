"""The time of a round as a sum over the held weights, for methods that search for a mask.

    T(M) = c + Σ_l |M_l| · t_l,     t_l = τ · comp_l + comm

A held weight of layer l is computed with in each of τ local steps and crosses the wire once down and once up;
no pruning saves c. The coefficients come from the profiles of devices, or from the measurements that
PruneFL published. The model informs a method's decisions; a run is always charged by the clock of `devices`.

Source: Jiang et al. (PruneFL), TNNLS 2022, and its repository (jiangyuang/PruneFL, configs).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedray.costs.clock import seconds
from fedray.costs.codec import HEADER_BYTES, Codec
from fedray.costs.flops import FlopModel
from fedray.errors import unknown
from fedray.types import ClientInfo, Cost, Layout, Mask


@dataclass(frozen=True)
class LayerTimes:
    """The time of a round, linear in the number of weights held in each layer.

    Args:
        constant_s: seconds that no mask saves, > 0.
        per_weight_s: name of a weight tensor → seconds that each held entry of it adds, > 0. Other tensors
            add nothing.
    """

    constant_s: float
    per_weight_s: Mapping[str, float]

    def seconds(self, mask: Mask) -> float:
        """Return T(M)."""
        return self.constant_s + sum(
            int(mask[name].count_nonzero()) * weight_s
            for name, weight_s in self.per_weight_s.items()
            if name in mask
        )

    def vector(self, layout: Layout) -> Tensor:
        """Return the model as float32 (1 + tensors,): the constant, then the tensors of a layout in order."""
        return torch.tensor([self.constant_s, *(self.per_weight_s.get(n, 0.0) for n in layout.names)])

    @classmethod
    def of_vector(cls, vector: Tensor, layout: Layout) -> "LayerTimes":
        """Read a vector written by `vector`; the model has a time for every tensor of the layout."""
        constant_s, *per_weight_s = vector.tolist()
        return cls(constant_s, dict(zip(layout.names, per_weight_s, strict=True)))


SURVEYED = 100
"""Number of clients, at least, in a mean; all of them if the population is smaller."""

COMMUNICATION_S = 5.561621025626998e-6
"""PruneFL's seconds per weight on the wire: 4 bytes down and 4 up at 1.4384 MB/s."""


@dataclass(frozen=True)
class Measured:
    """A local step of a batch of 20 on PruneFL's Raspberry Pi, with its sparse kernels: a least-squares fit.

    Args:
        constant_s: seconds of a step in which no weight is held.
        per_weight_s: name of a weight tensor → seconds that each held entry adds to a step.
    """

    constant_s: float
    per_weight_s: Mapping[str, float]


MeasuredName = Literal["vgg11_cifar10", "conv2_femnist"]
MEASURED: Mapping[str, Measured] = {
    "vgg11_cifar10": Measured(
        17.36990105989628,
        {
            "features.0.weight": 0.0,
            "features.3.weight": 8.95507e-6,
            "features.6.weight": 2.495288e-6,
            "features.8.weight": 2.780686e-6,
            "features.11.weight": 1.024265e-6,
            "features.13.weight": 1.277773e-6,
            "features.16.weight": 1.843831e-6,
            "features.18.weight": 8.066104e-7,
            "classifier.0.weight": 5.145334e-7,
            "classifier.2.weight": 2.430023e-7,
            "classifier.4.weight": 0.0,
        },
    ),
    "conv2_femnist": Measured(
        1.2492789765,
        {
            "conv1.weight": 0.0,
            "conv2.weight": 7.098850e-6,
            "fc1.weight": 1.927325e-7,
            "fc2.weight": 1.782308e-7,
        },
    ),
}
"""Name → what PruneFL measured on VGG-11 with CIFAR-10, and on Conv-2 with FEMNIST."""


def published(name: str, steps: float) -> LayerTimes:
    """Return PruneFL's time model, as its simulations use it.

    Args:
        name: a key of MEASURED.
        steps: τ, local steps of a client in a round (of a batch of 20); 5 in the paper.
    """
    step = MEASURED[name]
    per_weight_s = {n: steps * step_s + COMMUNICATION_S for n, step_s in step.per_weight_s.items()}
    return LayerTimes(steps * step.constant_s, per_weight_s)


def of_devices(
    clients: Sequence[ClientInfo],
    flops: FlopModel,
    examples: Callable[[int], int],
    steps: Callable[[int], int],
    downlink: Codec,
    uplink: Codec,
    dense_gradient: bool = False,
) -> LayerTimes:
    """Return the mean time of a round over clients, by the clocks of their devices.

    For all weights held T is exactly that mean. A held weight costs its value on the wire, and on a device
    that can skip any zero also its share of the FLOPs; on other devices all computing is in the constant.

    Args:
        clients: at least one; of a large population, one or two hundred in equal distances count.
        flops: of the model.
        examples: number of a client's examples → number of examples that it processes in a round.
        steps: the same → number of steps in which it does.
        downlink: how tasks are written.
        uplink: how updates are written.
        dense_gradient: whether gradients are taken for the masked weights too; the mask then saves computing
            in the forward pass only.
    """
    layout, full = flops.layout, Mask.full(flops.layout)
    bytes_down, bytes_up = downlink.size(full), uplink.size(full)
    down, up = ((total - HEADER_BYTES) / layout.size for total in (bytes_down, bytes_up))
    clients = _some(clients)
    mean_s, share = 0.0, 1 / len(clients)
    per_weight_s = dict.fromkeys(weights(layout), 0.0)
    for client in clients:
        device, seen = client.profile, examples(client.num_examples)
        work = flops.executed(full, device.exploits, dense_gradient=dense_gradient) * seen
        cost = Cost(bytes_down, bytes_up, executed_flops=work, steps=steps(client.num_examples))
        mean_s += share * seconds(cost, device)
        wire_s = down / device.downlink_bytes_per_s + up / device.uplink_bytes_per_s
        saved_flops = 2 * (1 if dense_gradient else 3) * seen if device.exploits == "unstructured" else 0
        for name in per_weight_s:
            compute_s = flops.positions.get(name, 0) * saved_flops / device.flops_per_s
            per_weight_s[name] += share * (wire_s + compute_s)
    weights_s = sum(full[name].numel() * weight_s for name, weight_s in per_weight_s.items())
    return LayerTimes(mean_s - weights_s, per_weight_s)


def mean_steps(clients: Sequence[ClientInfo], steps: Callable[[int], int]) -> float:
    """Return the mean of a round's local steps over the same clients; `steps` maps examples to steps."""
    return sum(steps(client.num_examples) for client in _some(clients)) / len(_some(clients))


def weights(layout: Layout) -> tuple[str, ...]:
    """Return the names of the tensors of two or more dimensions, prunable or not."""
    return tuple(name for name, shape in layout.shape_of.items() if len(shape) > 1)


def mismatch(names: Iterable[str], layout: Layout, *, complete: bool = False) -> str | None:
    """Return how the layers of a time model differ from those of a model; None if they fit.

    Args:
        names: of the weight tensors that have a time.
        layout: the model's; every prunable tensor must be named, and nothing but weights may be.
        complete: whether every weight must be named, prunable or not: a measured model has to be this one.
    """
    given, fault = tuple(names), None
    needed = weights(layout) if complete else layout.prunable_names
    if missing := [name for name in needed if name not in given]:
        fault = f"no time for {', '.join(missing)}"
    elif strange := [name for name in given if name not in weights(layout)]:
        fault = unknown("layer", strange[0], weights(layout))
    if fault is None:
        return None
    return (
        f"{fault}; give every layer that may be pruned its seconds in method.layer_times_s, and "
        "method.constant_s, or take method.time_model=profile"
    )


def _some(clients: Sequence[ClientInfo]) -> Sequence[ClientInfo]:
    """Return all clients, or about SURVEYED of them: looking at all of a large population takes time."""
    return clients[:: max(1, len(clients) // SURVEYED)]
