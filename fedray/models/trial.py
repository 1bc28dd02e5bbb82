"""A user's model is tried before a run: can it be trained in a federation?

Two random examples go through a model that a user wrote, forward and backward. An error that a worker would
otherwise find in mid-run becomes one message that names the model and the module.
"""

import random
import traceback
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedray.models.spec import ModelSpec, examples_of
from fedray.randomness import borrowed

BATCH = 2
GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


def fault(spec: ModelSpec) -> str | None:
    """Return why a model cannot be trained, beginning with its name; None if it can.

    Args:
        spec: the model. It is initialised, and computes with two random examples.
    """
    with borrowed(0):
        found = next(_faults(spec), None)
    return None if found is None else f"{spec.name} {found}"


def _faults(spec: ModelSpec) -> Iterator[str]:
    yield from _foreign_state(spec.module)
    module = spec.bind(spec.init(0).flat)
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not leaves:
        yield "has no parameters that can be trained: all have requires_grad=False, or there are none"
        return
    examples = _random(spec)
    for mode in ("evaluation", "training"):
        module.train(mode == "training")
        try:
            with torch.set_grad_enabled(mode == "training"):
                logits: object = module(examples.clone())
        except Exception as error:
            given = f"{BATCH} {examples_of(spec.input_shape, spec.architecture.tokens)}"
            yield f"fails on {given} in {mode}: {_one_line(error, module)}"
            return
        yield from (f"returns {it} in {mode}" for it in _unlike_logits(logits, spec.num_classes))
    assert isinstance(logits, Tensor)
    yield from _gradients(logits, leaves)


def _random(spec: ModelSpec) -> Tensor:
    rng, shape, tokens = (
        torch.Generator().manual_seed(0),
        (BATCH, *spec.input_shape),
        spec.architecture.tokens,
    )
    return torch.randint(tokens, shape, generator=rng) if tokens else torch.randn(shape, generator=rng)


def _foreign_state(module: nn.Module) -> Iterator[str]:
    """Find state outside parameters and buffers, which would pass from one client to the next."""
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            where = f"{name}.{attribute}".lstrip(".")
            if isinstance(value, Tensor) and value.requires_grad:
                yield f"holds {where}, a tensor that is trained but is no nn.Parameter; make it one"
            elif isinstance(value, GENERATORS):
                yield (
                    f"holds {where}, a generator whose numbers would depend on the clients trained before; "
                    "draw from the global ones (torch.rand, np.random.rand), which are seeded for each client"
                )


def _unlike_logits(logits: object, num_classes: int) -> Iterator[str]:
    expected = f"expected are logits, float32 ({BATCH}, {num_classes}): a row for each example"
    if not isinstance(logits, Tensor):
        yield f"{type(logits).__name__}; {expected}"
    elif logits.shape != (BATCH, num_classes):
        yield f"a tensor of shape {tuple(logits.shape)}; {expected}"
    elif logits.dtype != torch.float32:
        yield f"{str(logits.dtype).removeprefix('torch.')}; {expected}"
    elif not bool(logits.isfinite().all()):
        yield "NaN or infinity for random examples, untrained; look at its initialisation"


def _gradients(logits: Tensor, leaves: dict[str, nn.Parameter]) -> Iterator[str]:
    """Find the reasons why a loss has no gradient for the parameters."""
    if not logits.requires_grad:
        yield "returns logits that do not depend on any parameter that can be trained"
        return
    loss = cross_entropy(logits, torch.arange(BATCH) % logits.shape[1])
    try:
        grads = torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True)
    except RuntimeError as error:
        yield f"has no gradient: {str(error).splitlines()[0]}"
        return
    for name, gradient in zip(leaves, grads, strict=True):
        if gradient is not None and not bool(gradient.to_dense().isfinite().all()):
            yield f"has a gradient of NaN or infinity at {name}, untrained; look at its initialisation"


def _one_line(error: Exception, module: nn.Module) -> str:
    """Return an error in one line, with the module of the network that raised it."""
    names = {id(part): name for name, part in module.named_modules()}
    inner = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        caller = frame.f_locals.get("self")
        if names.get(id(caller)):
            inner = f", in {names[id(caller)]} ({type(caller).__name__})"
    first = (str(error).strip() or "no reason").splitlines()[0]
    return f"{type(error).__name__}: {first}{inner}"
