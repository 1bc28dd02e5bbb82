"""An ensemble of classifiers is a classifier; distillation against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear

from fedray.pruning.recovery import classifier, classify, distillation, ensemble


def test_a_classifier_is_its_weight_and_its_bias():
    weights = {"fc.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "fc.bias": torch.tensor([5.0, 6.0])}
    rows = classifier(weights, "fc")
    assert rows.tolist() == [[1, 2, 5], [3, 4, 6]]
    features = torch.tensor([[1.0, 0.5], [0.0, -1.0]])
    assert torch.equal(classify(rows, features), linear(features, weights["fc.weight"], weights["fc.bias"]))
    assert classifier({"fc.weight": weights["fc.weight"]}, "fc").tolist() == [[1, 2, 0], [3, 4, 0]]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5), st.integers(2, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_an_ensemble_with_weights_of_classes_is_one_classifier(members, classes, width, seed):
    rng = torch.Generator().manual_seed(seed)
    heads = torch.randn(members, classes, width + 1, generator=rng)
    counts = torch.randint(0, 4, (members, classes), generator=rng).float()
    counts[0] += 1.0  # some member has a weight for each class
    features = torch.randn(8, width, generator=rng)
    alpha = counts / counts.sum(0)
    voted = torch.stack([alpha[k] * classify(heads[k], features) for k in range(members)]).sum(0)
    rows = (heads * counts[:, :, None]).sum(0)
    one = ensemble(rows, counts.sum(0), otherwise=torch.full((classes, width + 1), math.nan))
    assert torch.allclose(classify(one, features), voted, atol=1e-5)


def test_a_class_that_nobody_has_keeps_the_other_row():
    rows, otherwise = torch.tensor([[2.0, 4.0], [0.0, 0.0]]), torch.tensor([[9.0, 9.0], [7.0, 8.0]])
    assert ensemble(rows, torch.tensor([4.0, 0.0]), otherwise).tolist() == [[0.5, 1.0], [7.0, 8.0]]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_by_hand(temperature: float) -> None:
    # softmax(z/τ) of the teacher is (3/4, 1/4), of the student (1/2, 1/2)
    taught = torch.tensor([[temperature * math.log(3.0), 0.0]])
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    one = distillation(torch.zeros(1, 2), taught, temperature)
    assert float(one) == pytest.approx(temperature**2 * divergence, rel=1e-5)
    two = distillation(torch.zeros(2, 2), torch.cat([taught, torch.zeros(1, 2)]), temperature)
    assert float(two) == pytest.approx(temperature**2 * divergence / 2, rel=1e-5)  # the mean of the batch


def test_the_teacher_is_not_taught():
    logits, taught = (torch.randn(4, 3).requires_grad_() for _ in range(2))
    distillation(logits, taught, 2.0).backward()
    assert taught.grad is None and logits.grad is not None
    same = logits.detach().requires_grad_()
    assert torch.autograd.grad(distillation(same, same, 2.0), same)[0].abs().max() < 1e-6
