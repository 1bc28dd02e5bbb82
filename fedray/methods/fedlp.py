"""FedLP: federated layer-wise pruning of the exchanged model.  Zhu et al., ICC 2023.

Homogeneous: every client trains the whole model; before the upload it keeps each layer with a probability,
the layer-preserving rate (LPR). Heterogeneous: a client has the first blocks of the model only, as many as it
can afford, and trains them through an exit with its private head. Either way the server averages each layer
over the clients that sent it, and keeps its own if no client did. Uploads lose layers, the model does not:
the final model is dense.

Differs from the paper (readings, with the flag that restores the other one):
* a layer is a convolution or linear layer with its bias and the normalisation behind it; the published code
  draws for each tensor: `unit="tensor"`;
* all clients have the same weight, as in that code: `weighting="examples"` for the other;
* a client keeps the head it has trained; in that code every round starts from the head's initial weights:
  `heads="restarted"`; in both the head never leaves the client, unless `heads="shared"`;
* the paper's Hetero(3) are clients of which 60 % have complexity 3: `preference`.
"""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import ceil
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedray.federation.aggregate import Fold, Weight
from fedray.federation.client import Client
from fedray.federation.method import Method, ServerContext, Setting
from fedray.models import MODELS
from fedray.models.fedlp_cnn import along, exits_of
from fedray.models.spec import ModelSpec
from fedray.types import ClientInfo, ClientUpdate, Fraction, Layout, Mask, PositiveInt, ServerState, Task

SPEEDS = 1000
"""Approximate number of clients with which a client's speed is compared."""


@dataclass(frozen=True)
class FedLPMemory:
    """The server's memory with sub-models.

    Args:
        masks: exchanged weights of each complexity, shallowest first.
        seed: of the draws of complexities.
        speeds: FLOP/s of some clients, ascending.
    """

    masks: tuple[Mask, ...]
    seed: int
    speeds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class FedLP(Method[FedLPMemory | None]):
    """Drop layers from uploads, or give clients a model of fewer layers.

    Args:
        mode: `homo`: whole models, uploads without some layers; `hetero`: sub-models of different depth,
            which needs a model with exits.
        preserve: probability with which a layer is uploaded (LPR), in (0, 1]; `homo` only.
        unit: an upload keeps or drops whole layers with their normalisation, or single tensors.
        weighting: of a client in the mean: the same for all, or its number of examples.
        complexity: number of a client's blocks: drawn uniformly, by its speed among all clients, or mostly
            this number; `hetero` only, like the options below.
        preference: share of the clients that have the given number; the others draw from the rest.
        heads: the head of an exit is kept by the client from round to round, restarted in each round from the
            client's initial weights, or exchanged like other layers.
    """

    citation: ClassVar[str] = "Zhu et al., ICC 2023"
    needs: ClassVar[str] = "hetero: a model with exits"

    mode: Literal["homo", "hetero"] = "homo"
    preserve: Annotated[float, Field(gt=0, le=1)] = 0.5
    unit: Literal["layer", "tensor"] = "layer"
    weighting: Weight = "uniform"
    complexity: Literal["uniform", "device"] | PositiveInt = "uniform"
    preference: Fraction = 0.6
    heads: Literal["kept", "restarted", "shared"] = "kept"

    @property
    def fold(self) -> Fold:
        """The mean, weighted by the option `weighting`."""
        return Fold(weight=self.weighting)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Only those of every run."""
        return ()

    def check(self, setting: Setting) -> str | None:
        """Refuse sub-models of a model without exits, or more blocks than the model has."""
        if self.mode == "homo":
            return None
        model, depth = setting.model.name, len(exits_of(setting.model.module))
        if not depth:
            able = ", ".join(name for name, other in MODELS.items() if exits_of(other.build))
            return (
                f"model={model} cannot be left early, as method.mode=hetero needs it; those that can: {able}"
            )
        if isinstance(self.complexity, int) and self.complexity > depth:
            return f"method.complexity={self.complexity} is above the number of exits of {model}, {depth}"
        return None

    def setup(
        self, state: ServerState[FedLPMemory | None], ctx: ServerContext
    ) -> ServerState[FedLPMemory | None]:
        """With sub-models, find the layers of each depth."""
        if self.mode == "homo":
            return state
        paths = exits_of(ctx.model.module)
        sent = [path if self.heads == "shared" else set(path) & set(paths[-1]) for path in paths]
        masks = tuple(Mask(entries_of(ctx.layout, modules), ctx.layout) for modules in sent)
        every = -(-len(ctx.clients) // SPEEDS)
        speeds = sorted(ctx.clients[k].profile.flops_per_s for k in range(0, len(ctx.clients), every))
        return replace(state, memory=FedLPMemory(masks, int(ctx.rng.integers(2**32)), tuple(speeds)))

    def configure(self, state: ServerState[FedLPMemory | None], client: ClientInfo) -> Task:
        """Send the whole model, or the layers of the client's sub-model."""
        memory = state.memory
        if memory is None:  # homo
            return super().configure(state, client)
        complexity = self.complexity_of(client, memory)
        return Task(state.params, memory.masks[complexity - 1], extras={"exit": complexity})

    def complexity_of(self, client: ClientInfo, memory: FedLPMemory) -> int:
        """Return the number of a client's blocks; the same in every round."""
        depth = len(memory.masks)
        if self.complexity == "device":
            slower = bisect_right(memory.speeds, client.profile.flops_per_s)  # or as fast
            return max(1, ceil(depth * slower / len(memory.speeds)))
        shares = np.full(depth, 1 / depth)
        if isinstance(self.complexity, int) and depth > 1:
            shares[:] = (1 - self.preference) / (depth - 1)
            shares[self.complexity - 1] = self.preference
        return 1 + int(np.random.default_rng((memory.seed, client.id)).choice(depth, p=shares))

    def client_update(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: train all and upload some layers, or train a sub-model through its exit."""
        if self.mode == "hetero":
            return self.train_to_exit(task, client)
        params = client.sgd(task.params, task.mask)
        return ClientUpdate(params, self.preserved(task.mask, client))

    def preserved(self, mask: Mask, client: Client) -> Mask:
        """Keep each layer with the probability `preserve`."""
        layers = layers_of(client.model) if self.unit == "layer" else [[name] for name in mask]
        flat = mask.flat.clone()
        for layer in layers:
            if client.rng.random() >= self.preserve:
                for name in layer:
                    flat[mask.layout.spans[name]] = False
        return Mask(flat, mask.layout)

    def train_to_exit(self, task: Task, client: Client) -> ClientUpdate:
        """ON THE DEVICE: train the layers of the task and the client's head; return the layers."""
        path, layout = exits_of(client.model.module)[task.extra("exit", int) - 1], task.mask.layout
        own = entries_of(layout, path) & ~task.mask.flat
        start = task.params.clone()
        head = client.recall("head", Tensor)
        if head is None and bool(own.any()):
            head = client.model.init(int(client.rng.integers(2**63))).flat[own]
        if head is not None:
            start.flat[own] = head
        held = Mask(task.mask.flat | own, layout)
        params = client.sgd(start, held, forward=lambda module, _, x: along(module, path, x))
        if head is not None:
            client.memory["head"] = params.flat[own] if self.heads == "kept" else head
        return ClientUpdate(params, task.mask)


def layers_of(model: ModelSpec) -> list[list[str]]:
    """Return the names of each layer's tensors; a module of vectors only belongs to the layer before it."""
    names: dict[str, list[str]] = {}
    for name in model.layout.names:
        names.setdefault(name.rpartition(".")[0], []).append(name)
    layers: list[list[str]] = [[]]
    for module, _ in model.module.named_modules():
        tensors = names.get(module, [])
        if all(len(model.layout.shape_of[name]) < 2 for name in tensors):
            layers[-1] += tensors  # a normalisation, with its running statistics
        else:
            layers.append(tensors)
    return [layer for layer in layers if layer]


def entries_of(layout: Layout, modules: Iterable[str]) -> Tensor:
    """Return a bool vector (size,): the entries of some modules, given by their dotted names."""
    flat, prefixes = torch.zeros(layout.size, dtype=torch.bool), tuple(f"{name}." for name in modules)
    for name, span in layout.spans.items():
        flat[span] = name.startswith(prefixes)
    return flat
