"""`python -m benchmarks.gpu` without a GPU: a message, and a trial on the processor."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main([])
    assert "no CUDA device here" in capsys.readouterr().out


def test_a_trial_on_the_processor(capsys: pytest.CaptureFixture[str], threads: None):
    gpu.main(
        ["--device", "cpu", "--models", "mlp", "--rounds", "1", "--warm-up-rounds", "0", "--stack", "20"]
    )
    out = capsys.readouterr().out
    assert "plain loop" in out
    assert "20 at once, fp32" in out


def test_the_roof_is_that_of_a_product_of_matrices():
    assert gpu.roof_flops_per_s("cpu", size=64, repeats=2) > 0


def test_the_shapes_of_cifar10():
    config = gpu.config("resnet18")
    assert (config.clients.population, config.clients.cohort, config.method.options.batch_size) == (
        100,
        10,
        32,
    )
    assert gpu.config("cnn").clients.cohort == 100
