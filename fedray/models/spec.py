"""A model as fedray sees it: an architecture, the layout of a flat vector, a module that reads from it.

An `Architecture` says how to build a module for inputs of a given shape; a `ModelSpec` is one built for a
data set. Parameters come first in the vector, then the running statistics of normalisation, under the dotted
names of `state_dict`. Integer buffers (`num_batches_tracked`) stay with the module.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from traceback import walk_tb
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedray.errors import ConfigError, FedrayError
from fedray.models.channels import Chains, channel_groups, not_followed, sequential, shared_parameters
from fedray.models.layouts import layout_of, tensors_of
from fedray.models.norms import Norm, Norms, under_policy
from fedray.models.sparse_layers import kernels_of, standardised
from fedray.randomness import borrowed
from fedray.types import ChannelGroup, Layout, Mask, Params

InputShape = tuple[int, ...]
"""Shape of one example: (channels, height, width) of an image, (features,), (length,), (channels, length)."""


def _anything(input_shape: InputShape) -> str | None:
    """Accept examples of any shape."""
    return None


@dataclass(frozen=True)
class Architecture:
    """How to build a network for inputs of a given shape, and which inputs it takes.

    Args:
        build: (input_shape, num_classes) → a module from examples (n, *input_shape), float32 or tokens, to
            logits (n, num_classes). It may draw from the global generators of Python, numpy and torch.
        accepts: input_shape → None, or the reason why such inputs are refused, without a full stop.
        source: who published it.
        summary: its layers in one line.
        chains: where its channels can be followed from layer to layer, for structured pruning. The default
            knows `nn.Sequential`, nested or not. A flattening belongs into a chain too, as `nn.Flatten()`.
        tokens: 0 if it takes float32; else it takes int64 in 0..tokens − 1, which it embeds.
    """

    build: Callable[[InputShape, int], nn.Module]
    accepts: Callable[[InputShape], str | None] = _anything
    source: str = ""
    summary: str = ""
    chains: Chains = sequential
    tokens: int = 0

    def blank(self, count: int, input_shape: InputShape) -> Tensor:
        """Return `count` examples to try a model with: zeros, or tokens from torch's global generator."""
        if self.tokens:
            return torch.randint(self.tokens, (count, *input_shape))
        return torch.zeros(count, *input_shape)


def examples_of(input_shape: InputShape, tokens: int = 0) -> str:
    """Name examples of a shape in a message."""
    sizes = "×".join(map(str, input_shape))
    if tokens:
        return f"sequences of {sizes} tokens"
    return f"images of {sizes}" if len(input_shape) == 3 else f"examples of {sizes} numbers"


def not_images(name: str, input_shape: InputShape) -> str | None:
    """Return why a model of images does not take such examples, or None if they are images."""
    if len(input_shape) == 3:
        return None
    return f"{name} takes images (channels × height × width), not {examples_of(input_shape)}"


@dataclass(frozen=True)
class ModelSpec:
    """An architecture built for a data set. Pickles to a few kilobytes for models of any size.

    Args:
        name: as in the table of models.
        input_shape: shape of one example.
        num_classes: number of logits.
        architecture: its architecture.
        layout: position of each tensor in the flat vector.
        module: the structure. Its tensors in the layout are on torch's meta device, without values, so that
            the module needs no memory and cannot be mistaken for a trained one; `bind` gives it values.
        norm: the policy for its batch normalisation.
        standardize: whether the weights of its convolutions are standardised; None: as the method has it.
    """

    name: str
    input_shape: InputShape
    num_classes: int
    architecture: Architecture = field(repr=False)
    layout: Layout = field(repr=False)
    module: nn.Module = field(compare=False, repr=False)
    norm: Norm = "average"
    standardize: bool | None = None

    @classmethod
    def of(
        cls,
        name: str,
        architecture: Architecture,
        input_shape: InputShape,
        num_classes: int,
        *,
        norm: Norm = "average",
        standardize: bool | None = None,
        prune_first: bool = True,
        prune_last: bool = False,
        device: Literal["cpu", "meta"] = "cpu",
    ) -> "ModelSpec":
        """Build an architecture that is known to accept `input_shape`.

        Args:
            name: what to call it in reports.
            architecture: what to build.
            input_shape: shape of one example.
            num_classes: number of logits.
            norm: the policy for its batch normalisation.
            standardize: whether the weights of its convolutions are standardised; None: as the method has it.
            prune_first: whether the weight of the first layer may be pruned.
            prune_last: whether the weight of the classifier, the last convolution or linear layer, may be.
            device: where it is built; on `meta` nothing is initialised, and the module cannot be run.

        Raises:
            ConfigError: if it cannot be built, if the module holds tensors that do not fit into one float32
                vector, or if the policy does not fit it.
        """
        try:
            module = _build(architecture, input_shape, num_classes, norm, seed=0, device=device)
        except FedrayError:
            raise
        except Exception as error:
            raise ConfigError(
                f"model: {name} cannot be built for {examples_of(input_shape, architecture.tokens)} "
                f"and {num_classes} classes: {type(error).__name__}: {error}{_place(error)}"
            ) from error
        layout = layout_of(module, prune_first=prune_first, prune_last=prune_last)
        if not layout.names:
            raise ConfigError(f"model: {name} has no parameters, so there is nothing to train")
        empty = {n: torch.empty(layout.shape_of[n], device="meta") for n in layout.names}
        structure = _with_tensors(module, empty)
        return cls(name, input_shape, num_classes, architecture, layout, structure, norm, standardize)

    @cached_property
    def kernels(self) -> tuple[str, ...]:
        """The weights that are standardised in every forward pass; empty if none is."""
        return kernels_of(self.module) if self.standardize else ()

    def forward_params(self, params: Params, mask: Mask) -> Params:
        """Return the weights that the forward pass uses: a plain model with them computes the same.

        Args:
            params: as they are trained; not changed. Returned themselves if nothing is standardised.
            mask: entries that are held.
        """
        if not self.kernels:
            return params
        weights = standardised(params, mask, names=self.kernels)
        return Params(torch.cat([weight.flatten() for weight in weights.values()]), params.layout)

    @cached_property
    def channel_groups(self) -> tuple[ChannelGroup, ...]:
        """The channels that can be removed as a whole; empty if there are none."""
        chains, shared = self.architecture.chains(self.module), shared_parameters(self.module)
        return channel_groups(chains, shared, vectors=len(self.input_shape) == 1)

    @cached_property
    def without_channels(self) -> str:
        """The reason for having no channels that can be removed, if there are none."""
        return not_followed(self.module, self.architecture.chains(self.module))

    @cached_property
    def norms(self) -> Norms:
        """The positions of its batch normalisation, and which of them clients share."""
        return Norms.of(self.module, self.layout, self.norm)

    @cached_property
    def pairs(self) -> frozenset[str]:
        """In which modes, `train` and `eval`, the model needs two examples at least.

        BatchNorm1d fails on one, as does every normalisation with a single value for each channel; a
        `squeeze` takes it for no batch at all.
        """
        found = set()
        with borrowed(0), torch.no_grad():
            module = self.bind(torch.zeros(self.layout.size))
            for mode in ("train", "eval"):
                try:
                    logits = module.train(mode == "train")(self.architecture.blank(1, self.input_shape))
                    alone = logits.shape == (1, self.num_classes)
                except Exception:  # of any kind: with two examples the model works, see `trial`
                    alone = False
                if not alone:
                    found.add(mode)
        return frozenset(found)

    @cached_property
    def has_head(self) -> bool:
        """Whether there is a linear layer that can be called the classifier."""
        return any(isinstance(module, nn.Linear) for module in self.module.modules())

    @cached_property
    def head(self) -> str:
        """Dotted name of the classifier: the last linear layer.

        Raises:
            ConfigError: if there is none.
        """
        linear: list[str] = [name for name, m in self.module.named_modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise ConfigError(f"model: {self.name} has no linear layer that could be called its classifier")
        return linear[-1]

    def shrunken(self, layout: Layout) -> "ModelSpec":
        """Return the same network with the smaller tensors of `layout`: fewer rows, fewer columns."""
        module = _with_tensors(
            self.module, {n: torch.empty(layout.shape_of[n], device="meta") for n in layout.names}
        )
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d):
                layer.out_channels, layer.in_channels = layer.weight.shape[:2]
            elif isinstance(layer, nn.Linear):
                layer.out_features, layer.in_features = layer.weight.shape
            elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.weight is not None:
                layer.num_features = len(layer.weight)
        return replace(self, layout=layout, module=module)

    def init(self, seed: int) -> Params:
        """Return a fresh initialisation, the architecture's own: the same seed gives the same bits.

        The global generators are left as they were.

        Args:
            seed: in [0, 2⁶⁴).
        """
        module = _build(self.architecture, self.input_shape, self.num_classes, self.norm, seed)
        tensors = dict(tensors_of(module))
        return Params(torch.cat([tensors[n].detach().flatten() for n in self.layout.names]), self.layout)

    def bind(self, flat: Tensor) -> nn.Module:
        """Return a new module whose parameters and running statistics are views into `flat`.

        Writing to `flat` changes the module, an optimiser's in-place step or BatchNorm's update changes
        `flat`; nothing is ever copied.

        Args:
            flat: float32 (size,), contiguous, on the device where the module shall run.

        Raises:
            ValueError: if length or dtype do not fit the layout.
        """
        return _with_tensors(self.module, dict(Params(flat, self.layout))).to(flat.device)


def _build(
    architecture: Architecture,
    input_shape: InputShape,
    num_classes: int,
    norm: Norm,
    seed: int,
    device: str = "cpu",
) -> nn.Module:
    with borrowed(seed), torch.device(device) if device != "cpu" else nullcontext():
        torch.default_generator.manual_seed(seed)  # as it was before numpy's and Python's were seeded too
        module = architecture.build(input_shape, num_classes)
        if isinstance(module, nn.Module):
            _initialise(module, architecture.blank, input_shape)
            module = under_policy(module, norm)
        return module


def _initialise(
    module: nn.Module, blank: Callable[[int, InputShape], Tensor], input_shape: InputShape
) -> None:
    """Give lazy modules their shapes, by a pass over blank examples.

    Raises:
        ConfigError: if some parameters have none after it.
    """
    if not _lazy(module):
        return
    with torch.no_grad():
        module.eval()(blank(2, input_shape))
    module.train()
    if unused := _lazy(module):
        raise ConfigError(f"model: {unused[0]} has no shape after a forward pass, in which it takes no part")


def _lazy(module: nn.Module) -> list[str]:
    tensors = chain(module.named_parameters(), module.named_buffers())
    return [name for name, tensor in tensors if is_lazy(tensor)]


def _place(error: Exception) -> str:
    """Return the file and line that raised an error."""
    frames = list(walk_tb(error.__traceback__))
    frame, line = frames[-1]
    return f" ({Path(frame.f_code.co_filename).name}, line {line})"


def _with_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """Return a copy of `module` with `tensors` themselves in place of the module's."""
    replaced: dict[int, Tensor] = {}
    for name, old in tensors_of(module):
        new = tensors[name]
        # views of one vector share its version counter, so that autograd notices who writes to it between
        # forward and backward; `.data` has a separate one, for statistics may be updated just then
        replaced[id(old)] = (
            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new.data
        )
    # deepcopy takes tensors in its memo as the copies: no weight is copied, and tied ones stay tied
    try:
        return deepcopy(module, replaced)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"model: {type(module).__name__} cannot be copied for each worker: {str(error).splitlines()[0]}. "
            "A module may hold parameters, buffers and plain values, but no computed tensors, locks or files"
        ) from error
