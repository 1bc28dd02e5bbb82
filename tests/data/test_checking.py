"""Data sets of a user's own: normalised as they say, and refused by name where they are malformed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedray.data import DATASETS, Dataset, DatasetSpec, Examples, checked
from fedray.errors import DataError

N = 6
LABELS = np.arange(N) % 2


def spec(**changes: Any) -> DatasetSpec:
    """Return the entry of a data set with three numbers for each example and two classes."""
    entry = DatasetSpec(
        load=lambda root: table(), input_shape=(3,), num_classes=2, train_examples=N, test_examples=0
    )
    return replace(entry, **changes)


def table(x: Any = None, y: Any = LABELS, **changes: Any) -> Dataset:
    train = Examples(np.arange(3.0 * N).reshape(N, 3) if x is None else x, y)
    data = Dataset("mine", train, Examples(train.x[:0], train.y[:0]), 2, (3,))
    return replace(data, **changes)


def halves(x: NDArray[Any]) -> torch.Tensor:
    """Return the first half of each row."""
    return torch.from_numpy(x[:, : x.shape[1] // 2].astype(np.float32))


# ── normalisation ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.int64, np.bool_])
def test_numbers_become_float32_in_fresh_memory(dtype: Any):
    x = np.arange(18).reshape(N, 3).astype(dtype)
    out = table().normalise(x)
    assert out.dtype == torch.float32 and out.tolist() == x.astype(float).tolist()
    out.fill_(7)
    assert x.tolist() == np.arange(18).reshape(N, 3).astype(dtype).tolist()


def test_columns_and_channels_are_scaled_each_by_its_own():
    data = table(mean=(1.0, 2.0, 3.0), std=(1.0, 2.0, 4.0))
    assert data.normalise(np.array([[2.0, 6.0, 3.0]])).tolist() == [[1.0, 2.0, 0.0]]
    signal = replace(data, mean=(1.0, 2.0), std=(1.0, 2.0))
    assert signal.normalise(np.array([[[1.0, 3.0], [2.0, 6.0]]])).tolist() == [[[0.0, 2.0], [0.0, 2.0]]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_tokens_become_int64(dtype: Any):
    words = np.array([[0, 7, 3]], dtype)
    out = table(tokens=8).normalise(words)
    assert out.dtype == torch.int64 and out.tolist() == [[0, 7, 3]]


def test_a_data_set_brings_its_own_normalisation():
    data = table(np.arange(36.0).reshape(N, 6), prepare=halves)
    assert data.normalise(data.train.x[:1]).tolist() == [[0.0, 1.0, 2.0]]
    assert checked("mine", spec(), data) is data


def test_tensors_and_labels_of_any_integer_type_are_taken():
    examples = Examples(torch.ones(N, 3), torch.zeros(N, dtype=torch.int32))  # type: ignore[arg-type]
    assert isinstance(examples.x, np.ndarray) and examples.y.dtype == np.int64
    assert checked("mine", spec(), replace(table(), train=examples))


# ── malformed data ───────────────────────────────────────────────────────────────────────────────────────

nan = np.arange(3.0 * N).reshape(N, 3)
nan[4, 1] = np.nan
WRONG: list[tuple[Callable[[], object], dict[str, Any], str]] = [
    (lambda: (1, 2), {}, "`load` returned tuple, not a fedray.Dataset"),
    (table, {"input_shape": (4,)}, r"with input_shape=\(3,\), but its DatasetSpec has \(4,\)"),
    (table, {"num_classes": 5}, "with num_classes=2, but its DatasetSpec has 5"),
    (table, {"tokens": 9}, "with tokens=0, but its DatasetSpec has 9"),
    (lambda: table(np.ones((0, 3)), LABELS[:0]), {}, "there are no training examples"),
    (lambda: table(writers=np.arange(5)), {}, "there are 5 writers for 6 training examples"),
    (lambda: table(y=LABELS + 1), {}, "train labels go from 1 to 2; num_classes=2 allows 0 to 1"),
    (lambda: table(y=LABELS - 1), {}, "train labels go from -1 to 0"),
    (lambda: table(y=LABELS / 2), {}, r"train labels are float64 of shape \(6,\)"),
    (lambda: table(y=LABELS[:, None]), {}, r"train labels are int64 of shape \(6, 1\)"),
    (lambda: table(y=LABELS[:4]), {}, "train has 6 examples and 4 labels"),
    (lambda: replace(table(), test=Examples(np.ones((1, 3)), np.array([2]))), {}, "test labels go from 2"),
    (lambda: table(np.ones((N, 4))), {}, r"train examples are float32 \(6, 4\) when they are normalised"),
    (lambda: table(nan), {}, "train example 4 has NaN or infinity"),
    (lambda: table(np.array([["a"] * 3] * N)), {}, "train examples cannot be normalised: ValueError"),
    (lambda: table(prepare=lambda x: x), {}, "train examples are ndarray when they are normalised"),
    (
        lambda: table(prepare=lambda x: torch.from_numpy(x)),
        {},
        r"train examples are float64 \(6, 3\) .* must be float32 \(6, 3\)",
    ),
    (
        lambda: table(np.full((N, 3), 9), tokens=9),
        {"tokens": 9},
        "train tokens go from 9 to 9; tokens=9 allows 0 to 8",
    ),
]


@pytest.mark.parametrize(("loaded", "changes", "message"), WRONG)
def test_a_malformed_data_set_is_refused_by_name(
    loaded: Callable[[], object], changes: dict[str, Any], message: str
):
    with pytest.raises(DataError, match=rf"^data\.name: mine: .*{message}"):
        checked("mine", spec(**changes), loaded())


def test_a_row_far_behind_is_named():
    x = np.zeros((10_000, 3))
    x[9_876, 0] = np.inf
    with pytest.raises(DataError, match="train example 9876 has NaN or infinity"):
        checked("mine", spec(), table(x, np.zeros(10_000, int)))


def test_data_sets_of_the_package_check_themselves():
    assert checked("digits", DATASETS["digits"], DATASETS["digits"].load(None)).num_classes == 10
