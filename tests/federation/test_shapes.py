"""Tables, tokens and signals through engine, client, FLOPs and a whole federation."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedray.data.datasets import Dataset, Examples
from fedray.federation.method import Method
from fedray.federation.server import Schedule
from fedray.methods.staged import Staged
from fedray.models import Architecture, ModelSpec
from fedray.models.trial import fault
from fedray.types import Mask
from tests import small

TOKENS, LENGTH = 11, 5


def examples(x: np.ndarray, y: np.ndarray, shape: tuple[int, ...], tokens: int = 0) -> Dataset:
    train = Examples(x, y)
    return Dataset("mine", train, Examples(x[:0], y[:0]), small.CLASSES, shape, tokens=tokens)


def table() -> Dataset:
    rng = np.random.default_rng(0)
    y = rng.integers(small.CLASSES, size=small.EXAMPLES)
    return examples(rng.normal(size=(small.EXAMPLES, 4)) + 2 * np.eye(4)[y], y, (4,))


def words() -> Dataset:
    rng = np.random.default_rng(0)
    y = rng.integers(small.CLASSES, size=small.EXAMPLES)
    x = 3 * rng.integers(3, size=(small.EXAMPLES, LENGTH)) + y[:, None]
    return examples(x.astype(np.int32), y, (LENGTH,), TOKENS)


def waves() -> Dataset:
    data = table()
    return replace(data, train=Examples(data.train.x[:, None], data.train.y), input_shape=(1, 4))


class Words(nn.Module):
    """The mean of embedded tokens, and a linear layer; `how` says by which layer they are embedded."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embedding: nn.Module = (
            nn.EmbeddingBag(TOKENS, 6, sparse=True)
            if how == "bag"
            else nn.Embedding(TOKENS, 6, sparse=how == "sparse", max_norm=2.0 if how == "max norm" else None)
        )
        self.head = nn.Linear(6, small.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embedding(x)
        logits: Tensor = self.head(embedded.mean(1) if embedded.dim() == 3 else embedded)
        return logits


def of(how: str) -> Architecture:
    return Architecture(lambda shape, classes: Words(how), tokens=TOKENS)


def conv1d(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(16, num_classes)
    )


def perceptron(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, num_classes))


def plain(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, num_classes))


KINDS: dict[str, tuple[Callable[[], Dataset], Architecture]] = {
    "table": (table, Architecture(plain)),
    "table with batch norm": (table, Architecture(perceptron)),
    "signal": (waves, Architecture(conv1d)),
    "signal, flattened late": (
        waves,
        Architecture(
            lambda shape, classes: nn.Sequential(
                nn.Linear(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8, classes)
            )
        ),
    ),
    "lazy": (
        waves,
        Architecture(lambda shape, classes: nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))),
    ),
    **{f"tokens, {how}": (words, of(how)) for how in ("dense", "sparse", "bag", "max norm")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_federation_learns_from_examples_of_any_shape(kind: str):
    data, architecture = KINDS[kind]
    spec = ModelSpec.of("mine", architecture, data().input_shape, small.CLASSES)
    assert fault(spec) is None
    method = Staged(density=0.5, until=0.5, batch_size=10, lr=0.3, local_epochs=3)
    server = small.server(
        method if spec.layout.prunable_count else Method(batch_size=10, lr=0.3, local_epochs=3),
        architecture=architecture,
        data=data(),
        schedule=Schedule(rounds=6, cohort=5),
    )
    reports = small.run(server)
    assert {record.fate for report in reports for record in report.clients} == {"folded"}
    assert reports[-1].metrics["val/accuracy"] > 0.6
    assert reports[-1].metrics["flops/clients"] > 0
    if spec.layout.prunable_count:
        assert reports[-1].metrics["density/global"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_sparse_gradients_train_as_dense_ones_do(optimizer: str):
    results = []
    for how in ("dense", "sparse"):
        client = small.client(
            Method(batch_size=10, lr=0.1, optimizer=optimizer),  # type: ignore[arg-type]
            architecture=of(how),
            data=words(),
        )
        params = client.model.init(0)
        mask = Mask.full(params.layout)
        mask["embedding.weight"][::2, 1] = False
        mask = Mask(mask.flat, params.layout)
        results.append((client.sgd(params, mask).flat, client.grad(params, mask)))
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(dense, sparse)


def test_a_model_may_write_into_its_input():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, small.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(x.add_(1))
            return logits

    client = small.client(Method(), architecture=Architecture(lambda *_: Shifted()), data=table())
    params = client.model.init(0)
    first = client.evaluate(params, Mask.full(params.layout))
    assert first.loss == client.evaluate(params, Mask.full(params.layout)).loss
    np.testing.assert_allclose(client.x, table().normalise(table().train.x)[: len(client.x)] * 0 + client.x)


def test_batch_norm_over_positions_keeps_no_channels_apart():
    def rows(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4), nn.Flatten(), nn.Linear(32, 3)
        )

    def vectors(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    of_rows = ModelSpec.of("mine", Architecture(rows), (8, 5), 3)  # 8 positions of 5 numbers
    assert fault(of_rows) is None and of_rows.channel_groups == ()
    (group,) = ModelSpec.of("mine", Architecture(vectors), (5,), 3).channel_groups
    assert (group.size, group.columns) == (8, "3.weight")
