"""MODELS: named architectures, and `ModelSpec`, which binds one to a flat vector.

    spec = build_model("cnn", (1, 28, 28), 10)
    params = spec.init(seed=0)                 # Params: one float32 vector
    module = spec.bind(params.flat)            # an nn.Module that reads from, and writes to, that vector

Your own network is an `Architecture` too; pass `{**MODELS, "mine": Architecture(…)}` as `models`.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

from fedray.errors import ConfigError, unknown
from fedray.models.char_transformer import CHAR_TRANSFORMER
from fedray.models.cnn import CNN, CONV2
from fedray.models.fedlp_cnn import FEDLP_CNN, FEDLP_CNN_EXITS
from fedray.models.heterofl_cnn import HETEROFL_CNN
from fedray.models.layouts import layout_of
from fedray.models.lenet import LENET5
from fedray.models.mlp import MLP, MLP_WIDE
from fedray.models.norms import Norm
from fedray.models.resnet import RESNET18
from fedray.models.spec import Architecture, InputShape, ModelSpec
from fedray.models.strided_cnn import STRIDED_CNN
from fedray.models.trial import fault
from fedray.models.vgg import VGG11, VGG19_BN

__all__ = [
    "MODELS",
    "OURS",
    "Architecture",
    "InputShape",
    "ModelSpec",
    "Norm",
    "broken",
    "build_model",
    "layout_of",
    "outline",
    "refusal",
]

MODELS: dict[str, Architecture] = {
    "mlp": MLP,
    "mlp_wide": MLP_WIDE,
    "lenet5": LENET5,
    "cnn": CNN,
    "vgg11": VGG11,
    "vgg19_bn": VGG19_BN,
    "resnet18": RESNET18,
    "conv2": CONV2,
    "fedlp_cnn": FEDLP_CNN,
    "fedlp_cnn_exits": FEDLP_CNN_EXITS,
    "char_transformer": CHAR_TRANSFORMER,
    "strided_cnn": STRIDED_CNN,
    "heterofl_cnn": HETEROFL_CNN,
}
"""Name in a config → architecture."""
OURS = frozenset(MODELS.values())
"""Architectures of the package, which its tests train."""


def refusal(architecture: Architecture, input_shape: InputShape, tokens: int | None = None) -> str | None:
    """Return why an architecture does not take such inputs, or None; an error in `accepts` is a reason.

    Args:
        architecture: asked for its inputs.
        input_shape: shape of one example.
        tokens: number of different tokens in the examples, 0 for numbers; None: not compared.
    """
    if tokens is not None and (reason := _unlike(architecture.tokens, tokens)):
        return reason
    try:
        return architecture.accepts(input_shape)
    except Exception as error:
        return f"its `accepts` raised {type(error).__name__}: {error}"


def _unlike(embedded: int, given: int) -> str | None:
    """Return why a model that embeds that many tokens does not take examples with these, or None."""
    if given and not embedded:
        return (
            f"it takes numbers, and the examples are {given:,} different tokens; a model that embeds tokens "
            "says how many in its Architecture, e.g. tokens=1000"
        )
    if embedded and not given:
        return (
            f"it embeds {embedded:,} tokens, and the examples are numbers; a data set of tokens says how "
            "many in its DatasetSpec and its Dataset, e.g. tokens=1000"
        )
    if given > embedded:
        return f"it embeds {embedded:,} tokens, and the examples have {given:,}"
    return None


def broken(spec: ModelSpec) -> str | None:
    """Return why a model that a user wrote cannot be trained; None if it can, or if it is one of ours."""
    if spec.architecture in OURS:
        return None
    return _fault(spec.architecture, spec.name, spec.input_shape, spec.num_classes, spec.norm)


@lru_cache(maxsize=64)
def _fault(
    architecture: Architecture, name: str, input_shape: InputShape, num_classes: int, norm: Norm
) -> str | None:
    return fault(ModelSpec.of(name, architecture, input_shape, num_classes, norm=norm))


def build_model(
    name: str,
    input_shape: InputShape,
    num_classes: int,
    models: Mapping[str, Architecture] = MODELS,
    *,
    norm: Norm = "average",
    standardize: bool | None = None,
    prune_first: bool = True,
    prune_last: bool = False,
) -> ModelSpec:
    """Build a model by name for a data set.

    Args:
        name: a key of `models`.
        input_shape: shape of one example.
        num_classes: number of logits.
        models: name → architecture.
        norm: the policy for its batch normalisation, if it has any: see `norms.py`.
        standardize: whether the weights of its convolutions are standardised; None: as the method has it.
        prune_first: whether the weight of the first layer may be pruned.
        prune_last: whether the weight of the classifier, the last convolution or linear layer, may be.

    Raises:
        ConfigError: if there is no such model, or if it does not take such inputs.
    """
    if name not in models:
        raise ConfigError(f"model: {unknown('model', name, models)}")
    architecture = models[name]
    if reason := refusal(architecture, input_shape):
        able = ", ".join(n for n, other in models.items() if refusal(other, input_shape) is None)
        raise ConfigError(
            f"model: {reason}. Models that take {'×'.join(map(str, input_shape))}: {able or 'none'}"
        )
    return ModelSpec.of(
        name,
        architecture,
        input_shape,
        num_classes,
        norm=norm,
        standardize=standardize,
        prune_first=prune_first,
        prune_last=prune_last,
    )


def outline(
    name: str,
    input_shape: InputShape,
    num_classes: int,
    *,
    norm: Norm = "average",
    standardize: bool | None = None,
    prune_first: bool = True,
    prune_last: bool = False,
) -> ModelSpec:
    """Return a model's structure for checks before a run; it has no values and cannot be run.

    It is built once for the same arguments, on the meta device where the architecture can be built there.
    Arguments and errors are those of `build_model`, for a model of the table that takes such inputs.
    """
    return _outline(MODELS[name], name, input_shape, num_classes, norm, standardize, prune_first, prune_last)


@lru_cache(maxsize=64)
def _outline(
    architecture: Architecture,
    name: str,
    input_shape: InputShape,
    num_classes: int,
    norm: Norm,
    standardize: bool | None,
    prune_first: bool,
    prune_last: bool,
) -> ModelSpec:
    def built(device: Literal["cpu", "meta"]) -> ModelSpec:
        return ModelSpec.of(
            name,
            architecture,
            input_shape,
            num_classes,
            norm=norm,
            standardize=standardize,
            prune_first=prune_first,
            prune_last=prune_last,
            device=device,
        )

    try:
        return built("meta")
    except Exception:  # `build` reads values; built on the CPU, a broken model raises its error
        return built("cpu")
