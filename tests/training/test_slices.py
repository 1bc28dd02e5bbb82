"""The scaler, the loss without absent classes, and the norm of gradients: worked by hand."""

from math import exp, log

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedray.federation.client import Step
from fedray.federation.method import Method
from fedray.pruning.widths import slice_mask
from fedray.training.slices import MaskedCrossEntropy, Scaler, absent_classes
from fedray.types import Mask, Params
from tests import small


def step(logits: torch.Tensor, y: list[int]) -> Step:
    x = torch.zeros(len(y), 1)
    return Step(x, torch.tensor(y), logits, logits, {}, 0)


def test_absent_classes_have_a_logit_of_zero_and_no_gradient() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0]], requires_grad=True)
    absent = absent_classes(torch.tensor([0, 2, 2]), 3)
    assert absent.tolist() == [False, True, False]
    loss = MaskedCrossEntropy(absent)(step(logits, [0]))
    total = exp(1) + exp(0) + exp(2)  # the absent class counts as exp(0)
    assert float(loss.detach()) == pytest.approx(-1 + log(total))
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == pytest.approx([exp(1) / total - 1, 0.0, exp(2) / total])


def test_with_all_classes_it_is_the_ordinary_loss() -> None:
    logits = torch.randn(4, 3)
    absent = absent_classes(torch.tensor([0, 1, 2]), 3)
    assert float(MaskedCrossEntropy(absent)(step(logits, [0, 1, 2, 0]))) == pytest.approx(
        float(cross_entropy(logits, torch.tensor([0, 1, 2, 0])))
    )


def test_the_scaler_divides_what_a_sliced_layer_computes() -> None:
    client = small.client(Method(), architecture=small.CNN)
    scaler = Scaler.of(client.model.channel_groups, 0.25)
    assert scaler.tensors == {"conv1.weight", "conv2.weight", "conv2.bias"}
    params = client.model.init(0)
    seen = scaler(dict(params))
    x = torch.randn(2, 4, 2, 2)
    plain, scaled = (
        nn.functional.conv2d(x, weights["conv2.weight"], weights["conv2.bias"], padding=1)
        for weights in (params, seen)
    )
    torch.testing.assert_close(scaled, plain / 0.25)
    assert seen["fc.weight"] is not None
    assert torch.equal(seen["fc.weight"], params["fc.weight"])
    assert torch.equal(seen["bn1.weight"], params["bn1.weight"])


def gradient_of(clip: float | None, mask: Mask | None = None, *, narrow: bool = False) -> torch.Tensor:
    """Return the change of one step at a learning rate of 1: minus the gradient."""
    client = small.client(Method(lr=1.0, batch_size=1000), architecture=small.CNN)
    params = client.model.init(0)
    mask = mask or Mask.full(params.layout)
    after = client.sgd(params, mask, steps=1, clip=clip, narrow=narrow)
    change = (params.masked(mask).flat - after.flat) * mask.layout.trainable_flat
    return change


def test_clipping_keeps_the_direction_and_bounds_the_norm() -> None:
    whole = gradient_of(None)
    norm = float(whole.norm())
    clipped = gradient_of(norm / 2)
    torch.testing.assert_close(clipped, whole / 2, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradient_of(norm * 2), whole, rtol=1e-3, atol=1e-6)


def test_only_held_entries_count_in_the_norm() -> None:
    layout = small.client(Method(), architecture=small.CNN).model.layout
    flat = torch.ones(layout.size, dtype=torch.bool)
    flat[layout.spans["conv2.weight"]] = torch.arange(6 * 4 * 9) % 2 == 0
    clipped = gradient_of(0.01, Mask(flat, layout))
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-2)
    assert not bool(clipped[~flat].any())


def test_a_smaller_model_trains_with_loss_view_and_clip_as_the_whole_one_does() -> None:
    def trained(*, narrow: bool) -> Params:
        client = small.client(Method(lr=0.1, momentum=0.9, batch_size=5), architecture=small.CNN)
        groups, layout = client.model.channel_groups, client.model.layout
        mask = slice_mask(layout, groups, 0.5)
        absent = torch.tensor([False, False, True])
        keep = client.y != 2
        client.y, client.x = client.y[keep], client.x[keep]
        assert (client._engine.smaller(mask) is client._engine) is False
        return client.sgd(
            client.model.init(1),
            mask,
            loss=MaskedCrossEntropy(absent),
            view=Scaler.of(groups, 0.5),
            clip=0.5,
            narrow=narrow,
        )

    torch.testing.assert_close(trained(narrow=True).flat, trained(narrow=False).flat, rtol=1e-4, atol=1e-5)
