"""bfloat16: results agree with those of float32 to its rounding, and no machine without it trains.

torch computes bfloat16 on any processor, if slowly: so the numbers are tested wherever the tests run.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedray.errors import ConfigError
from fedray.federation.client import Step
from fedray.federation.method import Method
from fedray.federation.worker import Worker
from fedray.training.engine import Engine
from fedray.training.precision import refusal
from fedray.types import Mask
from tests import small


def trained(precision: str, **options: object) -> tuple[Tensor, Tensor]:
    """Return the change of the weights after four steps of a client, and its loss."""
    client = small.client(Method(lr=0.1, steps=4), architecture=small.CNN)
    client._engine = Engine(client.model, client._engine.flops, precision=precision)  # type: ignore[arg-type]
    start, mask = client.model.init(0), Mask.full(client.model.layout)
    params = client.sgd(start, mask, **options)  # type: ignore[arg-type]
    assert params.flat.dtype == torch.float32
    return params.flat - start.flat, torch.tensor(client.meter.loss)


def entropy(step: Step) -> Tensor:
    assert step.logits.dtype == step.features.dtype == torch.float32
    return torch.nn.functional.cross_entropy(step.logits, step.y)


@pytest.mark.parametrize(
    "options",
    [{}, {"loss": entropy}, {"view": lambda weights: weights}],
    ids=["plain", "own loss", "view"],
)
def test_results_agree_with_those_of_float32_to_the_rounding_of_bfloat16(options: dict[str, object]):
    (exact, loss), (rounded, rounded_loss) = trained("fp32", **options), trained("bf16", **options)
    assert not torch.equal(exact, rounded)
    # eight bits of precision in each product; their errors average out over a batch
    assert float((rounded - exact).norm() / exact.norm()) < 0.02
    torch.testing.assert_close(rounded_loss, loss, rtol=0.01, atol=0)


def test_evaluation_stays_in_float32():
    client = small.client(Method(), architecture=small.CNN)
    model, mask = client.model.init(0), Mask.full(client.model.layout)
    exact = client.evaluate(model, mask).losses
    client._engine = Engine(client.model, client._engine.flops, precision="bf16")
    torch.testing.assert_close(torch.tensor(client.evaluate(model, mask).losses), torch.tensor(exact))


def test_a_worker_on_a_machine_without_it_refuses_before_it_trains(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "mips"})
    worker = Worker(replace(small.workplace(Method()), precision="bf16"))
    with pytest.raises(ConfigError, match=r"train\.precision: bf16, but mips has no instructions"):
        worker.begin()
    Worker(small.workplace(Method())).begin()


def test_a_gpu_without_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Acme GTX")
    assert "Acme GTX has no bfloat16" in (refusal("bf16", gpu) or "")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert refusal("bf16", gpu) is None
    assert refusal("fp32", gpu) is None
